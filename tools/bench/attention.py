"""Attention kernels for TPU without a TPU: cycles from the compiler's schedule, beside splash.

Run:   python tools/bench/attention.py [--chips=v5e,v5p,v6e] [--masks=causal,window,documents]
         [--sides=ours,splash,tokamax] [--seq=8192] [--heads=32] [--documents=8]
         [--forward=1024,1024,512,256] [--backward=…] [--splash=1024,1024,512]
Needs: jax[tpu]; for the side `tokamax` that package, where PYTHONPATH finds it.

Each kernel is compiled for one chip, and the compiler writes down its final bundles of
instructions: one bundle is a cycle. The bundles of each branch of a kernel's step are counted and
multiplied by how often a head takes it: once per pair of blocks of its kind, at the ends of rows,
or always. That is an estimate: it knows neither waiting for memory nor what XLA does before and
after the kernel (for splash: adding up the parts of dq), and has not been compared with a TPU.
Head dimension 128, bf16, batch 1; the cores of a chip share the heads.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # runs from a clone, installed or not

from olmo_jax.pods import kernels
from olmo_jax.pods.chips import CHIPS, ENVIRONMENT

WINDOW, DIM = 4096, 128
NAMES = ("splash_mha_fwd", "splash_mha_dkv")  # parts of the names of their dumps


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def case_of(args: argparse.Namespace, chip: str, mask: str) -> kernels.Case:
    return kernels.Case(
        chip, args.seq, args.heads, args.heads, DIM,
        WINDOW if mask == "window" else None,
        args.documents if mask == "documents" else 0,
        *(sizes(x) if x else None for x in (args.forward, args.backward)),
    )  # fmt: skip


def their_kernels(side: str, case: kernels.Case, splash: str) -> Any:
    shape, (q, kv, chunk), window = (case.seq, case.seq), sizes(splash), case.window
    blocks = dict(
        block_q=q, block_kv=kv, block_kv_compute=chunk,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=chunk, use_fused_bwd_kernel=True,
    )  # fmt: skip
    if side == "tokamax":
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from tokamax._src.ops.experimental.tpu.splash_attention import (
            splash_attention_mask as mask,
        )

        one = (
            mask.CausalMask(shape) if window is None else mask.LocalMask(shape, (window - 1, 0), 0)
        )
        run = kernel.make_splash_mha_single_device(one, config=kernel.SplashConfig(**blocks))
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as mask,
        )

        one = (
            mask.CausalMask(shape) if window is None else mask.LocalMask(shape, (window - 1, 0), 0)
        )
        run = kernel.make_splash_mha_single_device(
            mask.MultiHeadMask([one] * case.n_heads), block_sizes=kernel.BlockSizes(**blocks)
        )

    def call(q, k, v, ids):
        segments = None if ids is None else kernel.SegmentIds(ids[0], ids[0])
        return run(q * case.head_dim**-0.5, k, v, segment_ids=segments)

    return call


def visible_pairs(case: kernels.Case) -> int:
    query = np.arange(case.seq)
    first = np.zeros_like(query)
    if case.window:
        first = np.maximum(query - case.window + 1, 0)
    if case.n_documents:
        ids = case.document_ids()[0]
        first = np.searchsorted(ids, ids)
    return int((query - first + 1).sum())


def their_counts(side: str, case: kernels.Case, splash: str, way: str) -> tuple[list[int], int]:
    """How often a head takes each branch of their kernel, and how many steps there are."""
    q, kv, _ = sizes(splash)
    distance = np.arange(0, case.seq, q)[:, None] - np.arange(0, case.seq, kv)[None]
    low, high, limit = distance - kv + 1, distance + q - 1, case.window or case.seq
    live, full = (high >= 0) & (low < limit), (low >= 0) & (high < limit)
    rows = case.seq // (q if way == "forward" else kv)
    if side == "tokamax":
        bodies, steps = [int(full.sum()), int((live & ~full).sum())], int(live.sum())
    else:  # as many steps in each row, whether anything is visible or not, and a mask for each
        bodies, steps = [int(live.sum())], int(live.sum(1).max() * rows)
    return [rows, *bodies, rows], steps


def their_seconds(side: str, case: kernels.Case, splash: str) -> list[float]:
    """Forward and backward, as `kernels.seconds` of ours."""
    worker = json.dumps([side, case, splash])
    found = []
    with kernels.bundles([sys.executable, __file__, f"--worker={worker}"]) as dump:
        for way, name in zip(("forward", "backward"), NAMES, strict=True):
            (opening, bodies, closing), always = kernels.branches(dump(name))
            times, steps = their_counts(side, case, splash, way)
            # Of the branches at the ends of a row it is enough to know their sum.
            lengths = [sum(opening), *bodies, sum(closing)]
            if len(lengths) != len(times):
                raise SystemExit(f"{side} {way}: {len(lengths)} branches, {len(times)} expected")
            cycles = sum(n * t for n, t in zip(lengths, times, strict=True)) + always * steps
            found.append(kernels.per_row(case, cycles))
    return found


def main() -> None:
    """Compile each kernel and print its estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default="v5e,v5p,v6e")
    parser.add_argument("--masks", default="causal,window,documents")
    parser.add_argument("--sides", default="ours,splash,tokamax")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--forward")
    parser.add_argument("--backward")
    parser.add_argument("--splash", default="1024,1024,512")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, case, splash = json.loads(args.worker)
        case = kernels.Case(*case)
        return kernels.compile_kernels(case, their_kernels(side, case, splash))
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for chip in args.chips.split(","):
        for mask in args.masks.split(","):
            case = case_of(args, chip, mask)
            useful = visible_pairs(case) * 4 * DIM * args.heads
            for side in args.sides.split(","):
                ours = side == "ours"
                found = kernels.seconds(case) if ours else their_seconds(side, case, args.splash)
                forward, backward = (1e3 * x for x in found)
                peak = CHIPS[chip].peak / 1e3  # FLOP per ms
                print(
                    f"{chip} {mask:9} {side:8} forward {forward:6.3f} ms"
                    f" ({useful / forward / peak:4.0%} of peak on useful FLOPs),"
                    f" backward {backward:6.3f} ms ({2.5 * useful / backward / peak:4.0%})",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
