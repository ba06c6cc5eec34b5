"""Plan a training run on TPU slices or GPU nodes that are not here.

  python tools/plan_pod.py --config=configs/olmo3_7b.py --topology=v5p:4x4x8
  python tools/plan_pod.py --config=configs/olmo3_32b.py --topology=v5p:4x8x8 --search
  python tools/plan_pod.py --config=configs/olmo3_7b.py --topology=h100:8x16 --search

For a TPU (v4, v5e, v5p, v6e, tpu7x; needs `jax[tpu]`, no TPU) the sharded step is compiled, which
takes minutes of a core; for GPUs everything is a formula. --search looks for the best mesh, remat
policy and number of micro-batches. Options of the config as in training: --config.mesh.fsdp=32.
Exit codes: 0 done, 1 failed (a plan that does not fit included), 2 wrong command line or config,
130, 143 and 129 interrupted.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # runs from a clone, installed or not

from olmo_jax import cli

if __name__ == "__main__":
    cli.begin()

import argparse
import os

from olmo_jax import files
from olmo_jax.config import options, typed

_FOUND = ("compute.remat", "compute.accumulate")  # by a search, besides the mesh


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args, overrides = parse(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator that is here must not matter
    from olmo_jax import config
    from olmo_jax.pods import report

    code = 2
    try:
        args.cache = pathlib.Path(files.expand(args.cache))
        machine, what = report.parse(args.topology), config.load(args.config, overrides)
        code = 1
        cli.unwind()  # the compiler's process ends with us
        return report.run(what, machine, args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        for line in getattr(error, "problems", [str(error)]):
            print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, config.ConfigError) else code
    except KeyboardInterrupt:
        print("error: interrupted; what was compiled is kept", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Flags, and overrides of config options by dotted path; a wrong line ends the program."""
    top = argparse.ArgumentParser(
        prog="plan_pod.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--config", required=True, metavar="FILE", help="as for training")
    top.add_argument("--topology", required=True, help="such as v5p:4x4x8, v5e:16x16, h100:8x16")
    top.add_argument("--search", action="store_true", help="find the best plan, and compile it")
    top.add_argument("--compiles", type=typed.argument(options.Natural), default=3, metavar="N",
                     help="programs that a search may compile (3; 0: formulas only)")  # fmt: skip
    top.add_argument(
        "--price",
        type=typed.argument(options.NonNegative),
        help="of a chip and hour, for the cost of the run",
    )
    top.add_argument("--cache", default="~/.cache/olmo_jax/plans",
                     help="folder for what was compiled")  # fmt: skip
    args, rest = top.parse_known_args(argv)
    wrong = [x for x in rest if not x.startswith("--config.") or "=" not in x]
    if wrong:
        top.error(f"unknown arguments: {' '.join(wrong)}")
    overrides = dict(x.removeprefix("--config.").split("=", 1) for x in rest)
    found = [x for x in overrides if x.startswith("mesh.") or x in _FOUND]
    if args.search and found:
        top.error(f"--search finds config.{', config.'.join(found)}: leave it out")
    return args, overrides


if __name__ == "__main__":
    code = main(sys.argv[1:])
    cli.end_at_once()
    sys.exit(code)
