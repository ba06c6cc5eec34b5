"""Layers one after the other: a scan over periods of layers that are alike.

The parameters of a part of a layer (attention, MLP, experts) are stacked over the layers that have
it. Where all layers have the same parts a period is one layer; what fits in no period comes first,
unrolled.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import nested, table
from olmo_jax.nn.layers import check

# A layer by its number, the parameters of it alone, the residual stream and its entry of the tables
# -> the stream and what the layer tells.
Layer = Callable[[int, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def run(
    layer: Layer, config: ModelConfig, params: Mapping[str, Any], x: jax.Array, kinds: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run all layers.

    Args:
      layer: one of them; those with the same parts do the same.
      config: of the model.
      params: the tree under `layers`, stacked.
      x: the residual stream, [batch, seq, d_model].
      kinds: [n_layers] int32, of the tables.
    Returns: the stream, and what the layers tell, `{name: [layers that tell it, …]}`.
    Raises:
      ValueError: if a parameter is missing or has another shape.
    """
    leaves, slots = _flat(params), slots_of(config)
    for path, row in table(config).items():
        if row.layers is not None:
            check(path, row.shape, leaves.get(path.removeprefix("layers/")))
    first, period = periods([frozenset(slots[i]) for i in range(config.n_layers)])
    told: dict[str, list[jax.Array]] = defaultdict(list)
    for i in range(first):
        x, said = layer(i, nested({p: leaves[p][n] for p, n in slots[i].items()}), x, kinds[i])
        for name, value in said.items():
            told[name].append(value[None])

    n_periods = (config.n_layers - first) // period
    # Of each part, the layers of a period that have it lie side by side.
    inside = [slots[i] for i in range(first, first + period)]
    begin = {path: n for at in reversed(inside) for path, n in at.items()}
    width = {path: sum(path in at for at in inside) for path in begin}
    rows = {path: _rows(leaves[path], n, width[path]) for path, n in begin.items()}

    def step(x: jax.Array, row: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, kinds = row
        said: dict[str, list[jax.Array]] = defaultdict(list)
        for j, at in enumerate(inside):
            own = {p: params[p][n - begin[p]] if width[p] > 1 else params[p] for p, n in at.items()}
            x, values = layer(first + j, nested(own), x, kinds[j])
            for name, value in values.items():
                said[name].append(value)
        return x, {name: jnp.stack(values) for name, values in said.items()}

    x, said = jax.lax.scan(step, x, (rows, kinds[first:].reshape(n_periods, period)))
    for name, value in said.items():  # [periods, layers of a period, …]
        told[name].append(value.reshape(-1, *value.shape[2:]))
    return x, {name: jnp.concatenate(values) for name, values in told.items()}


def periods(layers: list[Any]) -> tuple[int, int]:
    """How many layers come before the first period, and how many there are in one.

    Of all ways the one with the fewest layers to compile.
    """
    n = len(layers)
    ways = [
        (first + period, first, period)
        for first in range(n)
        for period in range(1, n - first + 1)
        if (n - first) % period == 0
        and layers[first:] == layers[first : first + period] * ((n - first) // period)
    ]
    return min(ways)[1:]


def slots_of(config: ModelConfig) -> list[dict[str, int]]:
    """For each layer: where in its stack each parameter of it is, by its path under `layers`."""
    slots: list[dict[str, int]] = [{} for _ in range(config.n_layers)]
    for path, row in table(config).items():
        for n, i in enumerate(row.layers or ()):
            slots[i][path.removeprefix("layers/")] = n
    return slots


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of the tree by path."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        is_group = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}/") if is_group else {prefix + name: value}
    return flat


def _rows(leaf: jax.Array, begin: int, width: int) -> jax.Array:
    """The rows of a stack from `begin` on; where a period has several, by period."""
    rest = leaf[begin:] if begin else leaf
    return rest.reshape(-1, width, *leaf.shape[1:]) if width > 1 else rest
