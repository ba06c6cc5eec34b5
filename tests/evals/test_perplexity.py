import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest

from olmo_jax import config
from olmo_jax.data import documents
from olmo_jax.data.documents import write_documents
from olmo_jax.data.tokenizer import Tokenizer
from olmo_jax.evals.perplexity import HeldOut, Stream, evaluate
from olmo_jax.nn import transformer
from olmo_jax.parallel import sharding
from olmo_jax.training.loop import Budget

VOCAB, SEQ, EOS = 97, 16, 3
MODEL = config.ModelConfig(
    vocab_size=VOCAB, padded_vocab_size=100, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2,
    head_dim=8, d_ff=32, max_seq_len=64, init_std=0.5,
)  # fmt: skip
COMPUTE = config.ComputeConfig(dtype="float32", remat="none")
TEXT = np.random.default_rng(0).integers(0, VOCAB, 203).astype(np.uint16)


def evaluator_of(c, mesh):
    return HeldOut(c.eval, c.data, c.model, c.compute, mesh)


def cfg(**data) -> config.Config:
    data = {"seq_len": SEQ, "eos_id": EOS} | data
    return config.Config(model=MODEL, compute=COMPUTE, data=config.FixedLength(**data))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    return transformer.Transformer(MODEL, COMPUTE)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(transformer.init, static_argnums=0)(model.config, jax.random.key(0))


@pytest.fixture(scope="module")
def eval_step(mesh):
    return made.make_eval_step(cfg(), mesh)


@functools.partial(jax.jit, static_argnums=0)
def nats_of(model, params, window, length, target):
    logits = made.logits_of(model, params, window[None])[0, length - 1]
    return jax.nn.logsumexp(logits) - logits[target]


def by_hand(model, params, stream: np.ndarray, stride: int) -> float:
    """Nats of stream[1:], each token scored on its own from the context that its row gives it."""
    total = 0.0
    for i in range(1, len(stream)):
        row = max(0, -(-(i - SEQ) // stride))
        context = stream[row * stride : i]
        window = np.zeros(SEQ, np.int32)
        window[: len(context)] = context
        total += float(nats_of(model, params, window, len(context), int(stream[i])))
    return total


class Recorder:
    """An evaluation step that notes what it is asked, and answers 1 nat per scored token."""

    def __init__(self):
        self.scored: list[tuple[int, int]] = []  # (target, tokens of context)
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, params, batch):
        batch = {name: np.asarray(value) for name, value in batch.items()}
        self.shapes.add(batch["tokens"].shape)
        for target, weight in zip(batch["targets"], batch["loss_weights"], strict=True):
            for column in np.flatnonzero(weight):
                self.scored.append((int(target[column]), int(column) + 1))
        return {"ce_sum": jnp.float32(batch["loss_weights"].sum())}


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16, None])
@pytest.mark.parametrize("eos_id", [EOS, None])
@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 18, 31, 32, 33, 34, 47, 100])
def test_each_token_is_scored_once_with_enough_context(mesh, n, eos_id, stride):
    recorder = Recorder()
    stream = Stream(1000 + np.arange(n, dtype=np.uint16), eos_id)
    score = evaluate(recorder, None, mesh, stream, seq_len=SEQ, stride=stride, batch_rows=3)
    first = 0 if eos_id is not None else 1
    assert [target - 1000 for target, _ in recorder.scored] == list(range(first, n))
    for target, context in recorder.scored:
        there = target - 1000 + (eos_id is not None)  # tokens before this one
        assert min(there, SEQ - (stride or SEQ) + 1) <= context <= there
    assert recorder.shapes == {(3, SEQ)}
    assert (score.n_tokens, score.nats) == (n - first, n - first)


@pytest.mark.parametrize("stride", [4, SEQ])
def test_the_total_is_that_of_scoring_every_token_by_hand(mesh, model, params, eval_step, stride):
    text = TEXT[:61]
    options = {"seq_len": SEQ, "stride": stride, "batch_rows": 4}
    with_eos = evaluate(eval_step, params, mesh, Stream(text, EOS), **options)
    expected = by_hand(model, params, np.concatenate([[EOS], text]), stride)
    assert with_eos.nats == pytest.approx(expected, rel=2e-6)
    assert with_eos.ce == pytest.approx(expected / 61, rel=2e-6)
    assert with_eos.ppl == pytest.approx(math.exp(expected / 61), rel=2e-5)
    without = evaluate(eval_step, params, mesh, Stream(text), **options)
    assert without.nats == pytest.approx(by_hand(model, params, text, stride), rel=2e-6)
    assert (with_eos.n_tokens, without.n_tokens) == (61, 60)


@pytest.mark.slow
def test_all_batch_sizes_and_meshes_agree(mesh, params, eval_step):
    stream = Stream(TEXT, EOS)
    options = {"seq_len": SEQ, "stride": 8}
    expected = evaluate(eval_step, params, mesh, stream, batch_rows=1, **options)
    for batch_rows in (3, 40):
        score = evaluate(eval_step, params, mesh, stream, batch_rows=batch_rows, **options)
        assert score.n_tokens == expected.n_tokens == 203
        assert score.nats == pytest.approx(expected.nats, rel=1e-6)
    split = sharding.make_mesh(config.MeshConfig(fsdp=2, context=2, tensor=2))
    score = evaluate(
        made.make_eval_step(cfg(), split), params, split, stream, batch_rows=3, **options
    )
    assert score.n_tokens == 203
    assert score.nats == pytest.approx(expected.nats, rel=1e-5)


def test_evaluation_compiles_once(mesh, params):
    eval_step = made.make_eval_step(cfg(), mesh)
    for text in (TEXT, TEXT[:50]):
        evaluate(eval_step, params, mesh, Stream(text, EOS), seq_len=SEQ, stride=8, batch_rows=4)
    assert eval_step.function._cache_size() == 1


def test_a_few_rows_are_evenly_spaced(mesh):
    recorder = Recorder()
    stream = Stream(np.arange(1000, 1160, dtype=np.uint16), EOS)
    score = evaluate(recorder, None, mesh, stream, seq_len=SEQ, max_rows=4, batch_rows=3)
    assert score.n_tokens == 4 * SEQ
    starts = [target - 1000 for target, _ in recorder.scored[::SEQ]]
    assert starts == [0, 48, 96, 144]
    many = evaluate(recorder, None, mesh, stream, seq_len=SEQ, max_rows=10, batch_rows=3)
    assert many.n_tokens == 160


def test_bits_per_byte_of_a_uniform_model_is_known(mesh, params):
    """data_eval.md §2.6 (6): log2(V) · tokens / bytes."""
    tokenizer = Tokenizer.train_bpe(["naïve words, and words again"], 280)
    text = "naïve words again, naïve words"
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
    stream = Stream(ids, tokenizer.eos_id, byte_lengths=tokenizer.byte_lengths())
    uniform = lambda params, batch: {  # noqa: E731
        "ce_sum": batch["loss_weights"].sum() * math.log(280)
    }
    score = evaluate(uniform, params, mesh, stream, seq_len=8, stride=3, batch_rows=2)
    assert (score.n_tokens, score.n_bytes) == (len(ids), len(text.encode()))
    expected = math.log2(280) * len(ids) / len(text.encode())
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert score.ppl == pytest.approx(280, rel=1e-5)
    assert dataclasses.replace(score, n_bytes=None).bits_per_byte is None
    assert dataclasses.replace(score, nats=1e6).ppl == math.inf


def test_documents_that_training_masks_are_scored_apart(tmp_path, mesh, model, params, eval_step):
    """Inside a masked document, tokens score as if it stood alone."""
    documents = [np.append(TEXT[i : i + 5] % (VOCAB - 4) + 4, EOS) for i in range(0, 30, 5)]
    write_documents(tmp_path / "text.npy", documents, "uint8")
    alone = sum(by_hand(model, params, d[:6], SEQ) for d in documents)
    for mask in ("eos", "boundaries"):
        c = dataclasses.replace(
            cfg(document_mask=mask),
            eval=config.EvalConfig(paths=(str(tmp_path / "text.npy"),), stride=8, batch_rows=2),
        )
        stream = dataclasses.replace(evaluator_of(c, mesh).streams["text"], eos_id=None)

        def score_inner(params, batch):
            weights = batch["loss_weights"] * (batch["tokens"] != EOS)  # no first tokens
            return eval_step(params, batch | {"loss_weights": weights})

        score = evaluate(score_inner, params, mesh, stream, seq_len=64, batch_rows=2)
        assert score.nats == pytest.approx(alone, rel=2e-6)


def test_files_are_scored_by_name_with_metrics_of_olmo_core(tmp_path, mesh, params):
    tokenizer = Tokenizer.train_bpe(["a"], 257)
    tokenizer.save(tmp_path / "tokenizer.json")
    for name, text in (("c4", TEXT[:40] % VOCAB), ("wiki", TEXT[40:90] % VOCAB)):
        text.astype(np.uint8).tofile(tmp_path / f"{name}.npy")
    options = config.EvalConfig(paths=("*.npy",), seq_len=SEQ, stride=8, batch_rows=2, max_rows=1)
    data = {"root": str(tmp_path), "tokenizer": str(tmp_path / "tokenizer.json")}
    evaluator = evaluator_of(dataclasses.replace(cfg(**data), eval=options), mesh)
    found = evaluator(params, Budget(None, lambda: None))
    assert list(found) == [
        f"eval/lm/{label}/{name}" for label in ("c4", "wiki") for name in ("CE loss", "PPL", "BPB")
    ]
    scores = evaluator.scores(params)
    assert [score.n_tokens for score in scores.values()] == [40, 50]
    assert found["eval/lm/c4/CE loss"] == scores["c4"].ce
    assert found["eval/lm/wiki/BPB"] == scores["wiki"].bits_per_byte
    assert scores["c4"].n_bytes == np.count_nonzero(TEXT[:40] % VOCAB)  # id 0 is its EOS
    cheap = evaluator.scores(params, max_rows=1)
    assert [score.n_tokens for score in cheap.values()] == [SEQ, SEQ]


def test_problems_are_named(tmp_path, mesh):
    with pytest.raises(ValueError, match=r"config.eval.stride=17: need 1 to seq_len=16"):
        evaluate(Recorder(), None, mesh, Stream(TEXT), seq_len=SEQ, stride=17)
    with pytest.raises(ValueError, match=r"1 tokens hold nothing to score"):
        evaluate(Recorder(), None, mesh, Stream(TEXT[:1]), seq_len=SEQ)
    (tmp_path / "a").mkdir()
    for path, ids in (("a/x.npy", [1]), ("x.npy", [1]), ("bad.npy", [1, VOCAB])):
        np.array(ids, np.uint8).tofile(tmp_path / path)

    def open_files(*names):
        paths = tuple(str(tmp_path / name) for name in names)
        return evaluator_of(dataclasses.replace(cfg(), eval=config.EvalConfig(paths=paths)), mesh)

    with pytest.raises(FileNotFoundError, match=r"config.eval.paths: .*nowhere.npy"):
        open_files("nowhere.npy")
    with pytest.raises(ValueError, match=r"config.eval.paths: .*bad.npy has id 97 at token 1"):
        open_files("bad.npy")
    with pytest.raises(ValueError, match=r"config.eval.paths: two files are called x"):
        open_files("x.npy", "a/x.npy")


@pytest.mark.parametrize("mask", ["none", "boundaries"])
def test_a_held_out_file_without_anything_to_score_is_refused_at_start(tmp_path, mesh, mask):
    for name, n in (("one", 1), ("two", 2)):
        documents.write_documents(tmp_path / f"{name}.npy", [[5] * n], "uint8")

    def open_files(*names, eos_id=None):
        paths = config.EvalConfig(paths=tuple(str(tmp_path / name) for name in names))
        return evaluator_of(
            dataclasses.replace(cfg(eos_id=eos_id, document_mask=mask), eval=paths), mesh
        )

    message = (
        f"config.eval.paths: {tmp_path}/one.npy has one token and nothing to score: the first one"
        " needs config.data.eos_id before it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_files("two.npy", "one.npy")
    for eos_id, names in ((EOS, ("one.npy", "two.npy")), (None, ("two.npy",))):
        opened = open_files(*names, eos_id=eos_id)
        for stream in opened.streams.values():  # the fewest tokens, rows and columns that may be
            for options in ({"seq_len": 1}, {"seq_len": SEQ, "stride": 1, "max_rows": 1}):
                score = evaluate(Recorder(), None, mesh, stream, **options)
                assert score.n_tokens == stream.n_targets


def test_held_out_files_of_another_type_are_refused_unless_they_are_to_be_read(tmp_path, mesh):
    documents.write_documents(tmp_path / "x.npy", [range(1, 97)], "uint16")
    paths = config.EvalConfig(paths=(str(tmp_path / "x.npy"),))
    with pytest.raises(ValueError, match=r"config\.eval\.paths: in .*x\.npy every second id is 0"):
        evaluator_of(dataclasses.replace(cfg(), eval=paths), mesh)
    read = evaluator_of(dataclasses.replace(cfg(check_dtype=False), eval=paths), mesh)
    assert len(read.streams["x"].tokens) == 192
    documents.write_documents(tmp_path / "x.npy", [range(1, 97)], "uint8")
    np.arange(1, 96, dtype=np.uint8).tofile(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"eval\.paths: .*x\.csv\.gz ends at token 96, but .* 95 "):
        evaluator_of(dataclasses.replace(cfg(), eval=paths), mesh)
