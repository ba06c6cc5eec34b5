"""Attention on a GPU: milliseconds and TFLOP/s of each implementation that runs on this one.

Run:   python tools/bench/attention_gpu.py [--masks=causal,window,documents]
         [--sides=pallas,cudnn,blocked,torch] [--seq=8192] [--batch=1] [--heads=32] [--kv_heads=32]
         [--dim=128] [--window=4096] [--documents=8] [--repeats=5] [--calls=20]
Needs: an NVIDIA GPU; for the side `torch` (scaled_dot_product_attention) PyTorch with CUDA. On
       another machine `--sides=blocked` shows that the program runs.

A measurement is the mean of `calls` calls in a row; of `repeats` of them, the sides taking turns,
it prints the median and the range. FLOPs are those of visible pairs alone: 4 · head_dim forward for
each pair and head, 2.5 times that backward. bf16. A side that cannot do a mask says why.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too


def document_ids(args: argparse.Namespace) -> np.ndarray:
    """[batch, seq] int32: documents of unequal lengths, the same ones in each row."""
    inside = np.arange(1, args.seq)
    ends = np.sort(np.random.default_rng(0).choice(inside, args.documents - 1, replace=False))
    ids = np.searchsorted(ends, np.arange(args.seq), side="right").astype(np.int32)
    return np.tile(ids, (args.batch, 1))


def visible_pairs(args: argparse.Namespace, mask: str) -> int:
    """Of one head and row."""
    query = np.arange(args.seq)
    first = np.zeros_like(query)
    if mask == "window":
        first = np.maximum(query - args.window + 1, 0)
    if mask == "documents":
        ids = document_ids(args)[0]
        first = np.searchsorted(ids, ids)
    return int((query - first + 1).sum())


def arrays(args: argparse.Namespace) -> list[np.ndarray]:
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(0)
    heads = args.heads, args.kv_heads, args.kv_heads, args.heads
    shapes = [(args.batch, args.seq, n, args.dim) for n in heads]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def of_jax(args: argparse.Namespace, side: str, mask: str) -> list[Callable[[], Any]]:
    """Calls forward and backward, which return when the GPU is done with the last of them."""
    import jax
    import jax.numpy as jnp

    from olmo_jax.kernels.attention import attention

    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays(args))
    ids = jnp.asarray(document_ids(args)) if mask == "documents" else None
    window = args.window if mask == "window" else None
    run = jax.jit(functools.partial(attention, window=window, segment_ids=ids, impl=side))
    _, pull = jax.vjp(run, q, k, v)
    back = jax.jit(lambda pull, d_out: pull(d_out))

    def repeated(call):
        jax.block_until_ready([call() for _ in range(args.calls)][-1])

    return [
        functools.partial(repeated, lambda: run(q, k, v)),
        functools.partial(repeated, lambda: back(pull, d_out)),
    ]


def of_torch(args: argparse.Namespace, mask: str) -> list[Callable[[], Any]]:
    """The same of PyTorch."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("this PyTorch has no CUDA")
    if mask != "causal":
        raise NotImplementedError("scaled_dot_product_attention has no such mask but as an array")
    q, k, v, d_out = (
        torch.tensor(x, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for x in arrays(args)
    )
    for x in (q, k, v):
        x.requires_grad_()
    run = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v,
        is_causal=True, enable_gqa=args.heads != args.kv_heads,
    )  # fmt: skip
    out = run()

    def repeated(call):
        for _ in range(args.calls):
            call()
        torch.cuda.synchronize()

    def back():
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return [functools.partial(repeated, run), functools.partial(repeated, back)]


def main() -> None:
    """Measure each mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", default="causal,window,documents")
    parser.add_argument("--sides", default="pallas,cudnn,blocked,torch")
    for name, value in (
        ("seq", 8192), ("batch", 1), ("heads", 32), ("kv_heads", 32), ("dim", 128),
        ("window", 4096), ("documents", 8), ("repeats", 5), ("calls", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    import jax

    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for mask in args.masks.split(","):
        useful = visible_pairs(args, mask) * 4 * args.dim * args.heads * args.batch
        sides: dict[str, list[Callable[[], Any]]] = {}
        for side in args.sides.split(","):
            try:
                calls = of_torch(args, mask) if side == "torch" else of_jax(args, side, mask)
                for call in calls:  # compiles, and warms up
                    call()
                sides[side] = calls
            except (NotImplementedError, ImportError) as error:
                print(f"{mask:9} {side:8} {error}")
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.repeats):
            for side, calls in sides.items():
                for i, call in enumerate(calls):
                    start = time.perf_counter()
                    call()
                    spent = (time.perf_counter() - start) / args.calls
                    times.setdefault((side, i), []).append(spent)
        for (side, i), spent in times.items():
            way, flops = (("forward", useful), ("backward", 2.5 * useful))[i]
            middle = statistics.median(spent)
            print(
                f"{mask:9} {side:8} {way:8} {middle * 1e3:8.3f} ms"
                f" ({min(spent) * 1e3:.3f} to {max(spent) * 1e3:.3f}),"
                f" {flops / middle / 1e12:6.1f} TFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
