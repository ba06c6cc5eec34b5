"""Attention for TPU in Pallas: forward in one kernel, backward in one kernel of five products.

Both visit the list of pairs of blocks that `schedule` makes; hidden ones are not in it. Forward, a
block of queries meets its keys in order with a running maximum (FlashAttention-2, arXiv
2307.08691). The scale and log2(e) are multiplied into the queries, so that the weights are a bare
exp2; their row sums are kept per lane and added up once at the end. Backward, a block of keys meets
its queries, with the scores transposed so that the logsumexp of a query runs along lanes; dk and dv
stay in VMEM. A block of dq gathers its parts in fp32: in VMEM where all of them fit, else in HBM,
read and written back behind the products.

Arrays are flat, `[batch, seq, heads · head_dim]`, as products with the weights make and take them:
on a TPU `[…, heads, head_dim]` is tiled in another way, and each step between the two is a copy. A
head is a column of blocks where its size is a multiple of 128; others are turned to `[batch, heads,
seq, head_dim]`. The logsumexp is `[batch, heads, 1, seq]`, to the base 2. Lengths are padded to
whole blocks; causality hides what is behind the end. Every device of a mesh has its own rows and
heads. `forward` and `backward` take the distance of queries from keys and give and take the
logsumexp: what a ring of devices needs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from olmo_jax.config.model import LANES
from olmo_jax.kernels import pallas_tpu_body as body
from olmo_jax.kernels import schedule
from olmo_jax.kernels.pallas_tpu_body import F32, HIDDEN
from olmo_jax.kernels.schedule import LOG2E, Blocks
from olmo_jax.parallel.sharding import Axes, device, on_each_device


class TpuTuning(NamedTuple):
    """Sizes of blocks and the memory to use."""

    forward: Blocks
    backward: Blocks
    vmem: int = 60 << 20  # bytes of a core that a kernel may take
    dq_vmem: int = 24 << 20  # bytes of fp32 dq that stay in VMEM; more goes to HBM

    def dividing(self, seq: int) -> "TpuTuning":
        """The same with blocks, as large for keys as for queries, that divide a multiple of LANES.

        Lengths and offsets that are multiples of such a block need no padding.
        """
        sizes = range(LANES, min(self.forward.q, seq) + 1, LANES)
        block = max(size for size in sizes if seq % size == 0)
        blocks = Blocks(block, block, *(min(x, block) for x in self.forward[2:]))
        return self._replace(forward=blocks, backward=blocks)


LARGE, MEDIUM = Blocks(2048, 2048, 512, 256), Blocks(1024, 1024, 512, 256)


def tuning(head_dim: int, dtype: Any, has_documents: bool) -> TpuTuning:
    """The sizes that were fastest on v5e, v5p and v6e by the compiler's schedule.

    Large blocks hide the most between products; smaller ones leave more out among documents, and
    fit where a position has many bytes or the chip (v4) little memory.
    """
    is_small = device().device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
    is_wide = head_dim > 128 or jnp.dtype(dtype).itemsize > 2
    blocks = MEDIUM if is_small or is_wide or has_documents else LARGE
    return TpuTuning(blocks, blocks)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float,
    tuning: TpuTuning,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention on TPU; see `kernels.attention.attention` for the contract.

    `interpret` runs the kernels on any platform, slowly: for tests.
    """
    options = _Options(q.shape[3], window, scale, tuning, interpret)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    out: Any = _attention(q, k, v, segment_ids, options)
    return out.reshape(*out.shape[:2], -1, options.head_dim)


class _Options(NamedTuple):
    head_dim: int
    window: int | None
    scale: float
    tuning: TpuTuning
    interpret: bool

    def here(self, seq: int) -> dict[str, Any]:
        """For sequences of this length."""
        is_seen = self.window is not None and self.window < seq
        return self._asdict() | {"window": self.window if is_seen else None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, segment_ids, options):
    return _forward(q, k, v, segment_ids, options)[0]


def _forward(q, k, v, segment_ids, options):
    def run(q, k, v, ids):
        return forward(q, k, v, ids, ids, **options.here(q.shape[1]))

    out, lse = on_each_device(
        run, (_OF_Q, _OF_KV, _OF_KV, _IDS), (_OF_Q, _ROW), q, k, v, segment_ids
    )
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(options, residuals, d_out):
    def run(q, k, v, ids, out, lse, d_out):
        here = options.here(q.shape[1])
        found = delta(out, d_out, options.head_dim, options.interpret)
        return backward(q, k, v, ids, ids, lse, found, d_out, **here)

    into = (_OF_Q, _OF_KV, _OF_KV, _IDS, _OF_Q, _ROW, _OF_Q)
    return *on_each_device(run, into, (_OF_Q, _OF_KV, _OF_KV), *residuals, d_out), None


_attention.defvjp(_forward, _backward)

_OF_Q: Axes = ("batch", None, "heads")
_OF_KV: Axes = ("batch", None, "kv_heads")
_IDS: Axes = ("batch", None)
_ROW: Axes = ("batch", "heads", None, None)


class _Heads(NamedTuple):
    """How the kernels find a head: a column of a flat array, or an array of its own."""

    dim: int

    @property
    def is_flat(self) -> bool:
        return self.dim % LANES == 0

    def laid(self, x: jax.Array, unit: int) -> jax.Array:
        """`[batch, seq, heads · dim]` as the kernels take it, with whole blocks of `unit`."""
        (x,) = _pad((x,), unit)
        return x if self.is_flat else jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.dim), 1, 2)

    def flat(self, x: jax.Array, seq: int) -> jax.Array:
        """And back, without what was padded."""
        if not self.is_flat:
            x = jnp.swapaxes(x, 1, 2)
        return x.reshape(*x.shape[:2], -1)[:, :seq]

    def block(self, size: int, index: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
        """A block of one head, where `index` gives batch, head and block of the sequence."""

        def column(*at):
            n, head, i = index(*at)
            return (n, i, head) if self.is_flat else (n, head, i, 0)

        return pl.BlockSpec((None, *[None] * (not self.is_flat), size, self.dim), column)


def delta(out: jax.Array, d_out: jax.Array, head_dim: int, interpret: bool = False) -> jax.Array:
    """The products of output and its gradient, summed for each query and head.

    Args:
      out, d_out: [batch, seq, heads · head_dim].
      head_dim: of a head.
      interpret: run on any platform, slowly.

    Returns: `[batch, heads, 1, seq]` fp32.
    """
    batch, seq, width = out.shape
    heads, layout = width // head_dim, _Heads(head_dim)
    rows = min(1024, -(-seq // LANES) * LANES)
    out, d_out = (layout.laid(x, rows) for x in (out, d_out))
    n_blocks = -(-seq // rows)
    of_head = layout.block(rows, lambda b, n, i: (b, n, i))
    sums = pl.pallas_call(
        body.delta,
        grid=(batch, heads, n_blocks),
        in_specs=[of_head, of_head],
        out_specs=pl.BlockSpec((None, None, 1, rows), lambda b, n, i: (b, n, 0, i)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, 1, n_blocks * rows), F32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="attention_delta",
    )(out, d_out)
    return sums[..., :seq]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
    *,
    head_dim: int,
    window: int | None,
    scale: float,
    offset: Any = 0,
    tuning: TpuTuning,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of queries over keys.

    Args:
      q: [batch, q_seq, heads · head_dim].
      k, v: [batch, kv_seq, kv_heads · head_dim].
      q_ids, kv_ids: [batch, q_seq or kv_seq] int32, equal within a document; or None.
      head_dim: of a head.
      window: positions visible to the left, the own one included; None for all.
      scale: of the scores.
      offset: position of the first query minus that of the first key, a multiple of the blocks; may
        be traced, as in a ring of devices. A query that sees no key has a logsumexp near HIDDEN.
      tuning: sizes of blocks.
      interpret: run on any platform, slowly.

    Returns: `[batch, q_seq, heads · head_dim]` in the dtype of q, and `[batch, heads, 1, q_seq]`
      fp32, to the base 2.
    """
    (batch, seq, width), layout = q.shape, _Heads(head_dim)
    heads, kv_heads = width // head_dim, k.shape[2] // head_dim
    kv_seq, blocks = k.shape[1], tuning.forward.fit(seq, k.shape[1])
    q = layout.laid(_scaled(q, scale), blocks.q)
    k, v = (layout.laid(x, blocks.kv) for x in (k, v))
    (q_ids,), (kv_ids,) = _pad((q_ids,), blocks.q), _pad((kv_ids,), blocks.kv)
    q_len, kv_len = -(-seq // blocks.q) * blocks.q, -(-kv_seq // blocks.kv) * blocks.kv
    plan = schedule.make(
        q_len, kv_len, blocks, by="q", window=window, offset=offset, q_ids=q_ids, kv_ids=kv_ids
    )
    at = body.BlockIndex(heads, kv_heads, plan.pairs.shape[0], plan.kinds)
    of_q = layout.block(blocks.q, lambda n, t, p: (*at.head(n), at.q(n, t, p)))
    of_kv = layout.block(blocks.kv, lambda n, t, p: (*at.kv_head(n), at.kv(n, t, p)))
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
                pltpu.VMEM((blocks.q, head_dim), F32),
                pltpu.VMEM((blocks.q, LANES), F32),
                pltpu.VMEM((blocks.q, LANES), F32),
                None if q_ids is None else pltpu.VMEM((blocks.q, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q_len), F32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem
        ),
        cost_estimate=_cost(2, q, k, batch * heads, head_dim, plan, blocks),
        interpret=interpret,
        name="attention_forward",
    )(plan.pairs, q, k, v, _lanes(q_ids), _lanes(kv_ids))
    out, lse = layout.flat(out, seq), lse[..., :seq]
    if not (isinstance(offset, int) and offset == 0):
        met = jnp.repeat(plan.of_q, blocks.q, axis=1)[:, :seq]
        out = jnp.where(met[..., None], out, 0)
        lse = jnp.where(met[:, None, None], lse, HIDDEN)
    return out, lse


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
    head_dim: int,
    window: int | None,
    scale: float,
    offset: Any = 0,
    tuning: TpuTuning,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes.

    Args: as of `forward`, and
      lse: [batch, heads, 1, q_seq], over all keys, also those that are not here.
      delta: [batch, heads, 1, q_seq], see `delta`.
      d_out: [batch, q_seq, heads · head_dim].
    """
    (batch, seq, width), kv_seq, layout = q.shape, k.shape[1], _Heads(head_dim)
    heads, kv_heads = width // head_dim, k.shape[2] // head_dim
    group = heads // kv_heads
    blocks = tuning.backward.fit(seq, kv_seq)
    q, d_out = (layout.laid(x, blocks.q) for x in (_scaled(q, scale), d_out))
    k, v = (layout.laid(x, blocks.kv) for x in (k, v))
    (q_ids,), (kv_ids,) = _pad((q_ids,), blocks.q), _pad((kv_ids,), blocks.kv)
    q_len, kv_len = -(-seq // blocks.q) * blocks.q, -(-kv_seq // blocks.kv) * blocks.kv
    lse, delta = (jnp.pad(x, [(0, 0)] * 3 + [(0, q_len - seq)]) for x in (lse, delta))
    plan = schedule.make(
        q_len, kv_len, blocks, by="kv", window=window, offset=offset, q_ids=q_ids, kv_ids=kv_ids
    )
    n_q = q_len // blocks.q
    is_held = 4 * group * q_len * head_dim <= tuning.dq_vmem
    at = body.BlockIndex(kv_heads, kv_heads, plan.pairs.shape[0], plan.kinds)

    def head(n, g):
        return n // kv_heads, n % kv_heads * group + g

    of_q = layout.block(blocks.q, lambda n, t, g, p: (*head(n, g), at.q(n, t, p)))
    row = pl.BlockSpec(
        (None, None, 1, blocks.q), lambda n, t, g, p: (*head(n, g), 0, at.q(n, t, p))
    )
    of_kv = layout.block(blocks.kv, lambda n, t, g, p: (*at.head(n), at.kv(n, t, p)))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    q_row, kv_row = (None, None) if q_ids is None else at.ids(blocks)
    parts = (head_dim, blocks.q)  # of dq, transposed
    dq, dk, dv, *_ = pl.pallas_call(
        functools.partial(
            body.backward, at=at, blocks=blocks, window=window, group=group, scale=scale
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch * kv_heads, plan.count, group),
            in_specs=[of_q, of_kv, of_kv, of_q, row, row, q_row, kv_row],
            out_specs=[anywhere, of_kv, of_kv, None if is_held else anywhere],
            scratch_shapes=[
                pltpu.VMEM((group * n_q if is_held else 1, *parts), F32),
                pltpu.VMEM((blocks.kv, head_dim), F32),
                pltpu.VMEM((blocks.kv, head_dim), F32),
                None if q_ids is None else pltpu.VMEM((blocks.kv, LANES), jnp.int32),
                body.Copy.scratch((blocks.q, head_dim), q.dtype),
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
        cost_estimate=_cost(5, q, k, batch * heads, head_dim, plan, blocks),
        interpret=interpret,
        name="attention_backward",
    )(plan.pairs, q, k, v, d_out, lse, delta, _lanes(q_ids), _lanes(kv_ids))
    dq, dk, dv = layout.flat(dq, seq), layout.flat(dk, kv_seq), layout.flat(dv, kv_seq)
    if not (isinstance(offset, int) and offset == 0):
        of_q, of_kv = (
            jnp.repeat(met, block, axis=1)[:, :n, None]
            for met, block, n in (
                (plan.of_q, blocks.q, seq), (plan.of_kv, blocks.kv, kv_seq),
            )
        )  # fmt: skip
        dq, dk, dv = jnp.where(of_q, dq, 0), jnp.where(of_kv, dk, 0), jnp.where(of_kv, dv, 0)
    return dq, dk, dv


def _scaled(q: jax.Array, scale: float) -> jax.Array:
    """Queries whose products with keys are the arguments of exp2."""
    if math.isclose(scale * LOG2E, 1.0):
        return q
    return (q.astype(F32) * (scale * LOG2E)).astype(q.dtype)


def _lanes(ids: jax.Array | None) -> jax.Array | None:
    return None if ids is None else ids[:, None, :]


def _pad(arrays: tuple[jax.Array | None, ...], unit: int) -> list[Any]:
    """Arrays `[batch, seq, width]` and ids `[batch, seq]`, to whole blocks."""

    def pad(x):
        widths = [(0, 0), (0, -x.shape[1] % unit)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, mode="constant" if x.ndim > 2 else "edge")

    return [None if x is None else pad(x) for x in arrays]


def _cost(
    products: int, q: jax.Array, k: jax.Array, n: int, dim: int, plan: Any, blocks: Blocks
) -> pl.CostEstimate:
    """Of `n` heads, for XLA's scheduler; with documents an upper bound."""
    scores = n * plan.pairs.shape[1] * blocks.q * blocks.kv
    moved = scores // (blocks.q if products == 2 else blocks.kv) * 2 * dim + 2 * (q.size + k.size)
    return pl.CostEstimate(
        flops=2 * products * scores * dim,
        transcendentals=scores,
        bytes_accessed=moved * q.dtype.itemsize,
    )
