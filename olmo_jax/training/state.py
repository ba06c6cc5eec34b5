"""What training changes: parameters, optimizer state and the step, on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import table
from olmo_jax.config.training import OptimConfig
from olmo_jax.nn import transformer
from olmo_jax.parallel.sharding import shardings, spec
from olmo_jax.training import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes: finished steps (int32), parameters and optimizer state."""

    step: Any
    params: Any
    opt_state: Any


def param_shardings(m: ModelConfig, mesh: Mesh) -> Any:
    """Where each parameter lives."""
    return shardings(mesh, transformer.logical_axes(m))


def state_shardings(m: ModelConfig, o: OptimConfig, mesh: Mesh) -> TrainState:
    """Where each array of the state lives: moments beside their parameters, scalars everywhere."""
    rows, params = table(m), param_shardings(m, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        """Beside its parameter, whose path is a part of its own, if it has that shape."""
        name = f"/{jax.tree_util.keystr(path, simple=True, separator='/')}/"
        row = next((r for p, r in rows.items() if f"/{p}/" in name), None)
        is_like = row is not None and row.shape == leaf.shape
        return NamedSharding(mesh, spec(row.stored_axes)) if row is not None and is_like else whole

    shapes = jax.eval_shape(lambda: _fresh(m, o, jax.random.key(0)))
    opt_state = jax.tree_util.tree_map_with_path(place, shapes.opt_state)
    return TrainState(whole, params, opt_state)


def abstract_state(m: ModelConfig, o: OptimConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; takes no memory, whatever the model's size."""
    shapes = jax.eval_shape(lambda: _fresh(m, o, jax.random.key(0)))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        state_shardings(m, o, mesh),
    )


def init_state(m: ModelConfig, o: OptimConfig, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, born sharded; its values depend on the seed, never on the mesh."""
    fresh = jax.jit(_fresh, static_argnums=(0, 1), out_shardings=state_shardings(m, o, mesh))
    with jax.set_mesh(mesh):
        return fresh(m, o, jax.random.key(seed))


def init_opt_state(m: ModelConfig, o: OptimConfig, mesh: Mesh, params: Any) -> Any:
    """A fresh optimizer state for parameters that are there already."""
    out = state_shardings(m, o, mesh).opt_state
    return jax.jit(lambda p: optim.init(o, p, table(m)), out_shardings=out)(params)


def replicated(mesh: Mesh, value: Any) -> jax.Array:
    """A scalar on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback((), sharding, lambda _: value)


def _fresh(m: ModelConfig, o: OptimConfig, key: jax.Array) -> TrainState:
    params = transformer.init(m, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optim.init(o, params, table(m)))
