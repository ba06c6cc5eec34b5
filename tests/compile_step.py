"""Compiles a training step for devices that are not here, and says what the compiler made of it.

Run by the tests, in a process of its own: `compile_step.py TOPOLOGY CONFIG part.option=value …`,
where TOPOLOGY is a TPU slice such as v5p:2x2x4 (needs libtpu), or cpu. Prints as JSON the bytes on
a device, and each collective of the program as [operation, shape, devices of a group].
"""

import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax

from olmo_jax import config
from olmo_jax.config.run import validate
from olmo_jax.parallel import sharding
from olmo_jax.pods import hlo
from olmo_jax.pods.chips import Slice
from olmo_jax.pods.compiled import compile_step, memory_of
from olmo_jax.training import program


def devices(name: str) -> list:
    """Of this machine, or of a TPU slice."""
    return jax.devices() if name == "cpu" else Slice.parse(name).devices()


def collectives(text: str) -> list[tuple[str, str, int]]:
    """Operation, shape of the result, and devices that take part in each, of every line."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({'|'.join(program.COLLECTIVES)})(?:-start)?\(", line):
            shape, operation = match.groups()
            found.append((operation, re.sub(r"\{.*?\}", "", shape), len(hlo.group(line))))
    return found


def main(topology: str, path: str, *options: str) -> None:
    """Compile and print."""
    c = config.load(path, dict(option.split("=", 1) for option in options))
    there = devices(topology)
    validate(c, len(there))
    compiled = compile_step(c, sharding.make_mesh(c.mesh, there))
    print(
        json.dumps({"memory": memory_of(compiled), "collectives": collectives(compiled.as_text())})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
