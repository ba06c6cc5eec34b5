"""Attention for NVIDIA's Hopper GPUs in Pallas (Mosaic GPU): a kernel forward, two backward.

It has never run on a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from olmo_jax.kernels import pallas_gpu_body as body
from olmo_jax.kernels import schedule
from olmo_jax.kernels.pallas_gpu_body import AXES, F32, WARPGROUP, WORKERS, Kind, Sizes


class Tuning(NamedTuple):
    """Sizes of the three kernels."""

    forward: Sizes = Sizes(64, 128, 2)
    d_queries: Sizes = Sizes(64, 128, 2)
    d_keys: Sizes = Sizes(64, 64, 2)


def forward(q, k, v, ids=None, *, window, tuning=Tuning(), interpret=None):
    batch, seq, heads, _ = q.shape
    sizes = tuning.forward
    q, k, v, ids = _pad((q, k, v, ids), max(WORKERS * sizes.own, sizes.met))
    ranges = schedule.ranges(
        q.shape[1], WORKERS * sizes.own, sizes.met, by="q", window=window, ids=ids
    )
    kind = Kind(window, ids is not None, heads // k.shape[2], interpret is not None)
    own, ring = _Shared(WORKERS, sizes.own, q, ids), _Shared(sizes.slots, sizes.met, q, ids)
    out, lse = _call(
        functools.partial(body.forward, sizes=sizes, kind=kind),
        (q, k, v, ranges, ids),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, q.shape[1]), F32)],
        [
            own.matrix(), own.ids(), own.row(), ring.matrix(), ring.matrix(), ring.ids(),
            own.ready(1), ring.ready(1), ring.ready(1, False), ring.free(), ring.free(),
            plgpu.Barrier(num_arrivals=WORKERS),
        ],
        (batch, heads, ranges.shape[1]), interpret)
    return out[:, :seq], lse[..., :seq]


def backward(q, k, v, ids, lse, delta, d_out, *, window, tuning=Tuning(), interpret=None):
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    kind = Kind(window, ids is not None, heads // k.shape[2], interpret is not None)
    a, b = tuning.d_queries, tuning.d_keys
    unit = max(WORKERS * a.own, a.met, WORKERS * b.own, b.met)
    q, k, v, d_out, ids = _pad((q, k, v, d_out, ids), unit)
    lse, delta = (jnp.pad(x, [(0, 0), (0, 0), (0, q.shape[1] - seq)]) for x in (lse, delta))
    ranges = schedule.ranges(q.shape[1], WORKERS * a.own, a.met, by="q", window=window, ids=ids)
    own, ring = _Shared(WORKERS, a.own, q, ids), _Shared(a.slots, a.met, q, ids)
    (dq,) = _call(
        functools.partial(body.d_queries, sizes=a, kind=kind),
        (q, k, v, d_out, lse, delta, ranges, ids), [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        [own.matrix(), own.matrix(), own.row(), own.row(), own.ids(), ring.matrix(), ring.matrix(), ring.ids(),
         own.ready(4), ring.ready(2), ring.free()],
        (batch, heads, ranges.shape[1]), interpret)
    ranges = schedule.ranges(q.shape[1], b.met, WORKERS * b.own, by="kv", window=window, ids=ids)
    own, ring = _Shared(WORKERS, b.own, q, ids), _Shared(b.slots, b.met, q, ids)
    dk, dv = _call(
        functools.partial(body.d_keys_and_values, sizes=b, kind=kind),
        (q, k, v, d_out, lse, delta, ranges, ids), [jax.ShapeDtypeStruct(k.shape, q.dtype)] * 2,
        [own.matrix(), own.matrix(), own.ids(), ring.matrix(), ring.matrix(), ring.row(), ring.row(), ring.ids(),
         own.ready(2), ring.ready(4), ring.free()],
        (batch, kv_heads, ranges.shape[1]), interpret)
    return dq[:, :seq], dk[:, :seq], dv[:, :seq]


class _Shared(NamedTuple):
    n: int
    positions: int
    like: Any
    has: Any

    def matrix(self):
        return plgpu.SMEM(
            (self.n, self.positions, self.like.shape[3]), self.like.dtype,
            transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
        )
    def row(self):
        return plgpu.SMEM((self.n, self.positions), F32)
    def ids(self):
        return None if self.has is None else plgpu.SMEM((self.n, self.positions), jnp.int32)
    def ready(self, n, with_ids=True):
        return plgpu.Barrier(num_arrivals=n+ (with_ids and self.has is not None), num_barriers=self.n)
    def free(self):
        return plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.n)


def _call(kernel, operands, out, scratch, grid, interpret):
    import os
    sem = getattr(plgpu.LoweringSemantics, os.environ.get("SEM", "Lane"))
    options = {} if interpret is None else dict(interpret=interpret)
    return plgpu.kernel(
        kernel, out_type=out, scratch_types=scratch, grid=grid, grid_names=AXES,
        num_threads=WORKERS + 1, thread_name=WARPGROUP,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=sem), **options,
    )(*operands)


def _pad(arrays: tuple[jax.Array | None, ...], unit: int) -> list[Any]:
    def pad(x):
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, -x.shape[1] % unit)
        return jnp.pad(x, widths, mode="constant" if x.ndim > 2 else "edge")

    return [None if x is None else pad(x) for x in arrays]
