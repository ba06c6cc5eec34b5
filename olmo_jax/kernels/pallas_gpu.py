"""Attention for NVIDIA's Hopper GPUs in Pallas (Mosaic GPU): one kernel forward, two backward.

**It has not run on a GPU yet**, so it is there by its name only. NVIDIA's compiler takes it for an
H100, and its numbers are compared in JAX's interpreter, which keeps no sums in registers.

Forward, two warpgroups of a block have 64 queries each and meet the keys with a running maximum,
one of them in the tensor cores while the other takes exponentials (FlashAttention-3, arXiv
2407.08608). Backward, one kernel walks over keys for dq, another one over the queries of all heads
of a group for dk and dv: seven products where five would do, but no sums in global memory, and the
same bits each time. Blocks without anything visible are not visited, blocks that are visible as a
whole are not masked.

Arrays stay `[batch, seq, heads, head_dim]`; the logsumexp is `[batch, heads, seq]`, to the base 2.
Lengths are padded to whole blocks; causality hides what is behind the end. Every device of a mesh
has its own rows and heads.

JAX's own kernel refuses causal masks with CUDA 12.8.0 to 12.9.0, whose ptxas miscompiles them. Use
another one here too.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu

from olmo_jax.kernels import pallas_gpu_body as body
from olmo_jax.kernels import schedule
from olmo_jax.kernels.pallas_gpu_body import AXES, F32, WARPGROUP, WORKERS, Kind, Sizes
from olmo_jax.parallel.sharding import Axes, on_each_device

SWIZZLE = 128  # bytes, the width of a tile of shared memory
TILE = 64  # heads are padded to tiles ...
MAX_HEAD_DIM = 128  # ... wider ones need too many registers
DTYPES = ("bfloat16", "float16")


class GpuTuning(NamedTuple):
    """Sizes for each kernel: what fits into shared memory and registers. Not tuned yet."""

    forward: Sizes = Sizes(64, 128, 2)
    d_queries: Sizes = Sizes(64, 64, 3)
    d_keys: Sizes = Sizes(64, 64, 3)


TUNING = GpuTuning()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    tuning: GpuTuning = TUNING,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention on a Hopper GPU; see `kernels.attention.attention` for the contract.

    bf16 or fp16, heads of up to MAX_HEAD_DIM. `interpret` (`InterpretGPUParams` of JAX 0.12) runs
    the kernels on any platform, slowly: for tests.
    """
    return _forward(q, k, v, segment_ids, window, scale, tuning, interpret)[0]


def _forward(q, k, v, segment_ids, window, scale, tuning, interpret):
    options = dict(window=window, scale=scale, tuning=tuning, interpret=interpret)
    run = functools.partial(forward, **options)
    into = (_OF_Q, _OF_KV, _OF_KV, _IDS)
    out, lse = on_each_device(run, into, (_OF_Q, _ROW), q, k, v, segment_ids)
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(window, scale, tuning, interpret, residuals, d_out):
    def run(q, k, v, ids, out, lse, d_out):
        delta = jnp.einsum("bsnh,bsnh->bns", d_out, out, preferred_element_type=F32)
        options = dict(window=window, scale=scale, tuning=tuning, interpret=interpret)
        return backward(q, k, v, ids, lse, delta, d_out, **options)

    into = (_OF_Q, _OF_KV, _OF_KV, _IDS, _OF_Q, _ROW, _OF_Q)
    return *on_each_device(run, into, (_OF_Q, _OF_KV, _OF_KV), *residuals, d_out), None


attention.defvjp(_forward, _backward)

_OF_Q: Axes = ("batch", None, "heads", None)
_OF_KV: Axes = ("batch", None, "kv_heads", None)
_IDS: Axes = ("batch", None)
_ROW: Axes = ("batch", "heads", None)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: jax.Array | None = None,
    *,
    window: int | None,
    scale: float,
    tuning: GpuTuning = TUNING,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp.

    Args:
      q: [batch, seq, heads, head_dim].
      k, v: [batch, seq, kv_heads, head_dim].
      ids: [batch, seq] int32, equal within a document; or None.
      window: positions visible to the left, the own one included; None for all.
      scale: of the scores.
      tuning: sizes.
      interpret: None, or `InterpretGPUParams`.

    Returns: `[batch, seq, heads, head_dim]` in the dtype of q, and `[batch, heads, seq]` fp32, to
      the base 2.
    """
    (batch, seq, heads, dim), sizes = q.shape, tuning.forward
    kind = _kind(q, k, ids, window, scale, interpret)
    q, k, v, ids = _pad(seq, (sizes,), q, k, v, ids)
    own, ring = _Shared(WORKERS, sizes.own, q, ids), _Shared(sizes.slots, sizes.met, q, ids)
    out, lse = _call(
        "attention_forward",
        functools.partial(body.forward, sizes=sizes, kind=kind),
        (q, k, v, _ranges("q", q, sizes, kind.window, ids), ids),
        [q, jax.ShapeDtypeStruct((batch, heads, q.shape[1]), F32)],
        (
            *(own.matrix(), own.ids(), own.row(), ring.matrix(), ring.matrix(), ring.ids()),
            *(own.ready(1), ring.ready(1), ring.ready(1, with_ids=False), ring.free(), ring.free()),
            plgpu.Barrier(num_arrivals=WORKERS),
        ),
        (batch, heads, q.shape[1] // (WORKERS * sizes.own)),
        interpret,
    )
    return out[:, :seq, :, :dim], lse[:, :, :seq]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    window: int | None,
    scale: float,
    tuning: GpuTuning = TUNING,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v, in their dtypes.

    Args: as of `forward`, and
      lse: [batch, heads, seq], as it returns it.
      delta: [batch, heads, seq] fp32, the products of output and its gradient, summed.
      d_out: [batch, seq, heads, head_dim].
    """
    (batch, seq, heads, dim), kv_heads = q.shape, k.shape[2]
    kind = _kind(q, k, ids, window, scale, interpret)
    q, k, v, d_out, ids = _pad(seq, tuning[1:], q, k, v, d_out, ids)
    lse, delta = (jnp.pad(x, [(0, 0), (0, 0), (0, q.shape[1] - seq)]) for x in (lse, delta))
    arrays = q, k, v, d_out, lse, delta

    sizes = tuning.d_queries
    own, ring = _Shared(WORKERS, sizes.own, q, ids), _Shared(sizes.slots, sizes.met, q, ids)
    (dq,) = _call(
        "attention_d_queries",
        functools.partial(body.d_queries, sizes=sizes, kind=kind),
        (*arrays, _ranges("q", q, sizes, kind.window, ids), ids),
        [q],
        (
            *(own.matrix(), own.matrix(), own.row(), own.row(), own.ids()),
            *(ring.matrix(), ring.matrix(), ring.ids()),
            *(own.ready(4), ring.ready(2), ring.free()),
        ),
        (batch, heads, q.shape[1] // (WORKERS * sizes.own)),
        interpret,
    )
    sizes = tuning.d_keys
    own, ring = _Shared(WORKERS, sizes.own, q, ids), _Shared(sizes.slots, sizes.met, q, ids)
    dk, dv = _call(
        "attention_d_keys",
        functools.partial(body.d_keys_and_values, sizes=sizes, kind=kind),
        (*arrays, _ranges("kv", q, sizes, kind.window, ids), ids),
        [k, v],
        (
            *(own.matrix(), own.matrix(), own.ids()),
            *(ring.matrix(), ring.matrix(), ring.row(), ring.row(), ring.ids()),
            *(own.ready(2), ring.ready(4), ring.free()),
        ),
        (batch, kv_heads, q.shape[1] // (WORKERS * sizes.own)),
        interpret,
    )
    return tuple(x[:, :seq, :, :dim] for x in (dq, dk, dv))


def obstacle(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Why the kernels cannot compute this on a GPU, in words; None if they can."""
    if not re.search(r"NVIDIA G?H\d+", device.device_kind):
        return f"a TPU or a Hopper GPU (H100, H200) is needed, this is {device.device_kind}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"{' or '.join(DTYPES)} is needed, this is {jnp.dtype(dtype).name}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is more than {MAX_HEAD_DIM}"
    return None


def _kind(q: jax.Array, k: jax.Array, ids: Any, window: Any, scale: float, interpret: Any) -> Kind:
    window = None if window is None or window >= q.shape[1] else window
    group = q.shape[2] // k.shape[2]
    return Kind(window, ids is not None, group, scale, interpret is not None)


class _Shared(NamedTuple):
    """What a kernel has in shared memory: for each warpgroup, or for each slot of the ring."""

    n: int
    positions: int
    like: jax.Array
    has_ids: jax.Array | None

    def matrix(self) -> Any:
        shape = (self.n, self.positions, self.like.shape[3])
        tile = plgpu.TilingTransform((8, SWIZZLE // self.like.dtype.itemsize))
        transforms = (tile, plgpu.SwizzleTransform(SWIZZLE))
        return plgpu.SMEM(shape, self.like.dtype, transforms=transforms)

    def row(self) -> Any:
        return plgpu.SMEM((self.n, self.positions), F32)

    def ids(self) -> Any:
        return None if self.has_ids is None else plgpu.SMEM((self.n, self.positions), jnp.int32)

    def ready(self, copies: int, with_ids: bool = True) -> Any:
        copies += with_ids and self.has_ids is not None
        return plgpu.Barrier(num_arrivals=copies, num_barriers=self.n)

    def free(self) -> Any:
        return plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.n)


def _call(name, kernel, operands, results, scratch, grid, interpret):
    options = {} if interpret is None else dict(interpret=interpret)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        scratch_types=scratch,
        grid=grid,
        grid_names=AXES,
        num_threads=WORKERS + 1,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(*operands)


def _ranges(by: str, q: jax.Array, sizes: Sizes, window: int | None, ids: Any) -> Any:
    own, met = WORKERS * sizes.own, sizes.met
    q_block, kv_block = (own, met) if by == "q" else (met, own)
    return schedule.ranges(q.shape[1], q_block, kv_block, by=by, window=window, ids=ids)


def _pad(seq: int, sizes: tuple[Sizes, ...], *arrays: jax.Array | None) -> list[Any]:
    """Arrays `[batch, seq, heads, head_dim]` and ids `[batch, seq]`, to whole blocks and tiles."""
    unit = max(max(WORKERS * x.own, x.met) for x in sizes)

    def pad(x):
        if x.ndim == 2:
            return jnp.pad(x, [(0, 0), (0, -seq % unit)], mode="edge")
        return jnp.pad(x, [(0, 0), (0, -seq % unit), (0, 0), (0, -x.shape[3] % TILE)])

    return [None if x is None else pad(x) for x in arrays]
