"""The XLA twin of every kernel: plain, right, and what the others are tested against."""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Causal attention with dense scores; see `kernels.attention.attention` for the contract.

    `positions [seq]` says where each query and key stands; None: 0, 1, 2, …
    """
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    mask = visible(seq, window, segment_ids, positions)[:, None, None]
    scores = jnp.where(mask, scores * dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, seq, heads, dim)


def visible(
    seq: int,
    window: int | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query sees: bool `[1 or batch, seq (queries), seq (keys)]`."""
    positions = jnp.arange(seq) if positions is None else positions
    query, key = positions[:, None], positions[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    mask = mask[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask
