"""The parameters of a model, written once: names, axes, sizes, first values, layers.

`nn/` fetches by it, and initialisation, shardings, counts, optimizer groups, names of others and
plans read it. Axes: v vocabulary rows, d d_model, n heads, k kv heads, h head_dim, f d_ff,
e experts; those of layers are stacked, a stack for each part of a layer.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olmo_jax.config.model import ModelConfig

# Logical names of axes, which `parallel/sharding.py` spreads over the mesh.
LOGICAL = {
    "v": "vocab", "d": "embed", "n": "heads", "k": "kv_heads", "h": "head_dim", "f": "mlp",
    "e": "expert",
}  # fmt: skip
# Has no gradient: the optimizer leaves it as it is, and training moves it by the experts' loads.
ROUTER_BIAS = "layers/moe/router_bias"


@dataclass(frozen=True)
class Values:
    """How a parameter starts: a normal, truncated at three of its std, or a constant."""

    std: float = 0.0
    constant: float = 0.0  # where std is 0
    falls: bool = False  # the std of layer i (from 0) is divided by sqrt(i + 1)


@dataclass(frozen=True)
class Parameter:
    """What a parameter is in one layer, and in which layers."""

    axes: str  # such as "d n h"
    sizes: tuple[int, ...]  # of these axes
    logical: tuple[str | None, ...]  # names of these axes; None: whole on every device
    inputs: str  # those that a product sums over; "": it is no matrix of a product
    start: Values
    layers: tuple[int, ...] | None  # numbers of the layers that have it; None: it is of no layer

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored: stacked over its layers."""
        return self.sizes if self.layers is None else (len(self.layers), *self.sizes)

    @property
    def stored_axes(self) -> tuple[str | None, ...]:
        """Logical names of the dimensions of `shape`."""
        return self.logical if self.layers is None else ("layers", *self.logical)


def axis_sizes(m: ModelConfig) -> dict[str, int]:
    """The length of each axis, by its letter."""
    return {
        "v": m.vocab_rows, "d": m.d_model, "n": m.n_heads, "k": m.n_kv_heads, "h": m.head_dim,
        "f": m.d_ff, "e": m.n_experts,
    }  # fmt: skip


@functools.cache
def table(m: ModelConfig) -> Mapping[str, Parameter]:
    """Every parameter of a model by its path."""
    lengths = axis_sizes(m)
    every = tuple(range(m.n_layers))
    dense = m.dense_layers if m.n_experts else every
    having = {"mlp": dense, "moe": tuple(sorted({*every} - {*dense}))}
    rows: dict[str, Parameter] = {}

    def add(path: str, axes: str, inputs: str, start: Values, whole: str = "") -> None:
        letters, (*_, part, _) = axes.split(), ("", *path.split("/"))
        rows[path] = Parameter(
            axes,
            tuple(lengths[x] for x in letters),
            tuple(None if x in whole else LOGICAL[x] for x in letters),
            inputs,
            start,
            having.get(part, every) if path.startswith("layers/") else None,
        )

    def matrix(path: str, axes: str, inputs: str, *, writes: bool = False, whole: str = "") -> None:
        """A matrix of a block; `writes`: its product is added to the residual stream."""
        add(path, axes, inputs, _matrix(m, math.prod(lengths[x] for x in inputs), writes), whole)

    def gain(path: str, axes: str, value: float = 1.0, whole: str = "") -> None:
        add(path, axes, "", Values(constant=value), whole)

    add("embed", "v d", "", _ends(m, m.embed_init_std))
    matrix("layers/attn/wq", "d n h", "d")
    matrix("layers/attn/wk", "d k h", "d")
    matrix("layers/attn/wv", "d k h", "d")
    matrix("layers/attn/wo", "n h d", "nh", writes=True)
    if m.qk_norm != "none":
        gain("layers/attn/q_norm", "n h")
        gain("layers/attn/k_norm", "k h")
    if m.n_experts:
        matrix("layers/moe/router", "d e", "d", whole="e")
        if m.router_bias_gamma is not None:
            gain(ROUTER_BIAS, "e", 0.0, whole="e")
        matrix("layers/moe/w_gate", "e d f", "d")
        matrix("layers/moe/w_up", "e d f", "d")
        matrix("layers/moe/w_down", "e f d", "f", writes=True)
    if dense:
        matrix("layers/mlp/w_gate", "d f", "d")
        matrix("layers/mlp/w_up", "d f", "d")
        matrix("layers/mlp/w_down", "f d", "f", writes=True)
    if m.norm != "nonparametric":  # small, and added to every gradient: whole on each device
        on_outputs = m.post_norm_init if m.norm_position == "after" else 1.0
        gain("layers/attn_norm", "d", on_outputs, whole="d")
        gain("layers/mlp_norm", "d", on_outputs, whole="d")
        gain("final_norm", "d", whole="d")
    if not m.tie_embeddings:
        add("lm_head", "d v", "d", _ends(m, m.head_init_std))
    return rows


def _matrix(m: ModelConfig, fan_in: int, writes: bool) -> Values:
    """OLMo 2's one std, or OLMo 1's `mitchell`, where what writes gets smaller with depth.

    Source: OLMo olmo/initialization.py; OLMo-core nn/transformer/init.py.
    """
    if m.init == "normal":
        return Values(m.init_std)
    return Values((2 * fan_in) ** -0.5, falls=True) if writes else Values(fan_in**-0.5)


def _ends(m: ModelConfig, std: float | None) -> Values:
    """Embedding and head: as they are told to, else as the matrices of a block."""
    return _matrix(m, m.d_model, False) if std is None else Values(std)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of values by path, such as `layers/attn/wq`."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return tree
