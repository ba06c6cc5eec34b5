"""The one Transformer of all OLMo generations: embedding, a scan over blocks, head."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.parameters import Parameter, nested, table
from olmo_jax.kernels import ring
from olmo_jax.nn import rope, stack
from olmo_jax.nn.attention import Attention
from olmo_jax.nn.layers import MLP, einsum, lookup, norm, weight
from olmo_jax.nn.moe import MoE
from olmo_jax.parallel.sharding import axis_size, constrain

Params = dict[str, Any]


class Block(nn.Module):
    """Attention and MLP on the residual stream, norms before (OLMo 1) or after them (OLMo 2)."""

    config: ModelConfig
    compute: ComputeConfig
    has_experts: bool
    has_stats: bool = False  # also return the RMS of the output

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kind: jax.Array,
        tables: rope.Table,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`x [batch, seq, d_model]` -> the same shape, and this layer's statistics if asked for.

        Args:
          x: the residual stream.
          kind: int32, the entry of `tables` for this layer.
          tables: of RoPE, per kind.
          segment_ids: [batch, seq], or None.
        """
        c = self.config
        before = c.norm_position == "before"
        attend = Attention(c, self.compute, name="attn")

        y = norm(self, "layers/attn_norm", x) if before else x
        y = attend(y, kind, tables, segment_ids)
        y = checkpoint_name(y, "attention_projected")
        x = x + (y if before else norm(self, "layers/attn_norm", y))
        x = constrain(x, ("batch", "seq", None))

        y = norm(self, "layers/mlp_norm", x) if before else x
        if self.has_experts:
            y, stats = MoE(c, self.compute, name="moe")(y)
        else:
            y, stats = MLP(c, self.compute, name="mlp")(y), {}
        y = checkpoint_name(y, "mlp_projected")
        x = x + (y if before else norm(self, "layers/mlp_norm", y))
        x = constrain(x, ("batch", "seq", None))
        if self.has_stats:
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


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: jax.Array  # [batch, seq, d_model], what the head multiplies; see `logits`
    cache: Any  # keys and values for what follows; None: no cache was given
    routed: dict[str, jax.Array]  # what the routers did, `{name: [n_layers, …]}`; see `MoE`
    stats: dict[str, jax.Array]  # "activation rms" of each layer [n_layers], if asked for


class Transformer(nn.Module):
    """A decoder-only language model; `model.apply({"params": params}, tokens)` gives `Output`."""

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig(dtype="float32", remat="none")

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        has_stats: bool = False,
    ) -> Output:
        """The hidden state of every token; `logits` makes scores of next tokens of it.

        Args:
          tokens: [batch, seq] int32.
          positions: [batch, seq] int32 within the document; None: 0, 1, 2, …
          segment_ids: [batch, seq] int32, equal within a document; None: one document.
          has_stats: also gather `Output.stats`.
        """
        c = self.config
        # Inside, a split sequence is in the order of the ring; outside nobody needs to know.
        is_split = axis_size("context") > 1
        if is_split:
            given = tokens, positions, segment_ids
            tokens, positions, segment_ids = jax.tree.map(ring.to_zigzag, given)
        embed = weight(self, "embed")
        with jax.named_scope("embed"):
            x: Any = lookup(embed, tokens, self.compute.dtype, self.compute.grad_dtype)
            x = constrain(x, ("batch", "seq", None))

        if positions is None:
            seq = tokens.shape[1]
            positions = (ring.order(seq) if is_split else jnp.arange(seq))[None]
        kinds, tables = rope.kinds(c), rope.tables(c, positions)
        kind = jnp.array([kinds.index(kind) for kind in c.layer_kinds], jnp.int32)

        def apply(i: int, params: Params, x: jax.Array, kind: jax.Array) -> tuple[jax.Array, Any]:
            """A block as layer `i` has it, with the parameters of one layer."""
            has_experts = bool(c.n_experts) and i not in c.dense_layers
            block = Block(c, self.compute, has_experts, has_stats, parent=None, name="layers")
            return block.apply({"params": params}, x, kind, tables, segment_ids)  # type: ignore

        if self.compute.remat != "none":
            policy = _REMAT[self.compute.remat]
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=False, static_argnums=0)
        x, routed = stack.run(apply, c, self.variables["params"].get("layers", {}), x, kind)
        x = norm(self, "final_norm", x)
        x = ring.from_zigzag(x) if is_split else x

        stats = {"activation rms": routed.pop("activation rms")} if has_stats else {}
        return Output(x, None, routed, stats)


def logits(model: Transformer, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
    """Scores of next tokens, fp32 `[batch, seq, vocab_size]`.

    Args:
      model: the model.
      params: of it.
      hidden: [batch, seq, d_model], of `Output`.
    """
    if not model.config.tie_embeddings and "lm_head" not in params:
        raise ValueError("parameter lm_head is missing; the model has a head of its own")
    # fp32 out of the product, as OLMo-core's head does for its loss.
    scores = einsum("btd,dv->btv", hidden.astype(jnp.float32), head(params))
    return cast("jax.Array", scores)[..., : model.config.vocab_size]


def head(params: Mapping[str, Any]) -> jax.Array:
    """The matrix that turns hidden states into logits, `[d_model, vocab_rows]`."""
    return params["embed"].T if "lm_head" not in params else params["lm_head"]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters, fp32: a map over the table.

    Each depends on its path, its layer's number and the key alone: on no mesh, and on no other
    parameter or layer.
    """
    return nested({path: _start(path, row, key) for path, row in table(config).items()})


def _start(path: str, row: Parameter, key: jax.Array) -> jax.Array:
    if not row.start.std:
        return jnp.full(row.shape, row.start.constant, jnp.float32)
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))

    def draw(key: jax.Array, std: jax.Array | float) -> jax.Array:
        """`trunc_normal_` of OLMo and OLMo-core."""
        return std * jax.random.truncated_normal(key, -3.0, 3.0, row.sizes, jnp.float32)

    if row.layers is None:
        return draw(key, row.start.std)
    layers = jnp.array(row.layers, jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, layers)
    stds = row.start.std * ((layers + 1.0) ** -0.5 if row.start.falls else jnp.ones(len(layers)))
    return jax.vmap(draw)(keys, stds)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The tree of parameters as shapes; takes no memory."""
    rows = table(config).items()
    return nested({path: jax.ShapeDtypeStruct(row.shape, dtype) for path, row in rows})


def logical_axes(config: ModelConfig) -> Any:
    """The tree of parameters with each leaf replaced by its logical axes."""
    return nested({path: row.stored_axes for path, row in table(config).items()})
