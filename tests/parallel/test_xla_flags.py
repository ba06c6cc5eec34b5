"""The table of compiler flags: whole, overridable, and taken by the TPU compiler for each chip."""

import functools
import re

import compile_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmo_jax.config import costs
from olmo_jax.parallel import xla_flags

SLICES = {"TPU v4": "v4:2x2x1", "TPU v5 lite": "v5e:2x4", "TPU v5": "v5p:2x2x1",
          "TPU v6 lite": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}  # fmt: skip
EINSUM, VMEM = "xla_jf_spmd_threshold_for_windowed_einsum_mib", "xla_tpu_scoped_vmem_limit_kib"


def test_every_chip_has_one_row_and_every_flag_a_reason():
    for kind in SLICES:
        assert len([row for row in xla_flags.TABLE if re.fullmatch(row, kind)]) == 1
        assert costs.peak_flops(kind)  # a name that JAX gives
        for name, (value, reason) in xla_flags.flags(kind).items():
            assert name.startswith("xla_"), name
            assert value, name
            assert len(reason) > 20, name
    assert xla_flags.options("cpu") == {}
    assert list(xla_flags.options("NVIDIA H100 80GB HBM3")) == [
        "xla_gpu_enable_latency_hiding_scheduler"
    ]


def test_a_change_wins_over_the_table_and_none_takes_a_flag_away():
    assert xla_flags.options("TPU v5") | {VMEM: "1", "xla_new": "True"} == xla_flags.options(
        "TPU v5", (f"{VMEM}=1", "xla_new=true")
    )
    assert xla_flags.options("TPU v4", (f"{EINSUM}=none", "xla_other=NONE")) == {}
    assert xla_flags.options("cpu", ("xla_list=a=b,c",)) == {"xla_list": "a=b,c"}


@functools.lru_cache
def lowered(kind: str, width: int):
    """Six layers whose weights are sharded, forward and backward, for a slice that is not here."""
    devices = compile_step.devices(SLICES[kind])
    assert devices[0].device_kind == kind
    mesh = Mesh(np.array(devices), ("fsdp",))
    spread = functools.partial(NamedSharding, mesh)
    rows, columns = spread(PartitionSpec("fsdp")), spread(PartitionSpec(None, "fsdp"))
    w = jax.ShapeDtypeStruct((6, width, width), jnp.bfloat16, sharding=columns)
    x = jax.ShapeDtypeStruct((width * len(devices), width), jnp.bfloat16, sharding=rows)

    def loss(w, x):
        out = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    return jax.jit(jax.grad(loss), out_shardings=columns).lower(w, x)


@pytest.mark.tpu
@pytest.mark.parametrize("kind", SLICES)
def test_the_tpu_compiler_takes_the_flags_of_each_chip(kind):
    program = lowered(kind, 256)
    program.compile(compiler_options=xla_flags.options(kind))
    for wrong, error in (("xla_tpu_no_such=1", "No such compile option"), (f"{VMEM}=much", VMEM)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            program.compile(compiler_options=xla_flags.options(kind, (wrong,)))


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "width", "without", "with_flags"),
    [
        ("TPU v5 lite", 1024, "collective-permute", "%async_collective_fusion"),
        ("TPU v5", 512, None, "sparse"),
        ("TPU v6 lite", 512, None, "sparse"),
    ],
)
def test_the_flags_do_what_their_reasons_say(kind, width, without, with_flags):
    program = lowered(kind, width)
    before = program.compile().as_text()
    after = program.compile(compiler_options=xla_flags.options(kind)).as_text()
    assert with_flags in after
    assert with_flags not in before
    if without is not None:
        assert without in before
        assert without not in after
