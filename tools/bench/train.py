"""A training step of a small OLMo 2 on one CPU core, ours beside Hugging Face with PyTorch.

Run:   python tools/bench/train.py [--repeats=5] [--core=0] [--sides=ours,eager,compiled]
Each side is a process of its own, pinned to the same core, fp32, with the same shapes, optimizer
(AdamW, clipping) and tokens; only one of them works at a time, in turns. Prints tokens per
CPU-second, medians over the turns, the losses, and our speed in terms of the others'.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

BATCH, SEQ, VOCAB = 4, 512, 32_000
D_MODEL, N_LAYERS, N_HEADS, D_FF = 512, 8, 8, 2048
LR, CLIP, DECAY = 1e-4, 1.0, 0.1
STEPS = 3  # in each turn


def batches() -> Iterator:
    """Token ids `[BATCH, SEQ]` for ever, the same ones on each side."""
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, VOCAB, (BATCH, SEQ)).astype(np.int32)


def ours() -> Callable[[], float]:
    """One training step of olmo_jax, as a function that returns the loss."""
    import jax
    import numpy as np

    from olmo_jax.config.data import FixedLength
    from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig
    from olmo_jax.config.run import Config
    from olmo_jax.config.training import OptimConfig
    from olmo_jax.nn.transformer import Transformer
    from olmo_jax.parallel import sharding
    from olmo_jax.training import losses, step
    from olmo_jax.training.state import init_state

    config = Config(
        model=ModelConfig(
            vocab_size=VOCAB, d_model=D_MODEL, n_layers=N_LAYERS, n_heads=N_HEADS,
            n_kv_heads=N_HEADS, head_dim=D_MODEL // N_HEADS, d_ff=D_FF, max_seq_len=SEQ,
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        data=FixedLength(seq_len=SEQ, global_batch_size=BATCH * SEQ),
        mesh=MeshConfig(fsdp=1),
        optim=OptimConfig(name="adamw", weight_decay=DECAY),
    )  # fmt: skip
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    m, t, o = config.model, config.train, config.optim
    state = init_state(m, o, mesh, t.seed)
    objective = losses.next_token(m, config.compute, t)
    update = step.make_update(objective, Transformer(m, config.compute), t, o, mesh)
    weights = np.ones((BATCH, SEQ), np.float32)
    weights[:, -1] = 0
    rows = batches()

    def run() -> float:
        nonlocal state
        tokens = next(rows)
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}
        arrays = sharding.to_global(batch, mesh, BATCH)
        state, report = update(state, arrays, np.float32(LR), np.float32(CLIP))
        jax.block_until_ready(state)
        return float(report.loss)

    return run


def hugging_face(is_compiled: bool) -> Callable[[], float]:
    """The same of Hugging Face and PyTorch: SDPA attention, fused AdamW, eager or compiled."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, max_position_embeddings=SEQ, pad_token_id=1, eos_token_id=2,
        rms_norm_eps=1e-6, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Olmo2ForCausalLM._from_config(config, attn_implementation="sdpa").train()
    forward = torch.compile(model, dynamic=False) if is_compiled else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )
    rows = batches()

    def run() -> float:
        tokens = torch.from_numpy(next(rows)).long()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


SIDES = {
    "ours": ours,
    "eager": lambda: hugging_face(False),
    "compiled": lambda: hugging_face(True),
}


def work(side: str) -> None:
    """Answer each line of the standard input with one turn's CPU-seconds, as JSON."""
    run = SIDES[side]()
    first = [run() for _ in range(2)]  # compiles
    print(json.dumps({"losses": first}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        losses = [run() for _ in range(STEPS)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall, "losses": losses}), flush=True)


def start(side: str, core: int) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # on every side; see Makefile
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, f"--worker={side}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # before any library counts cores
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--sides", default="ours,eager,compiled")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    sides = args.sides.split(",")
    workers = {}
    for side in sides:
        workers[side] = start(side, args.core)
        losses = json.loads(workers[side].stdout.readline())["losses"]
        print(f"{side:9} first losses {losses[0]:.3f} {losses[1]:.3f}", flush=True)
    speed: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            turn = json.loads(worker.stdout.readline())
            speed[side].append(BATCH * SEQ * STEPS / turn["cpu"])
        print("  ".join(f"{side} {values[-1]:.0f}" for side, values in speed.items()), flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for side, values in speed.items():
        print(
            f"{side:9} {statistics.median(values):6.0f} tokens per CPU-second"
            f" ({min(values):.0f} to {max(values):.0f})"
        )
    for side in sides:
        if side != "ours" and "ours" in sides:
            ratios = [a / b for a, b in zip(speed["ours"], speed[side], strict=True)]
            print(f"ours / {side}: {statistics.median(ratios):.2f}")
    return None


if __name__ == "__main__":
    main()
