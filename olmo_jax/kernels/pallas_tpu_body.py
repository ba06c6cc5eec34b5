"""What the TPU kernels do at a step of their grid; `pallas_tpu` calls them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from olmo_jax.config.model import LANES
from olmo_jax.kernels import schedule
from olmo_jax.kernels.schedule import LOG2E, Blocks, Tile

HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # half of it less another is still finite
F32 = jnp.float32


def forward(pairs, q, k, v, q_ids, kv_ids, out, lse, acc, top, total, ids, *, at, blocks, window):
    """A step of the forward kernel: a block of queries meets a block of its keys."""
    pair = at.pair(pl.program_id(0), pl.program_id(1), pairs)

    @pl.when(pl.program_id(1) == 0)
    def _():  # any number that is one: what is left of the row before fades to 0
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)

    @pl.when(pair & schedule.FIRST != 0)
    def _():
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

    _for_each_kind(pair, at.kinds, blocks, window, ids is not None, attend)

    @pl.when(pair & schedule.LAST != 0)
    def _():
        sums = jnp.broadcast_to(total[...].sum(1, keepdims=True), total.shape)
        sums = jnp.maximum(sums, 1e-30)  # 1 and more, but for a query that sees no key at all
        out[...] = (acc[...] * _wide(1.0 / sums, acc.shape[1])).astype(out.dtype)
        lse[...] = (top[...] + jnp.log2(sums)).T[:1, :]


def backward(
    pairs, q, k, v, d_out, lse, delta, q_ids, kv_ids,
    dq, dk, dv, spilled,
    dq_sum, dk_sum, dv_sum, ids, ready, spill,
    *, at, blocks, window, group, scale,
):  # fmt: skip
    """A step of the backward kernel: a block of keys meets a block of queries of one head."""
    n, t, g = (pl.program_id(i) for i in range(3))
    pair = at.pair(n, t, pairs)
    block = schedule.q_block(pair)
    where = (at.batch(n), head := at.kv_head_of(n) * group + g)
    slot = 0 if spill else g * (dq_sum.shape[0] // group) + block
    is_live = schedule.kind(pair) != schedule.SKIP
    opens, closes = pair & schedule.OPENS != 0, pair & schedule.CLOSES != 0
    dim, rows_of_dq = q.shape[1], pl.ds(block * blocks.q, blocks.q)
    to_dq = (
        dq.at[*where, rows_of_dq]
        if len(dq.shape) == 4
        else dq.at[where[0], rows_of_dq, pl.ds(pl.multiple_of(head * dim, dim), dim)]
    )

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

    after_first = fetch if spill else None
    _for_each_kind(pair, at.kinds, blocks, window, ids is not None, attend, after_first)

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
        ready.buffer[...] = (whole * scale).T.astype(dq.dtype)
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


def delta(out, d_out, sums):
    """A step of the kernel for the sums of products: a block of queries of one head."""
    products = out[...].astype(F32) * d_out[...].astype(F32)
    total = products.sum(1, keepdims=True)
    sums[...] = jnp.broadcast_to(total, (products.shape[0], LANES)).T[:1, :]


class Copy(NamedTuple):
    """A buffer in VMEM, and at most one copy under way between it and HBM."""

    buffer: Any
    semaphore: Any
    is_moving: Any

    @staticmethod
    def scratch(shape: tuple[int, ...], dtype: Any) -> "Copy":
        """What the kernel asks for to have one."""
        return Copy(pltpu.VMEM(shape, dtype), pltpu.SemaphoreType.DMA, pltpu.SMEM((1,), jnp.int32))

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


class BlockIndex(NamedTuple):
    """Block indices from a step `(n, t)` of the grid: n counts batch and heads, t the pairs."""

    heads: int
    kv_heads: int
    n_lists: int
    kinds: frozenset[int]

    def batch(self, n: Any) -> Any:
        """Which row of the batch."""
        return jax.lax.div(n, self.heads)

    def head(self, n: Any) -> tuple[Any, Any]:
        """Batch and head."""
        return self.batch(n), jax.lax.rem(n, self.heads)

    def kv_head_of(self, n: Any) -> Any:
        """Which head of keys."""
        return jax.lax.div(jax.lax.rem(n, self.heads), self.heads // self.kv_heads)

    def kv_head(self, n: Any) -> tuple[Any, Any]:
        """Batch and head of keys."""
        return self.batch(n), self.kv_head_of(n)

    def pair(self, n: Any, t: Any, pairs: Any) -> Any:
        """The entry of the list."""
        return pairs[0 if self.n_lists == 1 else self.batch(n), t]

    def q(self, n: Any, t: Any, pairs: Any) -> Any:
        """Which block of queries."""
        return schedule.q_block(self.pair(n, t, pairs))

    def kv(self, n: Any, t: Any, pairs: Any) -> Any:
        """Which block of keys."""
        return schedule.kv_block(self.pair(n, t, pairs))

    def ids(self, blocks: Blocks) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of document ids, `[batch, 1, seq]`, by queries and by keys."""
        return (
            pl.BlockSpec(
                (None, 1, blocks.q), lambda n, t, *r: (self.batch(n), 0, self.q(n, t, r[-1]))
            ),
            pl.BlockSpec(
                (None, 1, blocks.kv), lambda n, t, *r: (self.batch(n), 0, self.kv(n, t, r[-1]))
            ),
        )


def _for_each_kind(pair, found, blocks, window, has_documents, attend, after_first=None):
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
        if number in found:
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
