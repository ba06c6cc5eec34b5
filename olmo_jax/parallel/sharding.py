"""The mesh, the one table from logical to mesh axes, and the way between host and global arrays.

Mesh axes: `data` (replicas, also across slices), `fsdp`, `expert`, `context`, `tensor`; all five
are always present, with size 1 where unused. Arrays name logical axes; `spec` turns them into a
`PartitionSpec` by RULES and refuses a clash instead of dropping it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from olmo_jax.config.model import BATCH_AXES, RULES, MeshConfig, mesh_shape

Axes = tuple[str | None, ...]

# Whether what is traced is the part of one device, which others join only at its end.
_in_replica: ContextVar[bool] = ContextVar("in_replica", default=False)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of all processes).

    Several slices (TPU pods joined by the data-centre network) lie along `data`, so that only
    gradients cross the slow network; the axes inside a slice follow its torus.

    Raises:
      ConfigError: if the axes do not cover the devices.
      ValueError: if slices are not alike, or cannot be laid along `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if len(sizes := {len(x) for x in slices.values()}) > 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise ValueError(f"slices of {found} devices found; all need the same number")
    if shape["data"] % len(slices):
        raise ValueError(
            f"config.mesh.data={shape['data']} is no multiple of the {len(slices)} slices found;"
            " only `data` may cross slices"
        )
    inner = (shape["data"] // len(slices), *list(shape.values())[1:])
    blocks = [_along_the_torus(inner, slices[i]) for i in sorted(slices)]
    return Mesh(np.concatenate(blocks), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _along_the_torus(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices of a slice as a mesh; its axes share one of the torus only if they must."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec(axes: Axes) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions have these logical names (None: whole).

    Raises:
      ValueError: if two dimensions ask for the same mesh axis.
    """
    taken: dict[str, str] = {}
    entries: list[Any] = []
    for name in axes:
        mesh_axes = RULES[name] if name is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                both = f"{taken[mesh_axis]!r} and {name!r}"
                raise ValueError(f"mesh axis {mesh_axis!r} is asked for by both {both}")
            taken[mesh_axis] = str(name)
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, axes: Any) -> Any:
    """A tree of logical axes as a tree of shardings on `mesh`."""
    return jax.tree.map(
        lambda a: NamedSharding(mesh, spec(a)), axes, is_leaf=lambda a: isinstance(a, tuple)
    )


def data_parallel_ways(mesh: Mesh) -> int:
    """How many groups of devices see different rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def axis_size(*names: str) -> int:
    """Ways along these axes of the mesh in force; 1 without a mesh."""
    shape = {} if _is_whole() else jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in names)


def device() -> Any:
    """What is compiled for: a device of the mesh in force, be it on this machine or not."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def is_split_by_xla() -> bool:
    """Whether arrays may lie on several devices while no mesh in force says how."""
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pin the sharding of an intermediate array; does nothing without a mesh in force."""
    if _is_whole():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def on_each_device(run: Callable[..., Any], into: Any, out_of: Any, *arrays: Any) -> Any:
    """Call on the part of the arrays that a device of the mesh in force has.

    Args:
      run: returns a tuple.
      into, out_of: the logical axes of each argument, and of each result.
      arrays: the arguments; each may be None.
    """
    if _is_whole():
        return run(*arrays)
    return jax.shard_map(
        run, in_specs=tuple(map(spec, into)), out_specs=tuple(map(spec, out_of)), check_vma=False
    )(*arrays)


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """What is traced inside is the work of one device: no mesh is in force for the functions here.

    XLA would add up gradients over `data` after each micro-batch; joined once at the end, a step
    moves 42 MB in the place of 120.
    """
    token = _in_replica.set(True)
    try:
        yield
    finally:
        _in_replica.reset(token)


def sum_of_replicas(run: Callable[[Any, Any], Any], params: Any, batch: Any) -> Any:
    """`run(params, batch)` by the rows of each device, added up once at the end.

    For a mesh that has `data` alone. Inside, all is as on one device: no mesh is in force for
    `axis_size`, `constrain` and `on_each_device`.
    """

    def of_one(params: Any, batch: Any) -> Any:
        with without_mesh():
            part = run(params, batch)
        return jax.lax.psum(part, "data")

    whole, rows = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(of_one, in_specs=(whole, rows), out_specs=whole, check_vma=False)(
        params, batch
    )


def _is_whole() -> bool:
    return _in_replica.get() or jax.sharding.get_abstract_mesh().empty


def sum_gradient(x: jax.Array, axis: int) -> jax.Array:
    """Add up, inside of `shard_map`, what each device found for a weight that all of them have.

    Args:
      x: the gradient by the tokens of this device.
      axis: the dimension of `x` that the weight is sharded on over `fsdp`.

    Returns: the part of the sum that this device keeps.
    """
    if axis_size("fsdp") > 1:
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
    return summed(x, "data", "expert", "context")


def summed(tree: Any, *names: str) -> Any:
    """Inside of `shard_map`: added up over those of these mesh axes that split anything."""
    names = tuple(name for name in names if axis_size(name) > 1)
    return jax.lax.psum(tree, names) if names else tree


def axis_index(name: str) -> Any:
    """Inside of `shard_map`: the place of this device along a mesh axis; 0 without one."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


@functools.lru_cache(maxsize=8)
def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
    """The rows of a global batch of `n_rows` that this process' devices hold, ascending.

    Processes that differ only along `context` or `tensor` hold the same rows.
    """
    sharding = NamedSharding(mesh, spec(("batch",)))
    held = sharding.addressable_devices_indices_map((n_rows,)).values()
    return np.unique(np.concatenate([np.arange(n_rows)[index] for index in held]))


def make_max(mesh: Mesh) -> Callable[[float], Any]:
    """A function that gives the largest over all processes of a number that each has.

    All call it together; the result is a scalar on the devices, for the host to read later.
    """
    if jax.process_count() == 1:
        return lambda value: value
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def over_processes(value: float) -> jax.Array:
        own = np.array([value], np.float32)
        return largest(jax.make_array_from_callback((mesh.size,), each, lambda _: own))

    return over_processes


def to_global(
    batch: dict[str, np.ndarray], mesh: Mesh, n_rows: int, rows: np.ndarray | None = None
) -> dict[str, jax.Array]:
    """Arrays `[len(rows), seq]` of this process as global arrays `[n_rows, seq]`.

    Args:
      batch: the rows `rows` of the global batch.
      mesh: the mesh of the run.
      n_rows: rows of the global batch.
      rows: as `local_rows` gives them; computed if not given.
    """
    sharding = NamedSharding(mesh, spec(("batch", "seq")))
    rows = local_rows(mesh, n_rows) if rows is None else rows

    def block(array: np.ndarray) -> Callable[[Any], np.ndarray]:
        def at(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(n_rows)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start, index[1]]

        return at

    return {
        name: jax.make_array_from_callback((n_rows, *a.shape[1:]), sharding, block(a))
        for name, a in batch.items()
    }
