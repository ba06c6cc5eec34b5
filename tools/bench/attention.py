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
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

# Topology, chips per host, cycles per ns, cores that share the heads, bf16 TFLOP/s, name.
CHIPS = {
    "v5e": ("v5e:1x1", (1, 1, 1), 1.5, 1, 197, "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", None, 1.75, 2, 459, "TPU v5"),
    "v6e": ("v6e:1x1", (1, 1, 1), 1.75, 1, 918, "TPU v6 lite"),
}
WINDOW, DIM = 4096, 128
KERNELS = {  # parts of the names of their dumps
    "ours": ("attention_forward", "attention_backward"),
    "splash": ("splash_mha_fwd", "splash_mha_dkv"),
    "tokamax": ("splash_mha_fwd", "splash_mha_dkv"),
}
SMALL = 48  # branches of fewer bundles are counted as always taken
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def document_ids(seq: int, n: int) -> np.ndarray:
    """[1, seq] int32: n documents of unequal lengths."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, seq), n - 1, replace=False))
    return np.searchsorted(ends, np.arange(seq), side="right")[None].astype(np.int32)


def compile_side(args: argparse.Namespace) -> None:
    """In a process of its own, whose environment asks the compiler for its schedule."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from olmo_jax.config import MeshConfig
    from olmo_jax.sharding import make_mesh

    topology, bounds, *_ = CHIPS[args.chips]
    options = {} if bounds is None else dict(chips_per_host_bounds=bounds)
    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    mesh = make_mesh(MeshConfig(), chip.devices[:1])
    whole = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((args.heads, args.seq, DIM), jnp.bfloat16, sharding=whole)
    ids = jax.ShapeDtypeStruct((1, args.seq), jnp.int32, sharding=whole)
    if args.masks != "documents":
        ids = None
    window = WINDOW if args.masks == "window" else None
    run = our_kernels(args, window) if args.sides == "ours" else their_kernels(args, window)
    with jax.set_mesh(mesh):

        def both(q, k, v, ids, d_out):
            out, pull = jax.vjp(lambda q, k, v: run(q, k, v, ids), q, k, v)
            return out, pull(d_out)

        # Room for large blocks of splash; ours ask for it themselves.
        room = {"xla_tpu_scoped_vmem_limit_kib": "61440"}
        jax.jit(both).lower(x, x, x, ids, x).compile(compiler_options=room)


def our_kernels(args: argparse.Namespace, window: int | None) -> Any:
    import jax.numpy as jnp

    from olmo_jax.kernels import pallas_tpu

    tuning = our_tuning(args, args.masks == "documents")

    def run(q, k, v, ids):
        q, k, v = (jnp.swapaxes(x, 0, 1)[None] for x in (q, k, v))
        out = pallas_tpu.attention(q, k, v, ids, window, tuning)
        return jnp.swapaxes(out[0], 0, 1)

    return run


def our_tuning(args: argparse.Namespace, has_documents: bool) -> Any:
    """As the kernel chooses it, but for sizes that were asked for."""
    import jax

    from olmo_jax.kernels import pallas_tpu
    from olmo_jax.kernels.schedule import Blocks

    # Of the chip in question only the name matters here.
    chip = jax.sharding.AbstractDevice(CHIPS[args.chips][5], 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        tuning = pallas_tpu.tuning(DIM, "bfloat16", has_documents)
    asked = {way: Blocks(*sizes(x)) for way in ("forward", "backward") if (x := getattr(args, way))}
    return tuning._replace(**asked)


def their_kernels(args: argparse.Namespace, window: int | None) -> Any:
    shape, (q, kv, chunk) = (args.seq, args.seq), sizes(args.splash)
    blocks = dict(
        block_q=q, block_kv=kv, block_kv_compute=chunk,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=chunk, use_fused_bwd_kernel=True,
    )  # fmt: skip
    if args.sides == "tokamax":
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
            mask.MultiHeadMask([one] * args.heads), block_sizes=kernel.BlockSizes(**blocks)
        )

    def call(q, k, v, ids):
        segments = None if ids is None else kernel.SegmentIds(ids[0], ids[0])
        return run(q * DIM**-0.5, k, v, segment_ids=segments)

    return call


def branches(path: str) -> tuple[list[tuple[int, bool]], int]:
    """What a step of a kernel's grid does: (bundles, whether it has products) of each branch, in
    order, and the bundles that are always passed."""
    products, jumps = [], []
    for line in pathlib.Path(path).read_text().splitlines():
        if not (found := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line)):
            continue
        here = int(found[1], 16)
        if "vmatmul" in line or "vmatpush" in line:
            products.append(here)
        if to := re.search(r"sbr\.rel.*?target bundleno = (\d+)", line):
            jumps.append((here, int(to[1])))
    start, stop = max(((to, at) for at, to in jumps if to <= at), key=lambda x: x[1] - x[0])
    inside = sorted((at, to) for at, to in jumps if start <= at < to <= stop)
    length = stop - start
    while (top := outermost(inside)) and (wide := [x for x in top if x[1] - x[0] > 0.9 * length]):
        inside.remove(wide[0])
    taken = [(to - at, any(at < p < to for p in products)) for at, to in outermost(inside)]
    taken = [x for x in taken if x[0] >= SMALL]
    return taken, length - sum(n for n, _ in taken)


def outermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at, to in sorted(spans, key=lambda x: (x[0], -x[1])):
        if not found or at >= found[-1][1]:
            found.append((at, to))
    return found


def visible_pairs(args: argparse.Namespace, mask: str) -> int:
    query = np.arange(args.seq)
    first = np.zeros_like(query)
    if mask == "window":
        first = np.maximum(query - WINDOW + 1, 0)
    if mask == "documents":
        ids = document_ids(args.seq, args.documents)[0]
        first = np.searchsorted(ids, ids)
    return int((query - first + 1).sum())


def counts(args: argparse.Namespace, side: str, mask: str, way: str) -> tuple[list[int], int]:
    """How often each branch is taken by a head, and how many steps there are."""
    window = WINDOW if mask == "window" else None
    if side == "ours":
        return our_counts(args, window, mask == "documents", way)
    q, kv, _ = sizes(args.splash)
    distance = np.arange(0, args.seq, q)[:, None] - np.arange(0, args.seq, kv)[None]
    low, high, limit = distance - kv + 1, distance + q - 1, window or args.seq
    live, full = (high >= 0) & (low < limit), (low >= 0) & (high < limit)
    rows = args.seq // (q if way == "forward" else kv)
    if side == "tokamax":
        bodies, steps = [int(full.sum()), int((live & ~full).sum())], int(live.sum())
    else:  # as many steps in each row, whether anything is visible or not, and a mask for each
        bodies, steps = [int(live.sum())], int(live.sum(1).max() * rows)
    return [rows, *bodies, rows], steps


def our_counts(
    args: argparse.Namespace, window: int | None, has_documents: bool, way: str
) -> tuple[list[int], int]:
    from olmo_jax.kernels import schedule

    blocks = getattr(our_tuning(args, has_documents), way).fit(args.seq, args.seq)
    ids = document_ids(args.seq, args.documents) if has_documents else None
    plan = schedule.make(
        args.seq, args.seq, blocks, by="q" if way == "forward" else "kv",
        window=window, q_ids=ids, kv_ids=ids,
    )  # fmt: skip
    kinds = np.asarray(schedule.kind(plan.pairs[0, : int(plan.count)]))
    n_kinds = 1 + has_documents + len(schedule.borders(blocks, window))
    bodies = [int((kinds == schedule.FULL + i).sum()) for i in range(n_kinds)]
    of_q, of_kv = args.seq // blocks.q, args.seq // blocks.kv
    ends = ([1, of_q], [of_q]) if way == "forward" else ([of_kv, of_q], [of_q, of_kv])
    return [*ends[0], *bodies, *ends[1]], len(kinds)


def milliseconds(args: argparse.Namespace, side: str, mask: str, way: str, path: str) -> float:
    taken, always = branches(path)
    times, steps = counts(args, side, mask, way)
    if args.verbose:
        print(f"  {side} {way}: branches of {taken} bundles x {times}, {always} x {steps}")
    if side != "ours":  # of the branches at the ends of a row it is enough to know their sum
        first, last = (next(i for i, b in enumerate(x) if b[1]) for x in (taken, taken[::-1]))
        before, after = (sum(n for n, _ in x) for x in (taken[:first], taken[len(taken) - last :]))
        taken = [(before, False), *taken[first : len(taken) - last], (after, False)]
    if len(taken) != len(times):
        raise SystemExit(f"{path}: {len(taken)} branches, {len(times)} expected")
    cycles = sum(n * t for (n, _), t in zip(taken, times, strict=True)) + always * steps
    _, _, rate, cores, *_ = CHIPS[args.chips]
    return cycles * args.heads / cores / rate / 1e6


def measure(args: argparse.Namespace, chip: str, mask: str, side: str) -> list[float]:
    """Milliseconds forward and backward."""
    import jax  # noqa: F401  (its absence is an error of this process, not of a child)

    args = argparse.Namespace(**vars(args) | dict(chips=chip, masks=mask, sides=side))
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
        )
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, __file__, f"--worker={json.dumps(vars(args))}"]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(f"{side} {chip} {mask}: {child.stderr.strip()[-400:]}")
        times = []
        for way, name in zip(("forward", "backward"), KERNELS[side], strict=True):
            dumps = glob.glob(f"{folder}/*{name}*packed-bundles-post-ra.txt")
            (path,) = [x for x in dumps if "schedule-analysis" not in x]
            times.append(milliseconds(args, side, mask, way, path))
    return times


def main() -> None:
    """Compile each kernel and print its estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--masks", default="causal,window,documents")
    parser.add_argument("--sides", default=",".join(KERNELS))
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--forward")
    parser.add_argument("--backward")
    parser.add_argument("--splash", default="1024,1024,512")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return compile_side(argparse.Namespace(**json.loads(args.worker)))
    os.environ |= ENVIRONMENT
    for chip in args.chips.split(","):
        for mask in args.masks.split(","):
            useful = visible_pairs(args, mask) * 4 * DIM * args.heads
            for side in args.sides.split(","):
                forward, backward = measure(args, chip, mask, side)
                peak = CHIPS[chip][4] * 1e9  # FLOP per ms
                print(
                    f"{chip} {mask:9} {side:8} forward {forward:6.3f} ms"
                    f" ({useful / forward / peak:4.0%} of peak on useful FLOPs),"
                    f" backward {backward:6.3f} ms ({2.5 * useful / backward / peak:4.0%})",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
