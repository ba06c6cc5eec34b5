"""Plan a training run on TPU slices or GPU nodes that are not here.

  python -m olmo_jax.plan --config=configs/olmo3_7b.py --topology=v5p:4x4x8
  python -m olmo_jax.plan --config=configs/olmo3_32b.py --topology=v5p:4x8x8 --search
  python -m olmo_jax.plan --config=configs/olmo3_7b.py --topology=h100:8x16 --search

  --config=FILE             as for training, with options: --config.mesh.fsdp=32
  --topology=CHIP:SHAPE     TPUs: v4, v5e, v5p, v6e, tpu7x; GPUs: a100, h100, h200, b200
  --search                  find the best mesh, remat policy and number of micro-batches
  --compiles=N              programs that a search may compile (3; 0: formulas only)
  --price=X                 of a chip and hour, for the cost of the run
  --cache=FOLDER            for what was compiled (~/.cache/olmo_jax/plans)
  --debug                   show where in the code an error arose

For a TPU (needs `jax[tpu]`, no TPU) the sharded step is compiled, which takes minutes of a core;
for GPUs everything is a formula.

Exit codes: 0 done, 1 failed (a plan that does not fit included), 2 wrong command line or config,
130, 143 and 129 interrupted.
"""

if __name__ == "__main__":  # before all else, which takes its time
    from olmo_jax import cli

    cli.run("plan")

import os
import pathlib
from dataclasses import dataclass

from olmo_jax import cli
from olmo_jax.config.options import ConfigError, File, Natural, NonNegative
from olmo_jax.config.run import Config, load

FOUND = ("compute.remat", "compute.accumulate")  # by a search, besides the mesh


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What a command says beside the options of its config."""

    config: str
    topology: str
    search: bool = False
    compiles: Natural = 3
    price: NonNegative | None = None
    cache: File = "~/.cache/olmo_jax/plans"


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    return cli.attempt(argv, __doc__, _plan, "interrupted; what was compiled is kept")


def configure(argv: list[str]) -> tuple[PlanFlags, Config]:
    """PlanFlags and config of a command line; relations between options depend on the machine.

    Raises:
      ConfigError: with all that is wrong in arguments and options.
    """
    line = cli.read(argv, PlanFlags)
    problems, config = line.problems, None
    found = [name for name in line.overrides if name.startswith("mesh.") or name in FOUND]
    if found and line.given["search"]:
        problems.append(f"--search finds config.{', config.'.join(found)}: leave it out")
    try:
        config = load(line.given["config"], line.overrides) if "config" in line.given else None
    except ConfigError as error:
        problems += error.problems
    if problems or config is None:
        raise ConfigError(problems)
    return PlanFlags(**line.given), config


def _plan(argv: list[str]) -> int:
    flags, config = configure(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here must not matter
    from olmo_jax.pods import report
    from olmo_jax.pods.compiled import PlanStore

    try:
        machine = report.parse(flags.topology)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    cli.unwind()  # the compiler's process ends with us
    n_compiles = flags.compiles if flags.search else None
    try:
        store = PlanStore(pathlib.Path(flags.cache))
        return report.run(config, machine, store, n_compiles=n_compiles, price=flags.price)
    except RuntimeError as error:  # of the compiler
        raise OSError(str(error)) from error
