"""What travels between devices in the compiled step of a mixture of experts, and what it holds."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
D_MODEL, D_FF, N_EXPERTS = 512, 256, 8
TINY = ("configs/tiny_olmoe.py", f"model.d_model={D_MODEL}", f"model.d_ff={D_FF}")
CPU = pytest.param("cpu", marks=pytest.mark.slow)
# The TPU compiler comes to the same collectives, within a quarter of a minute each.
TPU = pytest.param("v5p:2x2x2", marks=[pytest.mark.by_hand, pytest.mark.tpu])


@functools.cache
def compiled(topology: str, *options: str) -> dict:
    """What `compile_step.py` says."""
    command = [sys.executable, str(ROOT / "tests/compile_step.py"), topology, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if topology != "cpu":
        environment.pop("XLA_FLAGS")  # those of the tests are for a CPU
    done = subprocess.run(
        [*command, "data.paths=none.npy"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def collectives(topology: str, *mesh: str) -> dict[str, list]:
    """Shapes and group sizes by operation, of the tiny model on eight devices."""
    found: dict[str, list] = {}
    for operation, shape, devices in compiled(topology, *TINY, *mesh)["collectives"]:
        found.setdefault(operation.removeprefix("ragged-"), []).append((shape, devices))
    return found


def numbers(shape: str) -> int:
    """How many numbers an array has; a tuple's first."""
    dims = shape.split("[")[1].split("]")[0]
    return functools.reduce(lambda n, dim: n * int(dim), filter(None, dims.split(",")), 1)


@pytest.mark.parametrize("topology", [CPU, TPU])
def test_experts_alone_on_a_mesh_exchange_rows_and_gather_nothing(topology):
    found = collectives(topology, "mesh.fsdp=1", "mesh.expert=8")
    # There and back, forward and backward; the layers are one scanned body.
    assert [devices for _, devices in found["all-to-all"]] == [8] * 4
    assert all(str(D_MODEL) in shape for shape, _ in found["all-to-all"])
    gathered = [shape for shape, _ in found.get("all-gather", [])]
    assert set(gathered) <= {"s32[8,8]"}  # how many rows each device has for each expert
    assert "reduce-scatter" not in found


@pytest.mark.parametrize("topology", [CPU, TPU])
def test_weights_of_experts_are_gathered_over_fsdp_only(topology):
    found = collectives(topology, "mesh.fsdp=4", "mesh.expert=2")
    assert [devices for _, devices in found["all-to-all"]] == [2] * 4
    floats = [(s, devices) for s, devices in found["all-gather"] if not s.startswith("s32")]
    assert {devices for _, devices in floats} == {4}
    of_a_device = N_EXPERTS // 2 * D_MODEL * D_FF
    sizes = [numbers(shape) for shape, _ in floats]
    assert sizes.count(of_a_device) == 6  # gate, up and down, forward and backward
    assert max(sizes) == of_a_device
    scattered = [numbers(s) for s, devices in found["reduce-scatter"] if devices == 4]
    assert len(scattered) == len(found["reduce-scatter"])  # a TPU scatters other gradients too
    assert scattered.count(of_a_device // 4) == 3
    assert max(scattered) == of_a_device // 4


# Of the full OLMoE-1B-7B: rows of 4,096 tokens on a chip, and GiB that a chip has. A compilation
# takes minutes of a core, so they are left to `make prove`.
SLICES = [
    ("v5e:4x8", 32, 1, 15.75, ()),
    ("v5p:2x2x4", 16, 2, 95.7, ("mesh.expert=8", "compute.expert_buffer=2.0")),
]


@pytest.mark.by_hand
@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "chips", "rows", "limit", "more"), SLICES, ids=str)
def test_olmoe_fits_a_small_slice(topology, chips, rows, limit, more):
    batch = f"data.global_batch_size={chips * rows * 4096 * 2}"  # the config has two micro-batches
    found = compiled(topology, "configs/olmoe_1b_7b.py", batch, *more)
    memory = {name: size / 2**30 for name, size in found["memory"].items()}
    total = sum(memory.values()) - memory["alias"] - memory["output"]  # the state is donated
    print(
        f"{topology} {more}: {total:.1f} GiB of {limit} on a chip, {memory['temp']:.1f} temporary"
    )
    assert memory["alias"] >= 0.99 * memory["output"]
    # Parameters and two moments, of the experts and with them nearly all, divided by the chips.
    assert 83.0e9 / chips / 2**30 <= memory["argument"] < 1.6 * 83.0e9 / chips / 2**30
    assert total < limit
    exchanged = [devices for name, _, devices in found["collectives"] if name.startswith("ragged")]
    assert set(exchanged) == ({8} if more else set())
