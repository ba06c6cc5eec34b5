"""Attention in blocks of queries, in plain XLA: no scores that the mask hides, none kept.

Of a causal square nearly half is hidden, of a window nearly all: each block of queries meets only
the keys that it can see. The backward pass computes the scores again from the row sums, as in
FlashAttention (arXiv 2205.14135), so memory grows with the sequence, not with its square.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MIN_BLOCK, MAX_BLOCKS = 64, 8  # queries; blocks are unrolled, each costs compile time


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Causal attention by blocks; see `kernels.attention.attention` for the contract."""
    return _forward(q, k, v, window, segment_ids)[0]


def _forward(q, k, v, window, segment_ids):
    shape = q.shape
    q, k, v = _by_head(q, k), _by_head(k, k), _by_head(v, k)
    out, lse = [], []
    for rows, keys in _blocks(q.shape[3], window):
        scores = _scores(q[..., rows, :], k[..., keys, :], rows, keys, window, segment_ids)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = _product("bkgts,bkgsh->bkgth", weights.astype(v.dtype), v[..., keys, :])
        out.append((mixed / total).astype(q.dtype))
        lse.append(top + jnp.log(total))
    out = jnp.concatenate(out, 3)
    return out, None
