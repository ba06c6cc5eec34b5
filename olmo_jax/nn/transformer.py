"""The one Transformer of all OLMo generations: embedding, a scan over blocks, head."""

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.kernels import ring
from olmo_jax.nn import rope
from olmo_jax.nn.attention import Attention
from olmo_jax.nn.layers import MLP, einsum, lookup, matrix_init, norm, normal, weight
from olmo_jax.nn.moe import MoE
from olmo_jax.parallel.sharding import axis_size, constrain

Params = dict[str, Any]


class Block(nn.Module):
    """Attention and MLP on the residual stream, norms before (OLMo 1) or after them (OLMo 2)."""

    config: ModelConfig
    compute: ComputeConfig
    stats: bool = False  # also return the RMS of the output

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: dict[str, jax.Array],
        tables: rope.Table,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`x [batch, seq, d_model]` -> the same shape, and this layer's statistics if asked for.

        Args:
          x: the residual stream.
          layer: int32 `kind` (entry of `tables`) and `index` of this layer.
          tables: of RoPE, per kind.
          segment_ids: [batch, seq], or None.
        """
        c = self.config
        before, gain = c.norm_position == "before", c.post_norm_init
        attend = Attention(c, self.compute, name="attn")

        y = norm(self, "attn_norm", x, c) if before else x
        y = attend(y, layer["kind"], layer["index"], tables, segment_ids)
        y = checkpoint_name(y, "attention_projected")
        x = x + (y if before else norm(self, "attn_norm", y, c, gain))
        x = constrain(x, ("batch", "seq", None))

        y = norm(self, "mlp_norm", x, c) if before else x
        if c.n_experts:
            y, stats = MoE(c, self.compute, name="moe")(y, layer["index"])
        else:
            y, stats = MLP(c, self.compute, name="mlp")(y, layer["index"]), {}
        y = checkpoint_name(y, "mlp_projected")
        x = x + (y if before else norm(self, "mlp_norm", y, c, gain))
        x = constrain(x, ("batch", "seq", None))
        if self.stats:
            stats["activation rms"] = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
        return x, stats


# What the backward pass finds saved; the rest is computed again. Names are set in `nn/` and in
# `kernels/`. For its memory the output of the MLP saves the most work, where a norm follows it.
_QKV = ("attention_q", "attention_k", "attention_v", "attention_out", "mlp_projected")
_REMAT: dict[str, Any] = {
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out"),
    "qkv": jax.checkpoint_policies.save_only_these_names(*_QKV),
    "qkv_mlp": jax.checkpoint_policies.save_only_these_names(
        *_QKV, "attention_projected", "gate", "up"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*_QKV],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Transformer(nn.Module):
    """A decoder-only language model; `model.apply({"params": params}, tokens)` gives logits."""

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig(dtype="float32", remat="none")

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        output: str = "logits",
    ) -> Any:
        """Score every next token.

        Args:
          tokens: [batch, seq] int32.
          positions: [batch, seq] int32 within the document; None: 0, 1, 2, …
          segment_ids: [batch, seq] int32, equal within a document; None: one document.
          output: "logits", "hidden", or "stats".

        Returns:
          logits: fp32 `[batch, seq, vocab_size]`. hidden: what the head multiplies,
          `[batch, seq, d_model]`, and what the routers did (`MoE`), `{name: [n_layers, …]}`, empty
          without experts. stats: the same with `activation rms`.
        """
        c = self.config
        # Inside, a split sequence is in the order of the ring; outside nobody needs to know.
        is_split = axis_size("context") > 1 and not self.is_initializing()
        if is_split:
            given = tokens, positions, segment_ids
            tokens, positions, segment_ids = jax.tree.map(ring.to_zigzag, given)
        embed_std = c.embed_init_std
        init = normal(embed_std) if embed_std is not None else matrix_init(c, c.d_model)
        embed = weight(self, "embed", (c.vocab_rows, c.d_model), ("vocab", "embed"), init)
        with jax.named_scope("embed"):
            x: Any = lookup(embed, tokens, self.compute.dtype, self.compute.grad_dtype)
            x = constrain(x, ("batch", "seq", None))

        if positions is None:
            seq = tokens.shape[1]
            positions = (ring.order(seq) if is_split else jnp.arange(seq))[None]
        kinds, tables = rope.kinds(c), rope.tables(c, positions)
        layer = {
            "kind": jnp.array([kinds.index(kind) for kind in c.layer_kinds], jnp.int32),
            "index": jnp.arange(c.n_layers, dtype=jnp.int32),
        }
        block = Block
        if self.compute.remat != "none":
            policy = _REMAT[self.compute.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]
            length=c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = scan(c, self.compute, output == "stats", name="layers")
        x, stats = blocks(x, layer, tables, segment_ids)
        x = norm(self, "final_norm", x, c)
        x = ring.from_zigzag(x) if is_split else x

        if self.is_initializing() and not c.tie_embeddings:
            head_std = c.head_init_std
            init = normal(head_std) if head_std is not None else matrix_init(c, c.d_model)
            weight(self, "lm_head", (c.d_model, c.vocab_rows), ("embed", "vocab"), init)
        if output == "logits" and not self.is_initializing():
            # fp32 out of the product, as OLMo-core's head does for its loss.
            w = head(self.variables["params"])
            logits = cast("jax.Array", einsum("btd,dv->btv", x.astype(jnp.float32), w))
            return logits[..., : c.vocab_size]
        return x if output == "logits" else (x, stats)


def head(params: Mapping[str, Any]) -> jax.Array:
    """The matrix that turns hidden states into logits, `[d_model, vocab_rows]`."""
    return params["embed"].T if "lm_head" not in params else params["lm_head"]


def init(model: Transformer, key: jax.Array) -> Params:
    """Fresh parameters, fp32; the values do not depend on a mesh."""
    variables: Any = model.init(key, jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(variables["params"])


def logical_axes(model: Transformer) -> Any:
    """The tree of parameters with each leaf replaced by its logical axes."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)
