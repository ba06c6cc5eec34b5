"""Attention for TPU in Pallas: forward in one kernel, backward in one kernel of five products.

Both visit the list of pairs of blocks that `schedule` makes; hidden ones are not in it. Forward, a
block of queries meets its keys in order with a running maximum (FlashAttention-2, arXiv
2307.08691). The scale and log2(e) are multiplied into the queries, so that the weights are a bare
exp2; their row sums are kept per lane and added up once at the end. Backward, a block of keys meets
its queries, with the scores transposed so that the logsumexp of a query runs along lanes; dk and dv
stay in VMEM. A block of dq gathers its parts in fp32: in VMEM where all of them fit, else in HBM,
read and written back behind the products.

Inside, arrays are `[batch, heads, seq, head_dim]`; the logsumexp is `[batch, heads, 1, seq]`, to
the base 2. Lengths are padded to whole blocks; causality hides what is behind the end. Every device
of a mesh has its own rows and heads. `forward` and `backward` take the distance of queries from
keys and give and take the logsumexp: what a ring of devices needs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from olmo_jax.kernels import pallas_tpu_body as body
from olmo_jax.kernels import schedule
from olmo_jax.kernels.pallas_tpu_body import F32, HIDDEN, LOG2E
from olmo_jax.kernels.schedule import LANES, Blocks
from olmo_jax.sharding import Axes, on_each_device


class Tuning(NamedTuple):
    """Sizes of blocks and the memory to use."""

    forward: Blocks
    backward: Blocks
    vmem: int = 60 << 20  # bytes of a core that a kernel may take
    dq_vmem: int = 24 << 20  # bytes of fp32 dq that stay in VMEM; more goes to HBM


LARGE, MEDIUM = Blocks(2048, 2048, 512, 256), Blocks(1024, 1024, 512, 256)


def tuning(head_dim: int, dtype: Any, has_documents: bool) -> Tuning:
    """The sizes that were fastest on v5e, v5p and v6e by the compiler's schedule.

    Large blocks hide the most between products; smaller ones leave more out among documents, and
    fit where a position has many bytes or the chip (v4) little memory.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    is_small = device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
    is_wide = head_dim > 128 or jnp.dtype(dtype).itemsize > 2
    blocks = MEDIUM if is_small or is_wide or has_documents else LARGE
    return Tuning(blocks, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention on TPU; see `kernels.attention.attention` for the contract.

    `interpret` runs the kernels on any platform, slowly: for tests.
    """
    return _forward(q, k, v, segment_ids, window, tuning, interpret)[0]


def _forward(q, k, v, segment_ids, window, tuning, interpret):
    def run(q, k, v, ids):
        window_here = None if window is None or window >= q.shape[1] else window
        out, lse = forward(
            _turned(q), _turned(k), _turned(v), ids, ids,
            window=window_here, tuning=tuning, interpret=interpret,
        )  # fmt: skip
        return _turned(out), lse

    out, lse = on_each_device(
        run, (_OF_Q, _OF_KV, _OF_KV, _IDS), (_OF_Q, _ROW), q, k, v, segment_ids
    )
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(window, tuning, interpret, residuals, d_out):
    def run(q, k, v, ids, out, lse, d_out):
        window_here = None if window is None or window >= q.shape[1] else window
        delta = jnp.einsum("bsnh,bsnh->bns", d_out, out, preferred_element_type=F32)[:, :, None]
        grads = backward(
            _turned(q), _turned(k), _turned(v), ids, ids, lse, delta, _turned(d_out),
            window=window_here, tuning=tuning, interpret=interpret,
        )  # fmt: skip
        return tuple(map(_turned, grads))

    into = (_OF_Q, _OF_KV, _OF_KV, _IDS, _OF_Q, _ROW, _OF_Q)
    return *on_each_device(run, into, (_OF_Q, _OF_KV, _OF_KV), *residuals, d_out), None


attention.defvjp(_forward, _backward)

_OF_Q: Axes = ("batch", None, "heads", None)
_OF_KV: Axes = ("batch", None, "kv_heads", None)
_IDS: Axes = ("batch", None)
_ROW: Axes = ("batch", "heads", None, None)


def _turned(x: jax.Array) -> jax.Array:
    """[batch, seq, heads, head_dim] to [batch, heads, seq, head_dim], and back."""
    return jnp.swapaxes(x, 1, 2)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
    *,
    window: int | None,
    offset: Any = 0,
    tuning: Tuning,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of queries over keys.

    Args:
      q: [batch, heads, q_seq, head_dim].
      k, v: [batch, kv_heads, kv_seq, head_dim].
      q_ids, kv_ids: [batch, q_seq or kv_seq] int32, equal within a document; or None.
      window: positions visible to the left, the own one included; None for all.
      offset: position of the first query minus that of the first key, a multiple of the blocks; may
        be traced, as in a ring of devices. A query that sees no key has a logsumexp near HIDDEN.
      tuning: sizes of blocks.
      interpret: run on any platform, slowly.

    Returns: `[batch, heads, q_seq, head_dim]` in the dtype of q, and `[batch, heads, 1, q_seq]`
      fp32, to the base 2.
    """
    batch, heads, seq, dim = q.shape
    blocks = tuning.forward.fit(seq, k.shape[2])
    q, q_ids = _pad((_scaled(q), q_ids), blocks.q)
    k, v, kv_ids = _pad((k, v, kv_ids), blocks.kv)
    plan = schedule.make(
        q.shape[2], k.shape[2], blocks, by="q",
        window=window, offset=offset, q_ids=q_ids, kv_ids=kv_ids,
    )  # fmt: skip
    at = body.Index(heads, k.shape[1], plan.pairs.shape[0])
    of_q = pl.BlockSpec(
        (None, None, blocks.q, dim), lambda n, t, p: (*at.head(n), at.q(n, t, p), 0)
    )
    of_kv = pl.BlockSpec(
        (None, None, blocks.kv, dim), lambda n, t, p: (*at.kv_head(n), at.kv(n, t, p), 0)
    )
    row = pl.BlockSpec((None, None, 1, blocks.q), lambda n, t, p: (*at.head(n), 0, at.q(n, t, p)))
    q_row, kv_row = (None, None) if q_ids is None else at.ids(blocks)
    out, lse = pl.pallas_call(
        functools.partial(body.forward, at=at, blocks=blocks, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * heads, plan.count),
            in_specs=[of_q, of_kv, of_kv, q_row, kv_row],
            out_specs=[of_q, row],
            scratch_shapes=[
                pltpu.VMEM((blocks.q, dim), F32),
                pltpu.VMEM((blocks.q, LANES), F32),
                pltpu.VMEM((blocks.q, LANES), F32),
                None if q_ids is None else pltpu.VMEM((blocks.q, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q.shape[2]), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem
        ),
        cost_estimate=_cost(2, q, k, plan, blocks),
        interpret=interpret,
        name="attention_forward",
    )(plan.pairs, q, k, v, _lanes(q_ids), _lanes(kv_ids))
    if not (isinstance(offset, int) and offset == 0):
        out = _where_met(plan.of_q, blocks.q, out, 0)
        lse = jnp.swapaxes(_where_met(plan.of_q, blocks.q, jnp.swapaxes(lse, 2, 3), HIDDEN), 2, 3)
    return out[:, :, :seq], lse[..., :seq]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    window: int | None,
    offset: Any = 0,
    tuning: Tuning,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes.

    Args: as of `forward`, and
      lse: [batch, heads, 1, q_seq], over all keys, also those that are not here.
      delta: [batch, heads, 1, q_seq] fp32, the products of output and its gradient, summed.
      d_out: [batch, heads, q_seq, head_dim].
    """
    (batch, heads, seq, dim), (kv_heads, kv_seq) = q.shape, k.shape[1:3]
    group, dtype = heads // kv_heads, q.dtype
    blocks = tuning.backward.fit(seq, kv_seq)
    q, d_out, q_ids = _pad((_scaled(q), d_out, q_ids), blocks.q)
    lse, delta = (jnp.pad(x, [(0, 0)] * 3 + [(0, q.shape[2] - seq)]) for x in (lse, delta))
    k, v, kv_ids = _pad((k, v, kv_ids), blocks.kv)
    plan = schedule.make(
        q.shape[2], k.shape[2], blocks, by="kv",
        window=window, offset=offset, q_ids=q_ids, kv_ids=kv_ids,
    )  # fmt: skip
    n_q = q.shape[2] // blocks.q
    is_held = 4 * group * q.shape[2] * dim <= tuning.dq_vmem
    at = body.Index(kv_heads, kv_heads, plan.pairs.shape[0])

    def head(n, g):
        return n // kv_heads, n % kv_heads * group + g

    of_q = pl.BlockSpec(
        (None, None, blocks.q, dim), lambda n, t, g, p: (*head(n, g), at.q(n, t, p), 0)
    )
    row = pl.BlockSpec(
        (None, None, 1, blocks.q), lambda n, t, g, p: (*head(n, g), 0, at.q(n, t, p))
    )
    of_kv = pl.BlockSpec(
        (None, None, blocks.kv, dim), lambda n, t, g, p: (*at.head(n), at.kv(n, t, p), 0)
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    q_row, kv_row = (None, None) if q_ids is None else at.ids(blocks)
    parts = (dim, blocks.q)  # of dq, transposed
    dq, dk, dv, *_ = pl.pallas_call(
        functools.partial(body.backward, at=at, blocks=blocks, window=window, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * kv_heads, plan.count, group),
            in_specs=[of_q, of_kv, of_kv, of_q, row, row, q_row, kv_row],
            out_specs=[anywhere, of_kv, of_kv, None if is_held else anywhere],
            scratch_shapes=[
                pltpu.VMEM((group * n_q if is_held else 1, *parts), F32),
                pltpu.VMEM((blocks.kv, dim), F32),
                pltpu.VMEM((blocks.kv, dim), F32),
                None if q_ids is None else pltpu.VMEM((blocks.kv, LANES), jnp.int32),
                body.Copy.scratch((blocks.q, dim), dtype),
                None if is_held else body.Copy.scratch(parts, F32),
            ],
        ),
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            None if is_held else jax.ShapeDtypeStruct((batch, heads, n_q, *parts), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tuning.vmem,
        ),
        cost_estimate=_cost(5, q, k, plan, blocks),
        interpret=interpret,
        name="attention_backward",
    )(plan.pairs, q, k, v, d_out, lse, delta, _lanes(q_ids), _lanes(kv_ids))
    if not (isinstance(offset, int) and offset == 0):
        dq = _where_met(plan.of_q, blocks.q, dq, 0)
        dk, dv = (_where_met(plan.of_kv, blocks.kv, x, 0) for x in (dk, dv))
    return dq[:, :, :seq], dk[:, :, :kv_seq], dv[:, :, :kv_seq]


def _where_met(met: Any, block: int, x: jax.Array, otherwise: float) -> jax.Array:
    """Arrays `[batch, heads, seq, …]` with a number in the blocks that no pair had."""
    return jnp.where(jnp.repeat(met, block, axis=1)[:, None, :, None], x, otherwise)


def _scaled(q: jax.Array) -> jax.Array:
    return (q.astype(F32) * (q.shape[-1] ** -0.5 * LOG2E)).astype(q.dtype)


def _lanes(ids: jax.Array | None) -> jax.Array | None:
    return None if ids is None else ids[:, None, :]


def _pad(arrays: tuple[jax.Array | None, ...], unit: int) -> list[Any]:
    """Arrays `[batch, heads, seq, dim]` and ids `[batch, seq]`, to whole blocks."""

    def pad(x):
        axis = x.ndim // 2
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % unit)
        return jnp.pad(x, widths, mode="constant" if axis == 2 else "edge")

    return [None if x is None else pad(x) for x in arrays]


def _cost(products: int, q: jax.Array, k: jax.Array, plan: Any, blocks: Blocks) -> pl.CostEstimate:
    """For XLA's scheduler; with documents an upper bound."""
    batch, heads, _, dim = q.shape
    scores = batch * heads * plan.pairs.shape[1] * blocks.q * blocks.kv
    moved = scores // (blocks.q if products == 2 else blocks.kv) * 2 * dim + 2 * (q.size + k.size)
    return pl.CostEstimate(
        flops=2 * products * scores * dim,
        transcendentals=scores,
        bytes_accessed=moved * q.dtype.itemsize,
    )
