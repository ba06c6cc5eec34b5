"""Self-attention of every OLMo generation: projections, QK-norm, clipping, RoPE, attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.kernels import rotary
from olmo_jax.kernels.attention import attention
from olmo_jax.nn import rope
from olmo_jax.nn.layers import einsum, rms_norm, weight
from olmo_jax.parallel.sharding import constrain


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys and values."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: jax.Array,
        tables: rope.Table,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Mix positions.

        Args:
          x: [batch, seq, d_model], positions in `ring.order`.
          kind: int32, which of `rope.kinds` this layer is.
          tables: of RoPE per kind of layer, as `rope.tables` makes them.
          segment_ids: [batch, seq], or None.

        Returns: [batch, seq, d_model].
        """
        c, product = self.config, functools.partial(einsum, grad_dtype=self.compute.grad_dtype)
        n, k, h = c.n_heads, c.n_kv_heads, c.head_dim
        wq, wk, wv, wo = (weight(self, f"layers/attn/{w}") for w in ("wq", "wk", "wv", "wo"))

        # Flat, as the products make them and as a TPU's kernels take them.
        q, key, value = (
            product(into, x, w).reshape(*x.shape[:2], -1)
            for into, w in (("btd,dnh->btnh", wq), ("btd,dkh->btkh", wk), ("btd,dkh->btkh", wv))
        )
        if c.clip_qkv is not None:
            q, key, value = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, key, value))
        q_gain = k_gain = None
        if c.qk_norm == "full":
            q_gain, k_gain = (weight(self, f"layers/attn/{x}_norm") for x in "qk")
        # What a remat policy may keep; norm and rotation cost less than memory for their results.
        q, key, value = (
            checkpoint_name(y, f"attention_{name}")
            for y, name in ((q, "q"), (key, "k"), (value, "v"))
        )

        cos, sin = (table[kind] for table in tables)
        factor, scale = rotary.scales(h)
        q = norm_rotate(q, q_gain, (factor * cos, factor * sin), n, c.norm_eps)
        key = norm_rotate(key, k_gain, (cos, sin), k, c.norm_eps)

        mixed = _by_kind(c, self.compute.attention, kind, (q, key, value), segment_ids, scale)
        return product("btnh,nhd->btd", mixed.reshape(*x.shape[:2], n, h), wo)


def _by_kind(
    c: ModelConfig,
    impl: str,
    kind: jax.Array,
    flat: tuple[jax.Array, jax.Array, jax.Array],
    segment_ids: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Attention with the window of this kind of layer, flat in and out."""

    def core(window: int | None, *flat: jax.Array) -> jax.Array:
        q, key, value = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in flat)
        q = constrain(q, ("batch", "seq", "heads", None))
        key = constrain(key, ("batch", "seq", "kv_heads", None))
        value = constrain(value, ("batch", "seq", "kv_heads", None))
        out = attention(
            q, key, value, window=window, segment_ids=segment_ids, scale=scale, impl=impl
        )
        return out.reshape(*out.shape[:2], -1)

    windows = [c.window if name == "sliding" else None for name in rope.kinds(c)]
    branches = [functools.partial(core, window) for window in windows]
    if len(branches) == 1:
        return branches[0](*flat)
    # No weights inside the switch: their gradients would be reduced in each branch.
    return jax.lax.switch(kind, branches, *flat)


def norm_rotate(
    x: jax.Array, gain: jax.Array | None, table: rope.Table, n: int, eps: float
) -> jax.Array:
    """QK-norm and RoPE of flat queries or keys.

    Args:
      x: [batch, seq, n · head_dim].
      gain: [n, head_dim] of the norm over all heads together; None: no norm.
      table: cos and sin, `[1 or batch, seq, head_dim / 2]`.
      n: heads.
      eps: of the norm.
    """
    if rotary.fits(x.shape[-1] // n):  # otherwise XLA does it, and sums over split heads
        return rotary.norm_rotate(x, None if gain is None else gain.reshape(-1), *table, eps)
    y = x.reshape(*x.shape[:2], n, -1)
    if gain is not None:
        y = rms_norm(y, gain, eps)
    return rope.rotate(y, table).reshape(x.shape)
