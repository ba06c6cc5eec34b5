"""A small tree like a run's state, for the tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from olmo_jax.checkpoints import storage


def mesh(data: int, fsdp: int):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def state(data: int = 2, fsdp: int = 4, dtype=jnp.float32):
    """A small TrainState-like tree, sharded as a real one."""
    rng, over = np.random.default_rng(0), mesh(data, fsdp)

    def put(values, *spec):
        return jax.device_put(jnp.asarray(values), NamedSharding(over, PartitionSpec(*spec)))

    def params():
        return {
            "embed": put(rng.standard_normal((24, 16)).astype(dtype), None, "fsdp"),
            "layers": {
                "wq": put(rng.standard_normal((3, 16, 4)).astype(dtype), None, "fsdp"),
                "norm": put(rng.standard_normal((3, 16)).astype(dtype)),
            },
        }

    moments = {"mu": params(), "nu": params(), "count": put(np.int32(7))}
    return {"step": put(np.int32(10)), "params": params(), "opt_state": moments}


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree
    )


def bits(tree) -> dict[str, bytes]:
    return {name: np.asarray(x).tobytes() for name, x in storage.names(tree).items()}
