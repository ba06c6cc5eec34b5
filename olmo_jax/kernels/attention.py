"""Attention: one public function; masks are descriptions; `choose` says what "auto" means."""

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.kernels import blocked, reference
from olmo_jax.sharding import axis_size


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Causal attention of queries over keys, within documents and within a window.

    Args:
      q: [batch, seq, n_heads, head_dim].
      k, v: [batch, seq, n_kv_heads, head_dim]; n_heads is a multiple of n_kv_heads.
      window: positions visible to the left, the own one included; None for all.
      segment_ids: [batch, seq] int32, equal within a document; None for one document.
      impl: "auto", "blocked" or "reference". A named one never falls back.

    Returns:
      [batch, seq, n_heads, head_dim], in the dtype of q; softmax in fp32.

    Raises:
      NotImplementedError: for an implementation that does not exist.
    """
    if impl == "auto":
        impl = choose(axis_size("context"))
    if impl == "reference":
        out = reference.attention(q, k, v, window=window, segment_ids=segment_ids)
        return checkpoint_name(out, "attention_out")
    if impl == "blocked":
        return blocked.attention(q, k, v, segment_ids, window)
    raise NotImplementedError(f"attention impl={impl!r}: there are auto, blocked and reference")


def choose(context_ways: int) -> str:
    """What "auto" takes: blocks of queries need a sequence that is whole on each device."""
    return "reference" if context_ways > 1 else "blocked"
