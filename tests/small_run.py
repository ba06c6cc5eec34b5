"""A run of seconds on a made-up corpus, for the tests of what users are shown."""

import pathlib

from olmo_jax.curation import stdlib

STEPS = 3
VOCAB = 512
# Laid over any config of `configs/`: a model and a batch that eight virtual devices share.
TINY = f"""
model.vocab_size={VOCAB} model.d_model=32 model.n_layers=4 model.n_heads=4 model.n_kv_heads=4
model.head_dim=8 model.d_ff=64 model.max_seq_len=64 model.window=8
data.dtype=none data.seq_len=64 data.global_batch_size=512 data.order=core
data.instance_filter=false
optim.schedule.name=constant_with_warmup optim.schedule.warmup=1 optim.schedule.unit=steps
optim.schedule.period_lengths=() optim.schedule.t_max=none optim.schedule.decay_fraction=none
optim.schedule.warmup_fraction=none
train.duration={STEPS} train.duration_unit=steps train.hard_stop=none train.loss_ranks=none
eval.stride=64 checkpoint.interval=1000 checkpoint.ephemeral_interval=none checkpoint.fixed_steps=()
compute.accumulate=1 compute.dtype=float32 compute.compilation_cache=none
log.interval=1 log.tensorboard=false
""".split()  # fmt: skip


def flags(*options: str) -> list[str]:
    """Command line flags of `part.option=value` words."""
    return [f"--config.{option}" for option in options]


def make_corpus(folder: pathlib.Path) -> stdlib.Corpus:
    """Token files, held-out text and a tokenizer, from sixty little programs."""
    sources = folder / "library"
    sources.mkdir()
    for i in range(60):
        body = "".join(f"    y = x * {j} + {i}\n" for j in range(20))
        (sources / f"m{i}.py").write_text(f"def f{i}(x):\n{body}    return y\n")
    return stdlib.prepare(folder / "data", 300, root=sources, log=lambda line: None)


def data_flags(made: stdlib.Corpus) -> list[str]:
    """Flags that train on a made corpus instead of what a config names."""
    return flags(
        "data.corpus=none",
        f"data.paths={made.train_path}",
        f"data.tokenizer={made.tokenizer_path}",
        f"data.eos_id={made.eos_id}",
        f"eval.paths={made.heldout_path}",
    )
