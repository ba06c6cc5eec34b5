"""One OLMoE layer of experts, forward and backward, on a CPU core: ours beside Hugging Face's.

Run:   python tools/bench/moe.py [--repeats=5] [--core=0] [--tokens=1024] [--sides=ours,eager,…]
d_model 2048, 64 experts of width 1024, 8 for each token, fp32, the same tokens and weights. Each
side is a process of its own, pinned to the same core; only one of them works at a time, in turns
of two runs, of which the second counts: memory that a virtual machine gave back meanwhile is slow
to get again.
The others are the `experts_implementation` choices of transformers; its `batched_mm` copies the
weights for each token, 128 MB of them, and is only for a few tokens. Prints tokens per CPU-second,
medians over the turns, the sums of outputs and gradients, and our speed in terms of the others'.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

D_MODEL, D_FF, N_EXPERTS, K = 2048, 1024, 64, 8
THEIRS = ("eager", "grouped_mm")
Run = Callable[[], tuple[float, float]]


def numbers(n_tokens: int) -> list[Any]:
    """Tokens, router, gate, up, down as NumPy arrays, the same ones on each side."""
    import numpy as np

    rng = np.random.default_rng(0)
    e, d, f = N_EXPERTS, D_MODEL, D_FF
    shapes = (1, n_tokens, d), (d, e), (e, d, f), (e, d, f), (e, f, d)
    scales = 1.0, 0.02, 0.02, 0.02, 0.02
    return [
        scale * rng.standard_normal(shape, np.float32)
        for scale, shape in zip(scales, shapes, strict=True)
    ]


def ours(n_tokens: int) -> Run:
    """Output and gradients of all weights; returns the sums of output and input gradient."""
    import jax
    import jax.numpy as jnp

    from olmo_jax.config.model import ComputeConfig, ModelConfig
    from olmo_jax.nn import moe

    config = ModelConfig(d_model=D_MODEL, d_ff=D_FF, n_experts=N_EXPERTS, n_experts_per_token=K)
    x, *weights = map(jnp.asarray, numbers(n_tokens))
    layer = moe.MoE(config, ComputeConfig(dtype="float32"))
    names = ("router", "w_gate", "w_up", "w_down")
    params = dict(zip(names, weights, strict=True))

    @jax.jit
    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            y, _ = layer.apply({"params": params}, x)
            return y.sum(), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y.sum(), grads

    def run() -> tuple[float, float]:
        y, (_, dx) = jax.block_until_ready(step(params, x))
        return float(y), float(dx.sum())

    return run


def hugging_face(implementation: str, n_tokens: int) -> Run:
    """The same of transformers' OlmoeSparseMoeBlock."""
    import torch
    import transformers
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    torch.set_num_threads(1)
    config = transformers.OlmoeConfig(
        hidden_size=D_MODEL, intermediate_size=D_FF, num_experts=N_EXPERTS, num_experts_per_tok=K,
        norm_topk_prob=False,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = OlmoeSparseMoeBlock(config)
    x, router, gate, up, down = map(torch.from_numpy, numbers(n_tokens))
    with torch.no_grad():
        block.gate.weight.copy_(router.T)
        both = torch.cat([gate.transpose(1, 2), up.transpose(1, 2)], 1)
        block.experts.gate_up_proj.copy_(both)
        block.experts.down_proj.copy_(down.transpose(1, 2))
    x.requires_grad_()

    def run() -> tuple[float, float]:
        x.grad = None
        block.zero_grad(set_to_none=True)
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        y.sum().backward()
        return y.sum().item(), x.grad.sum().item()

    return run


def work(side: str, n_tokens: int) -> None:
    """Answer each line of the standard input with one turn's CPU-seconds, as JSON."""
    run = ours(n_tokens) if side == "ours" else hugging_face(side, n_tokens)
    print(json.dumps(run()), flush=True)  # compiles
    for _ in sys.stdin:
        run()
        began = time.process_time()
        run()
        print(json.dumps(time.process_time() - began), flush=True)


def start(side: str, core: int, n_tokens: int) -> subprocess.Popen:
    """A side, waiting for its turns."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # on every side; see Makefile
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, __file__, f"--worker={side}", f"--tokens={n_tokens}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # before any library counts cores
    )


def main() -> None:
    """Run the turns and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sides", default=",".join(("ours", *THEIRS)))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.tokens)
    workers, speed = {}, {}
    for side in args.sides.split(","):
        workers[side], speed[side] = start(side, args.core, args.tokens), []
        y, dx = json.loads(workers[side].stdout.readline())
        print(f"{side:10} sum of the output {y:.3f}, of the input's gradient {dx:.3f}", flush=True)
    for _ in range(args.repeats):
        for side, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            speed[side].append(args.tokens / json.loads(worker.stdout.readline()))
        print("  ".join(f"{side} {values[-1]:.0f}" for side, values in speed.items()), flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for side, values in speed.items():
        ratios = [a / b for a, b in zip(speed["ours"], values, strict=True)]
        print(
            f"{side:10} {statistics.median(values):6.0f} tokens per CPU-second; ours is"
            f" {statistics.median(ratios):.2f}x"
        )
    return None


if __name__ == "__main__":
    main()
