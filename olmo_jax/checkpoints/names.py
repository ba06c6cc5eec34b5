"""The names of others: what they call our parameters, and how they lay them out.

PyTorch stores a linear weight as [outputs, inputs] with heads merged; ours are [inputs…, outputs…].
Axes: v vocabulary rows, d d_model, n heads, k kv heads, h head_dim, f d_ff, e experts; brackets
merge axes.
Sources: transformers `models/olmo*/modeling_*.py`; OLMo-core `nn/hf/convert.py`; OLMo `model.py`.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import table

# `att_proj[1]`: the second of the parts stacked along the first axis of one PyTorch tensor. OLMo's
# ff_proj holds up before gate. Every key ends in `.weight`.
TABLE = """
ours                PyTorch's  Hugging Face                OLMo-core          OLMo
embed               v d        model.embed_tokens          embeddings         transformer.wte
layers/attn/wq      (n h) d    self_attn.q_proj            attention.w_q      att_proj[0]
layers/attn/wk      (k h) d    self_attn.k_proj            attention.w_k      att_proj[1]
layers/attn/wv      (k h) d    self_attn.v_proj            attention.w_v      att_proj[2]
layers/attn/wo      d (n h)    self_attn.o_proj            attention.w_out    attn_out
layers/attn/q_norm  (n h)      self_attn.q_norm            attention.q_norm   q_norm
layers/attn/k_norm  (k h)      self_attn.k_norm            attention.k_norm   k_norm
layers/attn_norm    d          post_attention_layernorm    attention_norm     attn_norm
layers/mlp/w_gate   f d        mlp.gate_proj               feed_forward.w1    ff_proj[1]
layers/mlp/w_up     f d        mlp.up_proj                 feed_forward.w3    ff_proj[0]
layers/mlp/w_down   d f        mlp.down_proj               feed_forward.w2    ff_out
layers/mlp_norm     d          post_feedforward_layernorm  feed_forward_norm  ff_norm
final_norm          d          model.norm                  lm_head.norm       transformer.ln_f
lm_head             v d        lm_head                     lm_head.w_out      transformer.ff_out
"""
# Experts: Hugging Face has a tensor for each, the others stack them. OLMo's are megablocks'.
EXPERTS = {
    "layers/moe/router": {
        "Hugging Face": ("e d", "mlp.gate.weight"),
        "OLMo-core": ("(e d)", "feed_forward_moe.router.weight"),
        "OLMo": ("e d", "ffn.router.layer.weight"),
    },
    **{
        f"layers/moe/{ours}": {
            "Hugging Face": (torch_axes, f"mlp.experts.{{expert}}.{theirs}.weight"),
            "OLMo-core": ("(e f) d", f"feed_forward_moe.experts.mlp.{core}"),
            "OLMo": ("(e f) d", f"ffn.experts.mlp.{legacy}"),
        }
        for ours, torch_axes, theirs, core, legacy in (
            ("w_gate", "f d", "gate_proj", "w1", "w1"),
            ("w_up", "f d", "up_proj", "w3", "v1"),
            ("w_down", "d f", "down_proj", "w2", "w2"),
        )
    },
}
# Where norms stand before the sub-layers, Hugging Face's names move.
BEFORE = {
    "layers/attn_norm": "input_layernorm",
    "layers/mlp_norm": "post_attention_layernorm",
}
LAYERS = {
    "Hugging Face": "model.layers.{layer}.",
    "OLMo-core": "blocks.{layer}.",
    "OLMo": "transformer.blocks.{layer}.",
}


class Row(NamedTuple):
    """A parameter in our tree and in PyTorch's."""

    ours: str  # path below `params/`
    axes: str  # ours, of one layer
    torch_axes: str
    key: str  # PyTorch's, with {layer}, and {expert} where each has its own
    part: int | None  # which of several parameters stacked in that tensor; None: it is alone there

    @property
    def is_layered(self) -> bool:
        """Whether there is one for each layer: ours are stacked, theirs are not."""
        return self.ours.startswith("layers/")

    @property
    def is_per_expert(self) -> bool:
        """Whether there is one for each expert of a layer."""
        return "{expert}" in self.key

    @property
    def inner_axes(self) -> str:
        """Our axes of one tensor of theirs."""
        return self.axes.removeprefix("e ") if self.is_per_expert else self.axes

    def key_of(self, layer: int, expert: int = 0) -> str:
        """PyTorch's key in a layer."""
        return self.key.format(layer=layer, expert=expert)


def rows(model: ModelConfig, names: str) -> list[Row]:
    """The parameters of a model, in the order of the table.

    Args:
      model: which of them there are.
      names: whose keys, "Hugging Face", "OLMo-core" or "OLMo".
    """
    header, *lines = (re.split(r"\s{2,}", line) for line in TABLE.strip().splitlines())
    column = header.index(names)
    foreign: dict[str, tuple[str, str, int | None]] = {}  # PyTorch's axes, key and part
    for line in lines:
        ours, torch_axes, key = line[0], line[1], line[column]
        match = re.fullmatch(r"(.*)\[(\d)\]", key)
        key, part = (match[1], int(match[2])) if match else (key, None)
        if names == "Hugging Face" and model.norm_position == "before":
            key = BEFORE.get(ours, key)
        prefix = LAYERS[names] if ours.startswith("layers/") else ""
        foreign[ours] = torch_axes, f"{prefix}{key}.weight", part
    for ours, spelled in EXPERTS.items():
        torch_axes, key = spelled[names]
        foreign[ours] = torch_axes, LAYERS[names] + key, None
    ordered = [*foreign]
    at = ordered.index("layers/mlp/w_gate")  # experts stand where the MLP does
    n = len(EXPERTS)
    ordered = [*ordered[:at], *ordered[-n:], *ordered[at:-n]]
    parameters = table(model)
    return [Row(x, parameters[x].axes, *foreign[x]) for x in ordered if x in parameters]


def has_experts(name: str) -> bool:
    """Whether a leaf of ours has an expert for each index of its second dimension."""
    return any(name.endswith(ours) for ours in EXPERTS if ours != "layers/moe/router")


# --- layout ---------------------------------------------------------------------------------------


def shape(axes: str, lengths: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array with these axes: `(n h) d` -> `[n·h, d]`."""
    return tuple(math.prod(lengths[axis] for axis in group.split()) for group in groups(axes))


def view(array: np.ndarray, old: str, new: str, lengths: Mapping[str, int]) -> np.ndarray:
    """An array with other axes: `(n h) d` -> `d n h`.

    Nothing is copied, unless axes are merged that do not lie side by side.

    Args:
      array: with the axes `old`.
      old, new: as in the table.
      lengths: of the single axes.
    Raises:
      ValueError: if the array does not have the shape that `old` says.
    """
    if array.shape != shape(old, lengths):
        raise ValueError(f"has shape {array.shape}, need {shape(old, lengths)}")
    have, want = re.findall(r"\w", old), re.findall(r"\w", new)
    split = array.reshape([lengths[axis] for axis in have])
    return split.transpose([have.index(axis) for axis in want]).reshape(shape(new, lengths))


def groups(axes: str) -> list[str]:
    """The axes of each dimension: `(n h) d` -> `n h`, `d`."""
    return [bracketed or single for bracketed, single in re.findall(r"\(([\w ]+)\)|(\w)", axes)]
