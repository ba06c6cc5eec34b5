"""Attention over sequences that are split over the devices along the mesh axis `context`.

Over n devices a sequence is cut into 2n chunks, and device i holds chunks i and 2n-1-i: one that
sees little and one that sees much, which together see the same on every device ("zig-zag"). The
model puts its tokens into that order once, `to_zigzag`, and its output back, `from_zigzag`.

Without a window, keys and values go once around the ring of devices (arXiv 2310.01889). The late
chunk of a device sees all of every early chunk that comes by; the other pair that is visible is
early on early, or late on late. So a step is two chunks of queries over two chunks of keys, all
visible and the same for each device, and results are joined by their logsumexp. Backwards the
gradients of keys and values travel with them, in fp32, and in the end one step further: home.

With a window, each chunk fetches the keys before it that the window reaches, from the devices that
hold the chunks before it, and is then attended to at once. Nothing else is sent; a window beyond
half of the sequence would be better off in the ring.

Arrays are flat, `[batch, seq, heads · head_dim]`, as the kernels want them; inside they are
`[2, batch, chunk, heads · head_dim]`, the early and the late chunk of a device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.parallel.sharding import Axes, axis_size, on_each_device, spec

AXIS = "context"
EARLY, LATE = 0, 1
NOWHERE = jnp.iinfo(jnp.int32).min  # the document of keys before the first position
F32 = jnp.float32
HIDDEN = float(jnp.finfo(F32).min)  # the logsumexp of no keys


class RingKernel(NamedTuple):
    """Attention on one device, as `pallas_tpu` and `blocked` have it; only masks are open."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, ...]]
    delta: Callable[..., jax.Array]
    unit: int = 1  # it wants queries at multiples of this from keys


# --- the order of positions -----------------------------------------------------------------------


def order(seq: int) -> jax.Array:
    """The positions of a sequence as the devices of the mesh in force hold them, `[seq]` int32."""
    ways = axis_size(AXIS)
    if ways == 1:
        return jnp.arange(seq)
    early, size = jnp.arange(ways), seq // (2 * ways)
    chunks = jnp.stack([early, 2 * ways - 1 - early], 1).reshape(-1, 1)
    return (chunks * size + jnp.arange(size)[None]).reshape(-1)


def to_zigzag(x: jax.Array) -> jax.Array:
    """`[batch, seq, …]` in the order of positions, brought into that of `order`."""

    def run(x: jax.Array) -> jax.Array:  # device i has chunks 2i and 2i+1
        parts = zip(jnp.split(x, 2, axis=1), _moves(), strict=True)
        return _crossed_on_odd(*(jax.lax.ppermute(part, AXIS, moves) for part, moves in parts))

    return _over_positions(run, x)


def from_zigzag(x: jax.Array) -> jax.Array:
    """The way back of `to_zigzag`."""

    def run(x: jax.Array) -> jax.Array:
        x = _crossed_on_odd(*jnp.split(x, 2, axis=1))
        parts = zip(jnp.split(x, 2, axis=1), _moves(), strict=True)
        back = [jax.lax.ppermute(part, AXIS, [(b, a) for a, b in moves]) for part, moves in parts]
        return jnp.concatenate(back, axis=1)

    return _over_positions(run, x)


def _moves() -> list[list[tuple[int, int]]]:
    """From which device to which the even chunks go, and the odd ones."""
    n = axis_size(AXIS)
    return [[(i, min(c, 2 * n - 1 - c)) for i in range(n) for c in [2 * i + odd]] for odd in (0, 1)]


def _crossed_on_odd(a: jax.Array, b: jax.Array) -> jax.Array:
    """Both along axis 1; of an even chunk and an odd one, the even is early on even devices."""
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, b, a), jnp.where(is_odd, a, b)], axis=1)


def _over_positions(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    axes = spec(("batch", "seq", *(None,) * (x.ndim - 2)))
    return jax.shard_map(run, in_specs=axes, out_specs=axes)(x)


# --- attention ------------------------------------------------------------------------------------


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
    kernel: RingKernel,
) -> jax.Array:
    """Causal attention, positions in `order`; see `kernels.attention.attention` for the contract.

    The mesh in force divides batch and heads, and twice its `context` the sequence, into chunks
    that are multiples of the kernel's unit.
    """
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    out: Any = _attention(*flat, segment_ids, window, kernel)
    return out.reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, window, kernel):
    return _forward(q, k, v, segment_ids, window, kernel)[0]


_OF_Q: Axes = ("batch", "seq", "heads")
_OF_KV: Axes = ("batch", "seq", "kv_heads")
_IDS: Axes = ("batch", "seq")
_LSE: Axes = (None, "batch", "heads", None, "seq")


def _forward(q, k, v, segment_ids, window, kernel):
    def run(q, k, v, ids):
        q, k, v, ids = jax.tree.map(_chunks, (q, k, v, ids))
        out, lse = _attend(q, k, v, ids, window, kernel)
        return _positions(out, q.dtype), lse

    out, lse = on_each_device(
        run, (_OF_Q, _OF_KV, _OF_KV, _IDS), (_OF_Q, _LSE), q, k, v, segment_ids
    )
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(window, kernel, residuals, d_out):
    def run(q, k, v, ids, out, lse, d_out):
        q, k, v, ids, out, d_out = jax.tree.map(_chunks, (q, k, v, ids, out, d_out))
        delta = _unflat(kernel.delta(_flat(out), _flat(d_out)))
        grads = _gradients(q, k, v, ids, (lse, delta, d_out), window, kernel)
        return tuple(_positions(x, q.dtype) for x in grads)

    into = (_OF_Q, _OF_KV, _OF_KV, _IDS, _OF_Q, _LSE, _OF_Q)
    return *on_each_device(run, into, (_OF_Q, _OF_KV, _OF_KV), *residuals, d_out), None


_attention.defvjp(_forward, _backward)


def _attend(q, k, v, ids, window, kernel):
    """Output, fp32, and logsumexp `[2, batch, heads, 1, chunk]` of a device."""
    reach = _reach(window, q.shape[2], kernel)
    keys, own_ids = (_extended(x, reach) for x in (k, v)), _ids(ids, q, reach)
    own = kernel.forward(*map(_flat, (q, *keys)), *own_ids, window=window, offset=reach)
    out, lse = map(_unflat, own)
    if window is not None:
        return out.astype(F32), lse

    def meet(mine, other, theirs, sums, nothing):
        (q_here, q_ids), ((k, v), kv_ids) = _at((q, ids), mine), _at(theirs, other)
        run = functools.partial(
            kernel.forward, q_here, k, v, q_ids, kv_ids, window=None, offset=q_here.shape[1]
        )
        part = _where_documents_meet(q_ids, kv_ids, run, (0, HIDDEN))
        return _put(sums, _joined(_at(sums, mine), part), mine), nothing

    return _around(meet, (jnp.stack([k, v], 1), ids), (out.astype(F32), lse), ())[0]


def _gradients(q, k, v, ids, rows, window, kernel):
    """Gradients of q, k and v of a device; `rows`: logsumexp, delta and the output's gradient."""
    reach = _reach(window, q.shape[2], kernel)
    own_ids = _ids(ids, q, reach)
    keys, pull = jax.vjp(lambda *x: tuple(_extended(y, reach) for y in x), k, v)
    own = kernel.backward(
        *map(_flat, (q, *keys)), *own_ids, *map(_flat, rows), window=window, offset=reach
    )
    dq, *d_keys = map(_unflat, own)
    d_keys = pull(tuple(d_keys))
    if window is not None:
        return dq, *d_keys

    def meet(mine, other, theirs, dq, d_theirs):
        (q_here, q_ids, its_rows), ((k, v), kv_ids) = _at((q, ids, rows), mine), _at(theirs, other)
        run = functools.partial(
            kernel.backward, q_here, k, v, q_ids, kv_ids, *its_rows,
            window=None, offset=q_here.shape[1],
        )  # fmt: skip
        dq_here, *d_keys = _where_documents_meet(q_ids, kv_ids, run, (0, 0, 0))
        return _added(dq, dq_here, mine), _added(d_theirs, jnp.stack(d_keys), other)

    d_keys = jnp.stack(d_keys, 1).astype(F32)
    dq, d_keys = _around(meet, (jnp.stack([k, v], 1), ids), dq.astype(F32), d_keys)
    return dq, d_keys[:, 0], d_keys[:, 1]


def _joined(old, new):
    """Output and logsumexp over the keys of both."""
    (old_out, old_lse), (new_out, new_lse) = old, new
    top = jnp.maximum(old_lse, new_lse)
    old, new = jnp.exp2(old_lse - top), jnp.exp2(new_lse - top)
    total = old + new
    # A product spreads the number of a head over its columns; a broadcast would be written out by
    # head on a TPU, and then copied.
    heads = total.shape[1]
    columns = jnp.repeat(jnp.eye(heads, dtype=F32), old_out.shape[2] // heads, axis=1)
    spread = functools.partial(jnp.einsum, "bnot,nw->btw", precision=jax.lax.Precision.HIGHEST)
    out = spread(old / total, columns) * old_out + spread(new / total, columns) * new_out
    return out, top + jnp.log2(total)


# --- who meets whom -------------------------------------------------------------------------------


def _around(meet, theirs, here, there):
    """Every pair of chunks that is all visible, once; what is hidden is never met.

    Args:
      meet: `(mine, other, theirs, here, there) -> (here, there)`, with the numbers of a chunk of
        own queries and of a chunk of their keys.
      theirs: arrays that go around, of this device.
      here: sums of own queries.
      there: sums that go around with the arrays.

    Returns: both sums, `there` for the arrays of this device again.
    """
    n = axis_size(AXIS)

    def meet_both(step, theirs, here, there):
        here, there = meet(LATE, EARLY, theirs, here, there)
        # Of a device before this one the early chunk is visible, of one behind it the late one.
        side = (jax.lax.axis_index(AXIS) < step).astype(jnp.int32)
        return meet(side, side, theirs, here, there)

    def hop(carry, step):
        theirs, here, there = carry
        coming, there = _passed_on((theirs, there))  # on the way while this step computes
        return (coming, *meet_both(step, theirs, here, there)), None

    here, there = meet(LATE, EARLY, theirs, here, there)
    carry = _passed_on(theirs), here, there
    (theirs, here, there), _ = jax.lax.scan(hop, carry, jnp.arange(1, n - 1))
    here, there = meet_both(n - 1, theirs, here, _passed_on(there))
    return here, _passed_on(there)


def _passed_on(tree: Any) -> Any:
    """What the device before this one had."""
    n = axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _where_documents_meet(q_ids, kv_ids, run, otherwise):
    """`run()`, or arrays full of these numbers if no document is in both chunks."""
    if q_ids is None:
        return run()

    def nothing():
        shapes = zip(jax.eval_shape(run), otherwise, strict=True)
        return tuple(jnp.full(x.shape, number, x.dtype) for x, number in shapes)

    may_meet = (kv_ids.max(1) >= q_ids.min(1)) & (kv_ids.min(1) <= q_ids.max(1))
    return jax.lax.cond(may_meet.any(), run, nothing)


def _reach(window: int | None, chunk: int, kernel: RingKernel) -> int:
    """How many keys before a chunk its queries can see, in whole units of the kernel."""
    if window is None:
        return 0
    return min(-(-(window - 1) // kernel.unit) * kernel.unit, (2 * axis_size(AXIS) - 1) * chunk)


def _extended(x: jax.Array, reach: int) -> jax.Array:
    """Chunks with the `reach` positions before them in front; zeros before the first position."""
    n, parts, moving = axis_size(AXIS), [x], x
    up = [(i, i + 1) for i in range(n - 1)]
    while reach > 0:
        size = min(reach, x.shape[2])
        moving = moving[:, :, moving.shape[2] - size :]
        early = jax.lax.ppermute(moving[EARLY], AXIS, up)
        late = jax.lax.ppermute(moving[LATE], AXIS, [(b, a) for a, b in up])
        # The last device holds the two chunks in the middle: the late one follows on the early one.
        late = jnp.where(jax.lax.axis_index(AXIS) == n - 1, moving[EARLY], late)
        moving = jnp.stack([early, late])
        parts.insert(0, moving)
        reach -= size
    return jnp.concatenate(parts, 2)


def _ids(ids: jax.Array | None, q: jax.Array, reach: int) -> tuple[Any, Any]:
    """Documents of queries and of their keys, `[2 * batch, …]`, for chunks that are extended."""
    if reach == 0:
        ids = None if ids is None else _flat(ids)
        return ids, ids
    batch, chunk = q.shape[1:3]
    ids = jnp.zeros((2, batch, chunk), jnp.int32) if ids is None else ids
    here = jax.lax.axis_index(AXIS)
    first = jnp.stack([here, 2 * axis_size(AXIS) - 1 - here]) * chunk - reach
    exists = first[:, None] + jnp.arange(reach + chunk)[None] >= 0
    of_keys = jnp.where(exists[:, None], _extended(ids, reach), NOWHERE)
    return _flat(ids), _flat(of_keys)


# --- forms of arrays ------------------------------------------------------------------------------


def _chunks(x: jax.Array) -> jax.Array:
    """[batch, 2 * chunk, …] -> [2, batch, chunk, …]."""
    return jnp.moveaxis(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), 1, 0)


def _positions(x: jax.Array, dtype: Any) -> jax.Array:
    """The way back."""
    x = jnp.moveaxis(x.astype(dtype), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _flat(x: jax.Array) -> jax.Array:
    """Both chunks as rows of a batch."""
    return x.reshape(-1, *x.shape[2:])


def _unflat(x: jax.Array) -> jax.Array:
    return x.reshape(2, -1, *x.shape[1:])


def _at(tree: Any, chunk: Any) -> Any:
    """One of the two chunks."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, 0, False), tree)


def _put(tree: Any, parts: Any, chunk: Any) -> Any:
    """The tree with new parts in place of one of the two chunks."""
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, chunk, 0), tree, parts
    )


def _added(x: jax.Array, part: jax.Array, chunk: Any) -> jax.Array:
    """The array with a part added to one of the two chunks."""
    return _put(x, _at(x, chunk) + part, chunk)
