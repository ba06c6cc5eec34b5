"""Draw loss, learning rate, gradient norm and speed of one or several runs into one picture.

Run:   python tools/plot_run.py RUN [RUN ...] [--out FILE] [--x tokens|steps]
RUN is the folder of a run (`config.dir`, or runs/NAME), also one that is still training.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # runs from a clone, installed or not

from olmo_jax import cli

if __name__ == "__main__":
    cli.begin()

import argparse

from olmo_jax.records import plot


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="plot_run.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", help="picture to write; default: RUN/curves.png, or ./curves.png")
    parser.add_argument("--x", choices=["tokens", "steps"], default="tokens", help="x axis")
    args = parser.parse_args(argv)
    out = args.out or (f"{args.runs[0]}/curves.png" if len(args.runs) == 1 else "curves.png")
    try:
        plot.draw(args.runs, out, args.x)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
