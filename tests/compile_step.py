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

from olmo_jax import config, sharding, validate
from olmo_jax.plan import hlo, program
from olmo_jax.plan.chips import Slice


def devices(name: str) -> list:
    """Of this machine, or of a TPU slice."""
    return jax.devices() if name == "cpu" else Slice.parse(name).devices()


def collectives(text: str) -> list[tuple[str, str, int]]:
    """Operation, shape of the result, and devices that take part in each, of every line."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({'|'.join(hlo.COLLECTIVES)})(?:-start)?\(", line):
            shape, operation = match.groups()
            found.append((operation, re.sub(r"\{.*?\}", "", shape), len(hlo.group(line))))
    return found


def main(topology: str, path: str, *options: str) -> None:
    """Compile and print."""
    c = config.load(path, dict(option.split("=", 1) for option in options))
    there = devices(topology)
    validate.validate(c, len(there))
    compiled = program.compile_step(c, sharding.make_mesh(c.mesh, there))
    print(
        json.dumps(
            {"memory": program.memory_of(compiled), "collectives": collectives(compiled.as_text())}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
