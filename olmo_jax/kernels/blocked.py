"""Attention in blocks of queries, in plain XLA: no scores that the mask hides, none kept.

Nearly half of a causal square is hidden, of a window nearly all: each block of queries meets only
the keys that it can see. The backward pass makes the scores again, as in FlashAttention
(arXiv 2205.14135), so memory grows with the sequence and not with its square.

Inside, the queries of all heads that share a KV head are the rows `r` of one matrix, position by
position: `[batch, kv_heads, seq * heads per kv head, head_dim]`.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.kernels.schedule import LOG2E

MIN_BLOCK, MAX_BLOCKS = 64, 8  # positions, and blocks: they are unrolled and take time to compile


class Mask(NamedTuple):
    """Which keys a query sees."""

    window: int | None
    q_ids: Any  # [batch, seq]; or None
    kv_ids: Any
    offset: int = 0  # position of the first query minus that of the first key


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Causal attention by blocks; see `kernels.attention.attention` for the contract."""
    return _forward(q, k, v, segment_ids, window)[0]


def _forward(q, k, v, segment_ids, window):
    qs, ks, vs = (_rows(x, k.shape[2]) for x in (q, k, v))
    out, lse = _attend(qs, ks, vs, Mask(window, segment_ids, segment_ids), q.shape[1])
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (_positions(out, q), lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(window, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out, -1, keepdims=True)
    qs, ks, vs, delta, d_outs = (_rows(x, k.shape[2]) for x in (q, k, v, delta, d_out))
    mask = Mask(window, segment_ids, segment_ids)
    grads = _gradients(qs, ks, vs, lse, delta, d_outs, mask, q.shape[1])
    return *(_positions(x, like) for x, like in zip(grads, (q, k, v), strict=True)), None


attention.defvjp(_forward, _backward)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array | None = None,
    kv_ids: jax.Array | None = None,
    *,
    head_dim: int,
    window: int | None,
    offset: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp of queries over keys: the contract of `pallas_tpu.forward`.

    The scale is head_dim ** -0.5; the offset is 0 or more and is not traced. Each block of queries
    must reach some key; a query that sees none has a logsumexp near the lowest number.
    """
    q, k, v = (_by_head(x, head_dim) for x in (q, k, v))
    qs, ks, vs = (_rows(x, k.shape[2]) for x in (q, k, v))
    out, lse = _attend(qs, ks, vs, Mask(window, q_ids, kv_ids, offset), q.shape[1])
    lse = _positions(lse, jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32))
    return _flat(_positions(out, q)), lse.transpose(0, 2, 3, 1) * LOG2E


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
    offset: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes: the contract of `pallas_tpu.backward`."""
    q, k, v, d_out = (_by_head(x, head_dim) for x in (q, k, v, d_out))
    lse, delta = (x.transpose(0, 3, 1, 2) for x in (lse / LOG2E, delta))
    qs, ks, vs, lse, delta, d_outs = (_rows(x, k.shape[2]) for x in (q, k, v, lse, delta, d_out))
    mask = Mask(window, q_ids, kv_ids, offset)
    dq, dk, dv = _gradients(qs, ks, vs, lse, delta, d_outs, mask, q.shape[1])
    return _flat(_positions(dq, q)), _flat(_positions(dk, k)), _flat(_positions(dv, v))


def delta(out: jax.Array, d_out: jax.Array, *, head_dim: int) -> jax.Array:
    """The products of output and its gradient, summed: the contract of `pallas_tpu.delta`."""
    out, d_out = (_by_head(x, head_dim) for x in (out, d_out))
    return jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)[:, :, None]


def _attend(q, k, v, mask, seq):
    """Output and natural logsumexp of rows `[batch, kv_heads, seq * heads per kv head, …]`."""
    outs, lses = [], []
    for t, r, s in _blocks(seq, k.shape[2], q.shape[2] // seq, mask):
        scores = _scores(q[:, :, r], k[:, :, s], t, s, mask)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        outs.append(_product("bkrs,bksh->bkrh", weights.astype(v.dtype), v[:, :, s]) / total)
        lses.append(top + jnp.log(total))
    return jnp.concatenate(outs, 2), jnp.concatenate(lses, 2)


def _gradients(q, k, v, lse, delta, d_out, mask, seq):
    """Of q, k and v in rows, fp32; `lse` and `delta` of the rows."""
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for t, r, s in _blocks(seq, k.shape[2], q.shape[2] // seq, mask):
        scores = _scores(q[:, :, r], k[:, :, s], t, s, mask)
        weights = jnp.exp(scores - lse[:, :, r])
        d_weights = _product("bkrh,bksh->bkrs", d_out[:, :, r], v[:, :, s])
        d_scores = weights * (d_weights - delta[:, :, r]) * q.shape[-1] ** -0.5
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
        dq.append(_product("bkrs,bksh->bkrh", d_scores, k[:, :, s]))
        dk = dk.at[:, :, s].add(_product("bkrs,bkrh->bksh", d_scores, q[:, :, r]))
        dv = dv.at[:, :, s].add(_product("bkrs,bkrh->bksh", weights, d_out[:, :, r]))
    return jnp.concatenate(dq, 2), dk, dv


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(
    q_seq: int, kv_seq: int, group: int, mask: Mask
) -> Iterator[tuple[slice, slice, slice]]:
    """For each block its positions, its rows, and the keys that any of them sees."""
    size = max(MIN_BLOCK, -(-q_seq // MAX_BLOCKS))
    for start in range(0, q_seq, size):
        stop = min(start + size, q_seq)
        first = 0 if mask.window is None else max(0, start + mask.offset - mask.window + 1)
        seen = slice(first, min(stop + mask.offset, kv_seq))
        yield slice(start, stop), slice(start * group, stop * group), seen


def _scores(q: jax.Array, k: jax.Array, t: slice, s: slice, mask: Mask) -> jax.Array:
    """fp32 scores `[batch, kv_heads, rows, keys]` of a block, hidden ones at the lowest number."""
    scores = _product("bkrh,bksh->bkrs", q, k) * q.shape[-1] ** -0.5
    group = q.shape[2] // (t.stop - t.start)
    query = mask.offset + t.start + jnp.arange(q.shape[2])[:, None] // group
    key = jnp.arange(s.start, s.stop)[None, :]
    seen = key <= query
    if mask.window is not None:
        seen &= key > query - mask.window
    seen = seen[None]
    if mask.q_ids is not None:
        of_query = jnp.repeat(mask.q_ids[:, t], group, axis=1)
        seen &= of_query[:, :, None] == mask.kv_ids[:, None, s]
    return jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)


def _rows(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, seq, heads, dim] -> [batch, kv_heads, seq * heads per kv head, dim]."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    return jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, -1, dim)


def _positions(x: jax.Array, like: Any) -> jax.Array:
    """The way back from `_rows`, to the shape and dtype of `like`."""
    batch, seq, heads, dim = like.shape
    x = x.reshape(batch, x.shape[1], seq, heads // x.shape[1], dim)
    return jnp.moveaxis(x, 1, 2).reshape(like.shape).astype(like.dtype)


def _by_head(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, head_dim)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)
