"""Attention: one public function; masks are descriptions; an implementation is named or logged."""

import functools
import logging

import jax
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.kernels import blocked, reference
from olmo_jax.sharding import axis_size

log = logging.getLogger(__name__)


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
        impl = _choose(axis_size("context") > 1)
    if impl == "reference":
        out = reference.attention(q, k, v, window=window, segment_ids=segment_ids)
        return checkpoint_name(out, "attention_out")
    if impl == "blocked":
        return blocked.attention(q, k, v, segment_ids, window)
    raise NotImplementedError(f"attention impl={impl!r}: there are auto, blocked and reference")


@functools.cache  # a choice is logged once
def _choose(is_split: bool) -> str:
    """An implementation; blocks of queries need a sequence that is whole on each device."""
    if is_split:
        log.info("attention: auto takes reference (dense scores), as mesh.context splits queries")
        return "reference"
    log.info("attention: auto takes blocked (blocks of queries in XLA)")
    return "blocked"
