"""What the GPU kernels do in a block of threads; `pallas_gpu` calls them.

A block has three warpgroups. Two compute, each with its own positions in shared memory and its sums
in registers. Both meet the same positions of the other side, step by step; the third one copies
these ahead of them into a ring of slots. A slot is `ready` when its copies have landed, and `free`
when both have used it. All three learn from `ranges` which steps there are and which need a mask.

In a matrix of scores rows are own positions, columns are those that are met.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from olmo_jax.kernels.schedule import LOG2E

F32 = jnp.float32
HIDDEN = -1e30  # finite, so that a row without anything visible gives no NaN
ACC = plgpu.WGMMAAccumulatorRef
WORKERS = 2  # warpgroups that compute
WORKER_REGISTERS, COPIER_REGISTERS = 240, 24  # of a thread; a block has 2 * 240 + 24 + 8
AXES, WARPGROUP = ("batch", "head", "block"), "warpgroup"
MATRIX = plgpu.Layout.WGMMA  # how products lie in registers, and vectors along their two sides
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


class Sizes(NamedTuple):
    """Positions that a warpgroup has, positions that it meets in a step, and slots of the ring."""

    own: int
    met: int
    slots: int


class Kind(NamedTuple):
    """Of a kernel: its mask, query heads of a KV head, scale, and whether it is interpreted."""

    window: int | None
    has_documents: bool
    group: int
    scale: float
    is_interpreted: bool


def forward(
    q, k, v, ranges, ids, out, lse,
    own_q, own_ids, own_lse, ring_k, ring_v, ring_ids,
    ready_own, ready_k, ready_v, free_k, free_v, turn,
    *, sizes: Sizes, kind: Kind,
):  # fmt: skip
    """Queries meet their keys, with a running maximum."""
    (batch, head, block), me = _place(ranges)
    first, clear, border, stop = _bounds(ranges, batch, block)
    start = (block * WORKERS + me) * sizes.own
    own = pl.ds(start, sizes.own)
    scale = kind.scale * LOG2E

    def take_turns():  # one works with the tensor cores while the other takes exponentials
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def step(i, carry, is_clear):
        acc, top, total = carry
        slot = lax.rem(i - first, sizes.slots)
        plgpu.barrier_wait(ready_k.at[slot])
        (scores,) = _products((own_q.at[me], _turned(ring_k.at[slot])), then=take_turns)
        if is_clear:  # scaled twice, but the second time for nothing: as part of the difference
            peak, scores = scores.max(axis=1) * scale, scores * scale
        else:
            of_ids = _at(own_ids, me), _at(ring_ids, slot)
            scores = _hide(scores * scale, start - i * sizes.met, of_ids, kind.window)
            peak = scores.max(axis=1)
        _release(free_k.at[slot], kind)
        now = jnp.maximum(top, peak)
        fade = jnp.exp2(top - now)
        weights = jnp.exp2(scores - _along(now, scores, 0))
        total = fade * total + weights.sum(axis=1)
        acc *= _along(fade, acc, 0)
        acc, now, total, weights = lax.optimization_barrier(
            (acc, now, total, weights.astype(v.dtype))
        )
        plgpu.barrier_wait(ready_v.at[slot])
        take_turns()
        (acc,) = _add_products((acc,), ((weights, ring_v.at[slot]),), kind)
        _release(free_v.at[slot], kind)
        return acc, now, total

    @pl.when(me < WORKERS)
    def _():
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        _copy(me, ready_own, (q.at[batch, own, head], own_q), (_at(ids, batch, own), own_ids))
        plgpu.barrier_wait(ready_own.at[me])
        acc = _full((sizes.own, q.shape[3]), 0, MATRIX)
        top, total = (_full((sizes.own,), x, BY_ROW) for x in (HIDDEN, 0))
        pl.when(me == 1)(take_turns)
        loops = (first, clear, False), (clear, border, True), (border, stop, False)
        acc, top, total = _loops(loops if _has_edge(kind) else loops[1:], step, (acc, top, total))
        pl.when(me == 0)(take_turns)
        own_q.at[me][...] = (acc / _along(total, acc, 0)).astype(out.dtype)
        own_lse.at[me][...] = top + jnp.log(total) * LOG2E
        _write((own_q.at[me], out.at[batch, own, head]), (own_lse.at[me], lse.at[batch, head, own]))

    @pl.when(me == WORKERS)
    def _():
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
        kv_head = lax.div(head, kind.group)

        @pl.loop(0, stop - first)
        def _(t):
            met = pl.ds((first + t) * sizes.met, sizes.met)
            of_k = (k.at[batch, met, kv_head], ring_k), (_at(ids, batch, met), ring_ids)
            _refill(t, sizes, free_k, ready_k, *of_k)
            _refill(t, sizes, free_v, ready_v, (v.at[batch, met, kv_head], ring_v))


def d_queries(
    q, k, v, d_out, lse, delta, ranges, ids, dq,
    own_q, own_d_out, own_lse, own_delta, own_ids, ring_k, ring_v, ring_ids,
    ready_own, ready, free,
    *, sizes: Sizes, kind: Kind,
):  # fmt: skip
    """Queries meet their keys again, for the gradient of the queries."""
    (batch, head, block), me = _place(ranges)
    first, clear, border, stop = _bounds(ranges, batch, block)
    start = (block * WORKERS + me) * sizes.own
    own = pl.ds(start, sizes.own)

    def step(i, carry, is_clear):
        total, of_lse, of_delta = carry
        slot = lax.rem(i - first, sizes.slots)
        plgpu.barrier_wait(ready.at[slot])
        scores, d_weights = _products(
            (own_q.at[me], _turned(ring_k.at[slot])), (own_d_out.at[me], _turned(ring_v.at[slot]))
        )
        scores *= kind.scale * LOG2E
        if not is_clear:
            of_ids = _at(own_ids, me), _at(ring_ids, slot)
            scores = _hide(scores, start - i * sizes.met, of_ids, kind.window)
        weights = jnp.exp2(scores - _along(of_lse, scores, 0))
        d_scores = (weights * (d_weights - _along(of_delta, scores, 0))).astype(q.dtype)
        (total,) = _add_products((total,), ((d_scores, ring_k.at[slot]),), kind)
        _release(free.at[slot], kind)
        return total, of_lse, of_delta

    @pl.when(me < WORKERS)
    def _():
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        _copy(
            me, ready_own,
            (q.at[batch, own, head], own_q), (d_out.at[batch, own, head], own_d_out),
            (lse.at[batch, head, own], own_lse), (delta.at[batch, head, own], own_delta),
            (_at(ids, batch, own), own_ids),
        )  # fmt: skip
        plgpu.barrier_wait(ready_own.at[me])
        total = _full((sizes.own, q.shape[3]), 0, MATRIX)
        rows = _vector(own_lse.at[me], BY_ROW), _vector(own_delta.at[me], BY_ROW)
        loops = (first, clear, False), (clear, border, True), (border, stop, False)
        total, _, _ = _loops(loops if _has_edge(kind) else loops[1:], step, (total, *rows))
        own_q.at[me][...] = (total * kind.scale).astype(dq.dtype)
        _write((own_q.at[me], dq.at[batch, own, head]))

    @pl.when(me == WORKERS)
    def _():
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
        kv_head = lax.div(head, kind.group)

        @pl.loop(0, stop - first)
        def _(t):
            met = pl.ds((first + t) * sizes.met, sizes.met)
            copies = (k, ring_k), (v, ring_v)
            copies = [(x.at[batch, met, kv_head], ring) for x, ring in copies]
            _refill(t, sizes, free, ready, *copies, (_at(ids, batch, met), ring_ids))


def d_keys_and_values(
    q, k, v, d_out, lse, delta, ranges, ids, dk, dv,
    own_k, own_v, own_ids, ring_q, ring_d_out, ring_lse, ring_delta, ring_ids,
    ready_own, ready, free,
    *, sizes: Sizes, kind: Kind,
):  # fmt: skip
    """Keys and values meet the queries of all heads that share them, for their gradients."""
    (batch, kv_head, block), me = _place(ranges)
    first, clear, border, stop = _bounds(ranges, batch, block)
    start = (block * WORKERS + me) * sizes.own
    own = pl.ds(start, sizes.own)
    n = stop - first

    def step(g, i, sums, is_clear):
        slot = lax.rem(g * n + i - first, sizes.slots)
        plgpu.barrier_wait(ready.at[slot])
        scores, d_weights = _products(
            (own_k.at[me], _turned(ring_q.at[slot])), (own_v.at[me], _turned(ring_d_out.at[slot]))
        )
        scores *= kind.scale * LOG2E
        if not is_clear:
            of_ids = _at(own_ids, me), _at(ring_ids, slot)
            scores = _hide(scores, start - i * sizes.met, of_ids, kind.window, own_is_key=True)
        weights = jnp.exp2(scores - _along(_vector(ring_lse.at[slot], BY_COLUMN), scores, 1))
        d_weights -= _along(_vector(ring_delta.at[slot], BY_COLUMN), scores, 1)
        d_scores = (weights * d_weights).astype(q.dtype), ring_q.at[slot]
        sums = _add_products(sums, (d_scores, (weights.astype(q.dtype), ring_d_out.at[slot])), kind)
        _release(free.at[slot], kind)
        return sums

    @pl.when(me < WORKERS)
    def _():
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        _copy(
            me, ready_own,
            (k.at[batch, own, kv_head], own_k), (v.at[batch, own, kv_head], own_v),
            (_at(ids, batch, own), own_ids),
        )  # fmt: skip
        plgpu.barrier_wait(ready_own.at[me])
        zeros = _full((sizes.own, k.shape[3]), 0, MATRIX)
        loops = (first, clear, False), (clear, border, True), (border, stop, False)
        loops = loops if _has_edge(kind) else loops[:2]

        def of_head(g, sums):
            return _loops(loops, functools.partial(step, g), sums)

        sum_k, sum_v = lax.fori_loop(0, kind.group, of_head, (zeros, zeros))
        own_k.at[me][...] = (sum_k * kind.scale).astype(dk.dtype)
        own_v.at[me][...] = sum_v.astype(dv.dtype)
        to_k, to_v = (x.at[batch, own, kv_head] for x in (dk, dv))
        _write((own_k.at[me], to_k), (own_v.at[me], to_v))

    @pl.when(me == WORKERS)
    def _():
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

        @pl.loop(0, kind.group * n)
        def _(t):
            head = kv_head * kind.group + lax.div(t, n)
            met = pl.ds((first + lax.rem(t, n)) * sizes.met, sizes.met)
            _refill(
                t, sizes, free, ready,
                (q.at[batch, met, head], ring_q), (d_out.at[batch, met, head], ring_d_out),
                (lse.at[batch, head, met], ring_lse), (delta.at[batch, head, met], ring_delta),
                (_at(ids, batch, met), ring_ids),
            )  # fmt: skip


def _place(ranges: Any) -> tuple[tuple[Any, Any, Any], Any]:
    """Which batch, head and block this is, and which of its warpgroups. The last block begins."""
    batch, head, block = (lax.axis_index(axis) for axis in AXES)
    return (batch, head, ranges.shape[1] - 1 - block), lax.axis_index(WARPGROUP)


def _bounds(ranges: Any, batch: Any, block: Any) -> list[Any]:
    row = batch if ranges.shape[0] > 1 else 0
    return [ranges[row, block, i] for i in range(ranges.shape[2])]


def _has_edge(kind: Kind) -> bool:
    """Whether more than the diagonal needs a mask."""
    return kind.window is not None or kind.has_documents


def _loops(loops: Any, step: Callable[..., Any], carry: Any) -> Any:
    for start, stop, is_clear in loops:
        carry = lax.fori_loop(start, stop, lambda i, x, c=is_clear: step(i, x, c), carry)
    return carry


def _copy(slot: Any, ready: Any, *copies: Any) -> None:
    for source, into in copies:
        if into is not None:
            plgpu.copy_gmem_to_smem(source, into.at[slot], ready.at[slot])


def _refill(t: Any, sizes: Sizes, free: Any, ready: Any, *copies: Any) -> None:
    """Copy what step t needs, as soon as its slot is free."""
    slot = lax.rem(t, sizes.slots)

    @pl.when(t >= sizes.slots)
    def _():
        plgpu.barrier_wait(free.at[slot])

    _copy(slot, ready, *copies)


def _release(free: Any, kind: Kind) -> None:
    if kind.is_interpreted:  # asks for a fence before what was read may be copied over
        plgpu.commit_smem()
    plgpu.barrier_arrive(free)


def _write(*copies: Any) -> None:
    plgpu.commit_smem()
    for source, into in copies:
        plgpu.copy_smem_to_gmem(source, into)
    plgpu.wait_smem_to_gmem(0)


def _products(*pairs: Any, then: Callable[[], None] | None = None) -> list[jax.Array]:
    """fp32 products, all of them begun before the first is awaited; `then` is called in between."""

    def run(*sums):
        for into, pair in zip(sums, pairs, strict=True):
            plgpu.wgmma(into, *pair)
        if then is not None:
            then()
        return [x[...] for x in sums]

    return pl.run_scoped(run, *(ACC((a.shape[0], b.shape[1]), F32) for a, b in pairs))


def _add_products(sums: Any, pairs: Any, kind: Kind) -> Any:
    """Each sum with a product added to it, in the same registers."""
    if kind.is_interpreted:  # there a product takes nothing from registers and begins with zeros
        dot = functools.partial(jnp.dot, preferred_element_type=F32)
        return tuple(x + dot(a, b[...]) for x, (a, b) in zip(sums, pairs, strict=True))

    def run(refs):
        for into, pair in zip(refs, pairs, strict=True):
            plgpu.wgmma(into, *pair)

    return pl.run_state(run)(tuple(ACC.init(x) for x in sums))


def _hide(
    scores: jax.Array, offset: Any, ids: Any, window: int | None, own_is_key: bool = False
) -> jax.Array:
    """The scores, HIDDEN where nothing is to be seen.

    offset: position of the first row less that of the first column; ids: those of both, or Nones.
    """
    # Vectors, since the compiler keeps what does not change: a matrix of distances would not fit.
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, dimension=0)
    row = _along(iota(scores.shape[:1], layout=BY_ROW) + offset, scores, 0)
    column = _along(iota(scores.shape[1:], layout=BY_COLUMN), scores, 1)
    seen = column >= row if own_is_key else column <= row
    if window is not None:
        seen &= column < row + window if own_is_key else column > row - window
    if ids[0] is not None:
        of_row, of_column = _vector(ids[0], BY_ROW), _vector(ids[1], BY_COLUMN)
        seen &= _along(of_row, scores, 0) == _along(of_column, scores, 1)
    return jnp.where(seen, scores, HIDDEN)


def _at(ref: Any, *index: Any) -> Any:
    return None if ref is None else ref.at[index]


def _turned(ref: Any) -> Any:
    return ref.transpose((1, 0))


def _vector(ref: Any, layout: Any) -> jax.Array:
    return plgpu.layout_cast(ref[...], layout)


def _along(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def _full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, F32), layout)
