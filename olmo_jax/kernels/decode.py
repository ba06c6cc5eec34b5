"""Attention of new tokens over a cache of keys and values: memory-bound, so plain XLA."""

import jax
import jax.numpy as jnp


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """Attention of the newest positions of each row over its cache.

    Args:
      q: [batch, new, n_heads, head_dim], of the last `new` positions of each row, mostly one.
      k_cache, v_cache: [batch, max_len, n_kv_heads, head_dim], position by position from 0 on;
        n_heads is a multiple of n_kv_heads. What lies behind a row's length is finite and not seen.
      lengths: [batch] int32, positions in the cache, the new ones included: `new` or more.
      window: positions visible to the left, the own one included; None for all.

    Returns:
      [batch, new, n_heads, head_dim], in the dtype of q; softmax in fp32.
    """
    batch, new, heads, dim = q.shape
    max_len, kv_heads = k_cache.shape[1:3]
    q = q.reshape(batch, new, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_cache, preferred_element_type=jnp.float32)
    query = lengths[:, None, None] - new + jnp.arange(new)[None, :, None]
    key = jnp.arange(max_len)[None, None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    scores = jnp.where(seen[:, None, None], scores * dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_cache.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v_cache)
    return out.reshape(batch, new, heads, dim).astype(q.dtype)
