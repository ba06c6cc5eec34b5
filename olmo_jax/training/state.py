"""What training changes: parameters, optimizer state and the step, on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmo_jax.config.parameters import nested, table
from olmo_jax.config.run import Config
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel.sharding import shardings, spec
from olmo_jax.training import optim

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes: finished steps (int32), parameters and optimizer state."""

    step: Any
    params: Any
    opt_state: Any


def build_model(config: Config) -> Transformer:
    """The model of a config, computed as it says."""
    return Transformer(config.model, config.compute)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Where each array of the state lives: moments beside their parameters, scalars everywhere."""
    rows = table(config.model)
    params = shardings(mesh, nested({path: row.stored_axes for path, row in rows.items()}))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        """Beside its parameter, whose path is a part of its own, if it has that shape."""
        name = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/"
        row = next((r for p, r in rows.items() if f"/{p}/" in name), None)
        is_like = row is not None and row.shape == leaf.shape
        return NamedSharding(mesh, spec(row.stored_axes)) if row is not None and is_like else whole

    shapes = jax.eval_shape(lambda: _fresh(config, jax.random.key(0)))
    opt_state = jax.tree_util.tree_map_with_path(place, shapes.opt_state)
    return TrainState(whole, params, opt_state)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; takes no memory, whatever the model's size."""
    shapes = jax.eval_shape(lambda: _fresh(config, jax.random.key(0)))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        state_shardings(config, mesh),
    )


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, born sharded; its values depend on `train.seed`, never on the mesh."""
    fresh = jax.jit(_fresh, static_argnums=0, out_shardings=state_shardings(config, mesh))
    with jax.set_mesh(mesh):
        return fresh(config, jax.random.key(config.train.seed))


def init_opt_state(config: Config, mesh: Mesh, params: Any) -> Any:
    """A fresh optimizer state for parameters that are there already."""
    out = state_shardings(config, mesh).opt_state
    return jax.jit(lambda p: optim.init(config.optim, p, table(config.model)), out_shardings=out)(
        params
    )


def replicated(mesh: Mesh, value: Any) -> jax.Array:
    """A scalar on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback((), sharding, lambda _: value)


def _fresh(config: Config, key: jax.Array) -> TrainState:
    params = transformer.init(config.model, key)
    return TrainState(
        jnp.zeros((), jnp.int32), params, optim.init(config.optim, params, table(config.model))
    )
