"""Attention in blocks of queries, in plain XLA: no scores that the mask hides, none kept.

Nearly half of a causal square is hidden, of a window nearly all: each block of queries meets only
the keys that it can see. The backward pass makes the scores again, as in FlashAttention
(arXiv 2205.14135), so memory grows with the sequence and not with its square.

Inside, the queries of all heads that share a KV head are the rows `r` of one matrix, position by
position: `[batch, kv_heads, seq * heads per kv head, head_dim]`.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MIN_BLOCK, MAX_BLOCKS = 64, 8  # positions, and blocks: they are unrolled and take time to compile


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
    outs, lses = [], []
    for t, r, s in _blocks(q, k, window):
        scores = _scores(qs[:, :, r], ks[:, :, s], t, s, segment_ids, window)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        outs.append(_product("bkrs,bksh->bkrh", weights.astype(v.dtype), vs[:, :, s]) / total)
        lses.append(top + jnp.log(total))
    out = _positions(jnp.concatenate(outs, 2), q)
    # Named here, so that a remat policy that keeps them needs no second forward pass.
    out, lse = (checkpoint_name(x, "attention_out") for x in (out, jnp.concatenate(lses, 2)))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(window, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out, -1, keepdims=True)
    qs, ks, vs, d_outs, delta = (_rows(x, k.shape[2]) for x in (q, k, v, d_out, delta))
    dq, dk, dv = [], jnp.zeros(ks.shape, jnp.float32), jnp.zeros(vs.shape, jnp.float32)
    for t, r, s in _blocks(q, k, window):
        scores = _scores(qs[:, :, r], ks[:, :, s], t, s, segment_ids, window)
        weights = jnp.exp(scores - lse[:, :, r])
        d_weights = _product("bkrh,bksh->bkrs", d_outs[:, :, r], vs[:, :, s])
        d_scores = weights * (d_weights - delta[:, :, r]) * q.shape[-1] ** -0.5
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
        dq.append(_product("bkrs,bksh->bkrh", d_scores, ks[:, :, s]))
        dk = dk.at[:, :, s].add(_product("bkrs,bkrh->bksh", d_scores, qs[:, :, r]))
        dv = dv.at[:, :, s].add(_product("bkrs,bkrh->bksh", weights, d_outs[:, :, r]))
    return _positions(jnp.concatenate(dq, 2), q), _positions(dk, k), _positions(dv, v), None


attention.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(q: jax.Array, k: jax.Array, window: int | None) -> Iterator[tuple[slice, slice, slice]]:
    """For each block its positions, its rows, and the keys that any of them sees."""
    seq, group = q.shape[1], q.shape[2] // k.shape[2]
    size = max(MIN_BLOCK, -(-seq // MAX_BLOCKS))
    for start in range(0, seq, size):
        stop = min(start + size, seq)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(start * group, stop * group), slice(first, stop)


def _scores(
    q: jax.Array,
    k: jax.Array,
    t: slice,
    s: slice,
    segment_ids: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """fp32 scores `[batch, kv_heads, rows, keys]` of a block, hidden ones at the lowest number."""
    scores = _product("bkrh,bksh->bkrs", q, k) * q.shape[-1] ** -0.5
    group = q.shape[2] // (t.stop - t.start)
    query = t.start + jnp.arange(q.shape[2])[:, None] // group
    key = jnp.arange(s.start, s.stop)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    seen = seen[None]
    if segment_ids is not None:
        of_query = jnp.repeat(segment_ids[:, t], group, axis=1)
        seen &= of_query[:, :, None] == segment_ids[:, None, s]
    return jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min)


def _rows(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, seq, heads, dim] -> [batch, kv_heads, seq * heads per kv head, dim]."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    return jnp.moveaxis(x, 2, 1).reshape(batch, kv_heads, -1, dim)


def _positions(x: jax.Array, like: jax.Array) -> jax.Array:
    """The way back from `_rows`, to the shape and dtype of `like`."""
    batch, seq, heads, dim = like.shape
    x = x.reshape(batch, x.shape[1], seq, heads // x.shape[1], dim)
    return jnp.moveaxis(x, 1, 2).reshape(like.shape).astype(like.dtype)
