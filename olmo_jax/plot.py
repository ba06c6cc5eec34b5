"""Draw loss, learning rate, gradient norm and speed of one or several runs into one picture.

  python -m olmo_jax.plot RUN [RUN ...]

  RUN             the folder of a run (config.dir, or runs/NAME), also one that is still training
  --out=FILE      the picture (RUN/curves.png; of several runs ./curves.png)
  --x=steps       the x axis (tokens)
  --debug         show where in the code an error arose

Exit codes: 0 done, 1 failed, 2 wrong command line, 130, 143 and 129 interrupted.
"""

if __name__ == "__main__":  # before all else, which takes its time
    from olmo_jax import cli

    cli.run("plot")

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from olmo_jax import cli
from olmo_jax.records import plot


@dataclass(frozen=True)
class Arguments:
    """What a command says."""

    runs: tuple[str, ...]
    _: KW_ONLY
    out: str | None = None
    x: Literal["tokens", "steps"] = "tokens"


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    return cli.attempt(argv, __doc__, _plot)


def _plot(argv: list[str]) -> int:
    what = cli.parse(argv, Arguments)
    is_one = len(what.runs) == 1
    out = what.out or (f"{what.runs[0]}/curves.png" if is_one else "curves.png")
    plot.draw(list(what.runs), out, what.x)
    print(f"wrote {out}")
    return cli.DONE
