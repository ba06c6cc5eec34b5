"""Attention for TPU in Pallas: forward in one kernel, backward in one kernel of five products.

Both visit the list of pairs of blocks that `schedule` makes; hidden ones are not in it. Forward, a
block of queries meets its keys in order with a running maximum (FlashAttention-2, arXiv 2307.08691).
The scale and log2(e) are multiplied into the queries, so that the weights are a bare exp2; their row
sums are kept per lane and added up once at the end. Backward, a block of keys meets its queries, with
the scores transposed so that the logsumexp of a query runs along lanes; dk and dv stay in VMEM. A
block of dq gathers its parts in fp32 in VMEM where all of them fit, else in HBM, read and written
back behind the products.

Inside, arrays are `[batch, heads, seq, head_dim]`; the logsumexp is `[batch, heads, 1, seq]`, to the
base 2. Lengths are padded to whole blocks; causality hides what is behind the end.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from olmo_jax.kernels import schedule
from olmo_jax.kernels.schedule import LANES, Blocks, Tile

LOG2E = math.log2(math.e)
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # half of it less another is still finite
F32 = jnp.float32


class Tuning(NamedTuple):
    """Sizes of blocks and the memory to use."""

    forward: Blocks = Blocks(1024, 1024, 512, 256)
    backward: Blocks = Blocks(1024, 1024, 512, 256)
    vmem: int = 60 << 20  # bytes of a core that a kernel may take
    dq_vmem: int = 24 << 20  # bytes of fp32 dq that stay in VMEM; more goes to HBM


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
    *,
    window: int | None,
    offset: Any = 0,
    tuning: Tuning = Tuning(),
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
    at = _Index(heads, k.shape[1], plan.pairs.shape[0])
    of_q = pl.BlockSpec((None, None, blocks.q, dim), lambda n, t, p: (*at.head(n), at.q(n, t, p), 0))
    of_kv = pl.BlockSpec(
        (None, None, blocks.kv, dim), lambda n, t, p: (*at.kv_head(n), at.kv(n, t, p), 0)
    )
    row = pl.BlockSpec((None, None, 1, blocks.q), lambda n, t, p: (*at.head(n), 0, at.q(n, t, p)))
    q_row, kv_row = (None, None) if q_ids is None else at.ids(blocks)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, at=at, blocks=blocks, window=window),
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
    return out[:, :, :seq], lse[..., :seq]


def _forward_kernel(
    pairs, q, k, v, q_ids, kv_ids, out, lse, acc, top, total, ids, *, at, blocks, window
):
    pair = at.pair(pl.program_id(0), pl.program_id(1), pairs)

    @pl.when(pair & schedule.FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, HIDDEN)
        if ids is not None:
            ids[...] = _column(q_ids[...])

    def attend(tile: Tile, distance: int | None, by_document: bool):
        keys, rows = slice(*tile.keys), slice(*tile.queries)
        scores = _product(q[rows, :], k[keys, :], 1, 1)
        if by_document:
            same = _wide(ids[rows, :], scores.shape[1]) == kv_ids[:, keys]
            scores = jnp.where(same, scores, HIDDEN)
        scores = _hide(scores, tile, distance, window, 0)
        before = top[rows, :]
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.exp2(scores - _wide(now, scores.shape[1]))
        fade = jnp.exp2(before - now)
        top[rows, :] = now
        total[rows, :] = fade * total[rows, :] + sum(
            weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)
        )
        part = _product(weights.astype(v.dtype), v[keys, :], 1, 0)
        acc[rows, :] = _wide(fade, acc.shape[1]) * acc[rows, :] + part

    _for_each_kind(pair, blocks, window, ids is not None, attend)

    @pl.when(pair & schedule.LAST != 0)
    def _():
        sums = jnp.broadcast_to(total[...].sum(1, keepdims=True), total.shape)
        out[...] = (acc[...] * _wide(1.0 / sums, acc.shape[1])).astype(out.dtype)
        lse[...] = (top[...] + jnp.log2(sums)).T[:1, :]


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
    tuning: Tuning = Tuning(),
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
    at = _Index(kv_heads, kv_heads, plan.pairs.shape[0])

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
        functools.partial(
            _backward_kernel, at=at, blocks=blocks, window=window, group=group
        ),
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
                _Copy.scratch((blocks.q, dim), dtype),
                None if is_held else _Copy.scratch(parts, F32),
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
    return dq[:, :, :seq], dk[:, :, :kv_seq], dv[:, :, :kv_seq]


def _backward_kernel(
    pairs, q, k, v, d_out, lse, delta, q_ids, kv_ids,
    dq, dk, dv, spilled,
    dq_sum, dk_sum, dv_sum, ids, ready, spill,
    *, at, blocks, window, group,
):  # fmt: skip
    n, t, g = (pl.program_id(i) for i in range(3))
    pair = at.pair(n, t, pairs)
    block = schedule.q_block(pair)
    where = (at.batch(n), at.kv_head_of(n) * group + g)
    slot = 0 if spill else g * (dq_sum.shape[0] // group) + block
    is_live = schedule.kind(pair) != schedule.SKIP
    opens, closes = pair & schedule.OPENS != 0, pair & schedule.CLOSES != 0
    to_dq = dq.at[*where, pl.ds(block * blocks.q, blocks.q)]

    @pl.when((t == 0) & (g == 0))
    def _():
        ready.reset()
        if spill:
            spill.reset()

    @pl.when((pair & schedule.FIRST != 0) & (g == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        if ids is not None:
            ids[...] = _column(kv_ids[...])

    @pl.when(is_live if spill else opens)
    def _():
        dq_sum[slot] = jnp.zeros(dq_sum.shape[1:], F32)

    def attend(tile: Tile, distance: int | None, by_document: bool):
        keys, rows = slice(*tile.keys), slice(*tile.queries)
        scores = _product(k[keys, :], q[rows, :], 1, 1)  # transposed, all of them: [keys, rows]
        if by_document:
            same = _wide(ids[keys, :], scores.shape[1]) == q_ids[:, rows]
            scores = jnp.where(same, scores, HIDDEN)
        scores = _hide(scores, tile, distance, window, 1)
        weights = jnp.exp2(scores - lse[:, rows])
        dv_sum[keys, :] += _product(weights.astype(q.dtype), d_out[rows, :], 1, 0)
        d_weights = _product(v[keys, :], d_out[rows, :], 1, 1)
        d_scores = (weights * (d_weights - delta[:, rows])).astype(q.dtype)
        dk_sum[keys, :] += _product(d_scores, q[rows, :], 1, 0)
        dq_sum[slot, :, rows] += _product(k[keys, :], d_scores, 0, 0)

    def fetch():  # late enough for the copy of the step before to be through, mostly
        spill.wait(spilled.at[*where, block])

        @pl.when(~opens)
        def _():
            spill.read(spilled.at[*where, block])

    _for_each_kind(pair, blocks, window, ids is not None, attend, fetch if spill else None)

    if spill:

        @pl.when(is_live & opens)
        def _():
            spill.buffer[...] = dq_sum[0]

        @pl.when(is_live & ~opens)
        def _():
            spill.wait(spilled.at[*where, block])
            spill.buffer[...] += dq_sum[0]

        @pl.when(is_live & ~closes)
        def _():
            spill.write(spilled.at[*where, block])

    @pl.when(closes)
    def _():
        ready.wait(to_dq)
        whole = spill.buffer[...] if spill else dq_sum[slot]
        ready.buffer[...] = (whole * q.shape[1] ** -0.5).T.astype(dq.dtype)
        ready.write(to_dq)

    @pl.when((pair & schedule.LAST != 0) & (g == group - 1))
    def _():
        dk[...] = (dk_sum[...] * (1 / LOG2E)).astype(dk.dtype)  # q has the scale and log2(e) in it
        dv[...] = dv_sum[...].astype(dv.dtype)

    @pl.when((t == pl.num_programs(1) - 1) & (g == group - 1))
    def _():
        ready.wait(to_dq)
        if spill:
            spill.wait(spilled.at[*where, block])


class _Copy(NamedTuple):
    """A buffer in VMEM, and at most one copy under way between it and HBM."""

    buffer: Any
    semaphore: Any
    is_moving: Any

    @staticmethod
    def scratch(shape: tuple[int, ...], dtype: Any) -> "_Copy":
        """What the kernel asks for to have one."""
        return _Copy(pltpu.VMEM(shape, dtype), pltpu.SemaphoreType.DMA, pltpu.SMEM((1,), jnp.int32))

    def reset(self):
        """At the start of a kernel: nothing moves."""
        self.is_moving[0] = 0

    def read(self, there: Any):
        """Start to fill the buffer."""
        pltpu.make_async_copy(there, self.buffer, self.semaphore).start()
        self.is_moving[0] = 1

    def write(self, there: Any):
        """Start to copy the buffer out."""
        pltpu.make_async_copy(self.buffer, there, self.semaphore).start()
        self.is_moving[0] = 1

    def wait(self, there: Any):
        """Until nothing moves any more; `there` says how much it was."""

        @pl.when(self.is_moving[0] != 0)
        def _():
            pltpu.make_async_copy(self.buffer, there, self.semaphore).wait()
            self.is_moving[0] = 0


class _Index(NamedTuple):
    """Block indices from a step `(n, t)` of the grid: n counts batch and heads, t the pairs."""

    heads: int
    kv_heads: int
    n_lists: int

    def batch(self, n: Any) -> Any:
        return jax.lax.div(n, self.heads)

    def head(self, n: Any) -> tuple[Any, Any]:
        return self.batch(n), jax.lax.rem(n, self.heads)

    def kv_head_of(self, n: Any) -> Any:
        return jax.lax.div(jax.lax.rem(n, self.heads), self.heads // self.kv_heads)

    def kv_head(self, n: Any) -> tuple[Any, Any]:
        return self.batch(n), self.kv_head_of(n)

    def pair(self, n: Any, t: Any, pairs: Any) -> Any:
        return pairs[0 if self.n_lists == 1 else self.batch(n), t]

    def q(self, n: Any, t: Any, pairs: Any) -> Any:
        return schedule.q_block(self.pair(n, t, pairs))

    def kv(self, n: Any, t: Any, pairs: Any) -> Any:
        return schedule.kv_block(self.pair(n, t, pairs))

    def ids(self, blocks: Blocks) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of document ids, `[batch, 1, seq]`, by queries and by keys."""
        return (
            pl.BlockSpec((None, 1, blocks.q), lambda n, t, *r: (self.batch(n), 0, self.q(n, t, r[-1]))),
            pl.BlockSpec((None, 1, blocks.kv), lambda n, t, *r: (self.batch(n), 0, self.kv(n, t, r[-1]))),
        )


def _for_each_kind(pair, blocks, window, has_documents, attend, after_first=None):
    """Branches, one for each kind of pair, each with its outline written out."""
    kinds: list[tuple[int | None, bool]] = [(None, False)]
    kinds += [(None, True)] * has_documents
    kinds += [(distance, has_documents) for distance in schedule.borders(blocks, window)]

    def visit(distance: int | None, by_document: bool):
        for i, tile in enumerate(schedule.tiles(blocks, window, distance)):
            attend(tile, distance, by_document)
            if i == 0 and after_first is not None:
                after_first()

    for number, (distance, by_document) in enumerate(kinds, schedule.FULL):
        is_this = schedule.kind(pair) == number
        pl.when(is_this)(functools.partial(visit, distance, by_document))


def _hide(scores: jax.Array, tile: Tile, distance: int | None, window: int | None, axis: int):
    """Scores of a tile without those behind a border; queries run along `axis`."""
    if distance is None:
        return scores
    (first, last), clear, keys = tile.queries, tile.clear, tile.keys
    pieces = []
    for start, stop in ((first, clear[0]), clear, (clear[1], last)):
        if start == stop:
            continue
        piece = jax.lax.slice_in_dim(scores, start - first, stop - first, axis=axis)
        if (start, stop) != clear:
            ahead = distance + start - keys[0]
            ahead += jax.lax.broadcasted_iota(jnp.int32, piece.shape, axis)
            ahead -= jax.lax.broadcasted_iota(jnp.int32, piece.shape, 1 - axis)
            seen = ahead >= 0
            if window is not None:
                # Where one border alone crosses, the comparison with the other one is dead code.
                nearest, farthest = distance + start - keys[1] + 1, distance + stop - 1 - keys[0]
                if farthest >= window:
                    seen = ahead < window if nearest >= 0 else seen & (ahead < window)
            piece = jnp.where(seen, piece, HIDDEN)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contract one axis of each, in fp32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=F32)


def _wide(x: jax.Array, width: int) -> jax.Array:
    """`[rows, LANES]` of equal columns with another number of columns."""
    copies = -(-width // LANES)
    return (x if copies == 1 else jnp.tile(x, (1, copies)))[:, :width]


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, LANES], in every column the same."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


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
