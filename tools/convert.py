"""Convert, compare, average and upcycle checkpoints.

  python tools/convert.py to_jax SRC DST     any checkpoint as one that train and load take
  python tools/convert.py to_hf SRC DST      any checkpoint as a Hugging Face folder
  python tools/convert.py check A B          the largest difference of two, and where it is
  python tools/convert.py average A B … OUT  the mean of several
  python tools/convert.py upcycle SRC OUT    a mixture of experts that starts as a dense model

SRC, A and B are folders of Hugging Face, OLMo, OLMo-core or olmo_jax (a checkpoint or a run), here
or under https://, or ids on the Hugging Face Hub such as allenai/OLMo-2-1124-7B.
Exit codes: 0 done (check: equal), 1 failed (check: they differ), 2 wrong command line, 130
interrupted, 143 and 129 ended by SIGTERM and SIGHUP; nothing half-written stays.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # runs from a clone, installed or not

from olmo_jax import cli

if __name__ == "__main__":
    cli.begin()

import argparse
import os
import re

from olmo_jax.config import options, typed

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    given = vars(parser().parse_args(argv))  # as the verb's function names them
    # Conversion needs the host only; an accelerator that is busy or small must not matter.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        from olmo_jax.checkpoints import (
            conversion,  # JAX takes a second; a wrong line answers at once
        )

        cli.unwind()
        done = getattr(conversion, given.pop("verb"))(**given)
        return int(done is False)  # check: they differ
    except (ValueError, OSError, ImportError) as error:
        from olmo_jax.checkpoints import storage

        print(f"error: {storage.cause(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    top = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    count, size = typed.argument(options.Count), typed.argument(options.NonNegative)
    verbs = top.add_subparsers(required=True, dest="verb", metavar="VERB")

    to_jax = verbs.add_parser("to_jax", help="write a checkpoint of olmo_jax", allow_abbrev=False)
    to_jax.add_argument("src", metavar="SRC")
    to_jax.add_argument("dst", metavar="DST", help="the new checkpoint; must not exist")
    to_jax.add_argument("--optimizer", action="store_true", help="Adam's moments and step too")
    to_jax.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="train needs float32"
    )
    to_jax.add_argument(
        "--padded_vocab_size", type=count, help="rows of the tables, as model.padded_vocab_size"
    )
    to_jax.add_argument("--revision", help="branch, tag or commit of a Hub id")

    to_hf = verbs.add_parser("to_hf", help="write a Hugging Face folder", allow_abbrev=False)
    to_hf.add_argument("src", metavar="SRC")
    to_hf.add_argument("dst", metavar="DST", help="the new folder; must not exist")
    to_hf.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: as the parameters came"
    )
    to_hf.add_argument(
        "--max_shard_size", dest="max_shard_bytes", metavar="SIZE", type=n_bytes, default="5GB",
        help="of each file",
    )  # fmt: skip
    to_hf.add_argument("--revision", help="branch, tag or commit of a Hub id")

    check = verbs.add_parser("check", help="compare two checkpoints", allow_abbrev=False)
    check.add_argument("a", metavar="A")
    check.add_argument("b", metavar="B")
    check.add_argument("--atol", type=size, default=0.0, help="largest difference that is none")

    average = verbs.add_parser("average", help="the mean of checkpoints", allow_abbrev=False)
    average.add_argument("sources", nargs="+", metavar="A")
    average.add_argument("dst", metavar="OUT", help="the new checkpoint; must not exist")

    upcycle = verbs.add_parser("upcycle", help="experts out of an MLP", allow_abbrev=False)
    upcycle.add_argument("src", metavar="SRC", help="a dense model")
    upcycle.add_argument("dst", metavar="OUT", help="the new checkpoint; must not exist")
    upcycle.add_argument("--n_experts", type=count, required=True, help="of each layer")
    upcycle.add_argument("--n_experts_per_token", type=count, default=8, help="that a token takes")
    upcycle.add_argument("--router_std", type=size, default=0.02, help="of the routers' weights")
    upcycle.add_argument(
        "--seed", type=typed.argument(options.Seed), default=0, help="of the routers"
    )
    upcycle.add_argument("--revision", help="branch, tag or commit on the Hub")
    return top


def n_bytes(text: str) -> int:
    """The bytes of a size such as 5GB or 500MiB."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MiB")
    return size


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:
        # Large arrays come and go: fresh memory in small pages would take half of the time.
        keep = "hugetlb=1 mmap_max=0 trim_threshold=4000000000 arena_max=1".split()
        os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{option}" for option in keep)
        os.execv(sys.executable, sys.orig_argv)
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = int(end.code or 0)
    cli.end_at_once()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # now: threads may still wait for a server that is silent
