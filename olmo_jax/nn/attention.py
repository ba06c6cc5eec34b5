"""Self-attention of every OLMo generation: projections, QK-norm, clipping, RoPE, attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config import ComputeConfig, ModelConfig
from olmo_jax.kernels.attention import attention
from olmo_jax.nn import rope
from olmo_jax.nn.layers import constant, einsum, matrix_init, rms_norm, weight
from olmo_jax.sharding import constrain


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys and values."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: jax.Array,
        layer: jax.Array,
        tables: dict[str, rope.Table],
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Mix positions.

        Args:
          x: [batch, seq, d_model], positions in `ring.order`.
          kind: int32, which entry of `tables` this layer is.
          layer: int32, the layer's index, for the initial scale.
          tables: RoPE tables per kind of layer that the model has.
          segment_ids: [batch, seq], or None.

        Returns: [batch, seq, d_model].
        """
        c, product = self.config, functools.partial(einsum, grad_dtype=self.compute.grad_dtype)
        d, n, k, h = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
        init = matrix_init(c, d)
        wq = weight(self, "wq", (d, n, h), ("embed", "heads", "head_dim"), init)
        wk = weight(self, "wk", (d, k, h), ("embed", "kv_heads", "head_dim"), init)
        wv = weight(self, "wv", (d, k, h), ("embed", "kv_heads", "head_dim"), init)
        out_init = matrix_init(c, n * h, layer)
        wo = weight(self, "wo", (n, h, d), ("heads", "head_dim", "embed"), out_init)

        q = product("btd,dnh->btnh", x, wq)
        key = product("btd,dkh->btkh", x, wk)
        value = product("btd,dkh->btkh", x, wv)
        if c.clip_qkv is not None:
            q, key, value = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, key, value))
        if c.qk_norm == "full":  # over all heads together; under tensor sharding XLA sums squares
            q_norm = weight(self, "q_norm", (n, h), ("heads", "head_dim"), constant(1.0))
            k_norm = weight(self, "k_norm", (k, h), ("kv_heads", "head_dim"), constant(1.0))
            q, key = rms_norm(q, q_norm, c.norm_eps), rms_norm(key, k_norm, c.norm_eps)
        q, key, value = (
            checkpoint_name(y, f"attention_{name}")
            for y, name in ((q, "q"), (key, "k"), (value, "v"))
        )

        if self.is_initializing():  # one token, which no mesh can split
            return x

        def core(name: str, q: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            q = constrain(rope.rotate(q, tables[name]), ("batch", "seq", "heads", None))
            key = constrain(rope.rotate(key, tables[name]), ("batch", "seq", "kv_heads", None))
            value = constrain(value, ("batch", "seq", "kv_heads", None))
            window = c.window if name == "sliding" else None
            impl = self.compute.attention
            return attention(q, key, value, window=window, segment_ids=segment_ids, impl=impl)

        branches = [functools.partial(core, name) for name in tables]
        # No weights inside the switch: their gradients would be reduced in each branch.
        mixed = (
            branches[0](q, key, value)
            if len(branches) == 1
            else jax.lax.switch(kind, branches, q, key, value)
        )
        return product("btnh,nhd->btd", mixed, wo)
