"""Compiles a training step for devices that are not here, and says what the compiler made of it.

Run by the tests, in a process of its own: `compile_step.py TOPOLOGY CONFIG part.option=value …`,
where TOPOLOGY is a TPU slice such as v5p:2x2x4 (needs libtpu), or cpu. Prints as JSON the bytes on
a device, and each collective of the program as [operation, shape, devices of a group].
"""

import json
import math
import os
import re
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else it waits for a machine of Google's
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from olmo_jax import config, sharding, step, validate

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"


def devices(name: str) -> list:
    """Of this machine, or of a TPU slice."""
    if name == "cpu":
        return jax.devices()
    hosts = {"chips_per_host_bounds": (2, 2, 1)} if name[:3] in ("v5e", "v6e") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **hosts).devices


def lowered(c: config.Config, mesh: jax.sharding.Mesh):
    """The step on abstract arrays."""
    rows = c.data.global_batch_size // c.data.seq_len
    split = NamedSharding(mesh, sharding.spec(("batch", "seq")))
    batch = {
        name: jax.ShapeDtypeStruct((rows, c.data.seq_len), dtype, sharding=split)
        for name, dtype in (
            ("tokens", jnp.int32), ("targets", jnp.int32), ("loss_weights", jnp.float32),
        )
    }  # fmt: skip
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state, update = step.abstract_state(c, mesh), step.make_train_step(c, mesh)
    with jax.set_mesh(mesh):
        return update.jitted.lower(state, batch, scalar, scalar)  # type: ignore[attr-defined]


def collectives(hlo: str) -> list[tuple[str, str, int]]:
    """Operation, shape of the result, and devices that take part in each, of every line."""
    found = []
    pattern = (
        rf" = (.*?) ({COLLECTIVES})(?:-start)?\(.*?"
        r"(?:replica_groups|source_target_pairs)="
        r"(mesh\[.*?\](?:, device_ids=\(.*?\))? \{.*?\}|\{\{.*?\}|\{\}|\[[\d,]*\])"
    )
    for line in hlo.splitlines():
        if match := re.search(pattern, line):
            shape, operation, groups = match.groups()
            found.append((operation, re.sub(r"\{.*?\}", "", shape), group_size(groups)))
    return found


def group_size(groups: str) -> int:
    """Devices of a group, in the four ways in which XLA writes it; 0 for all devices."""
    if groups.startswith("mesh"):  # mesh['a'=4,'b'=2] {'a'}, or between them device_ids=(…)
        axes, _, used = groups.rpartition(" ")
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", used))
    numbers = [int(n) for n in re.findall(r"\d+", groups)]
    if groups.startswith("["):  # [groups,devices]<=[…]
        return numbers[-1]
    return len(numbers)  # {{0,1},…} or {}


def main(topology: str, path: str, *options: str) -> None:
    """Compile and print."""
    c = config.load(path, dict(option.split("=", 1) for option in options))
    there = devices(topology)
    validate.validate(c, len(there))
    compiled = lowered(c, sharding.make_mesh(c.mesh, there)).compile()
    memory = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
    print(json.dumps({"memory": sizes, "collectives": collectives(compiled.as_text())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
