import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from olmo_jax.config.model import MeshConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.parallel import sharding


def test_rules_give_the_documented_specs():
    assert sharding.spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    assert sharding.spec(("batch", "seq", None)) == PartitionSpec(
        ("data", "fsdp", "expert"), "context", None
    )
    assert sharding.spec(("layers", "heads", "head_dim", "embed")) == PartitionSpec(
        None, "tensor", None, "fsdp"
    )


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'tensor' is asked for by both 'heads' and 'mlp'"):
        sharding.spec(("heads", "mlp"))


def test_minus_one_takes_the_rest_and_a_wrong_product_is_refused():
    mesh = sharding.make_mesh(MeshConfig(tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    with pytest.raises(ConfigError, match="fsdp 3 x tensor 2 needs 6 devices, found 8"):
        sharding.make_mesh(MeshConfig(fsdp=3, tensor=2))


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "chip"


def test_slices_lie_along_data_and_fsdp_stays_inside_one():
    chips = [Chip(i, i // 4) for i in range(16)]  # four slices of four
    mixed = [chips[i] for i in np.random.default_rng(0).permutation(16)]
    devices = sharding.make_mesh(MeshConfig(data=8, fsdp=2), mixed).devices.reshape(8, 2)
    slices = np.vectorize(lambda chip: chip.slice_index)(devices)
    assert (slices == np.repeat(np.arange(4), 2)[:, None]).all()


def test_an_axis_but_data_across_slices_is_refused():
    chips = [Chip(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=r"mesh\.data=1 is no multiple of the 2 slices"):
        sharding.make_mesh(MeshConfig(fsdp=8), chips)


def test_slices_of_different_sizes_are_refused():
    chips = [Chip(i, i // 5) for i in range(8)]
    with pytest.raises(ValueError, match="slices of 3 and 5 devices found"):
        sharding.make_mesh(MeshConfig(data=2, fsdp=4), chips)


def test_host_rows_become_the_global_batch():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    batch = {"tokens": np.arange(8 * 6).reshape(8, 6)}
    assert (sharding.local_rows(mesh, 8) == np.arange(8)).all()
    out = sharding.to_global(batch, mesh, 8)["tokens"]
    np.testing.assert_array_equal(out, batch["tokens"])
    assert out.sharding.shard_shape((8, 6)) == (2, 3)


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jax.numpy.ones((8, 4))
    assert sharding.constrain(x, ("batch", None)) is x
    mesh = sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(x)
    assert pinned.sharding.shard_shape((8, 4)) == (1, 4)
