"""Convert, compare, average and upcycle checkpoints.

  python -m olmo_jax.convert to_jax SRC DST     any checkpoint as one that train and load take
    --optimizer               Adam's moments and step too
    --dtype=float32|bfloat16  of the parameters (float32, which train needs)
    --padded_vocab_size=N     rows of the tables, as model.padded_vocab_size
  python -m olmo_jax.convert to_hf SRC DST      any checkpoint as a Hugging Face folder
    --dtype=float32|bfloat16  of the parameters (as they came)
    --max_shard_size=SIZE     of each file, such as 500MiB (5GB)
  python -m olmo_jax.convert check A B          the largest difference of two, and where it is
    --atol=X                  largest difference that is none (0)
  python -m olmo_jax.convert average A B … OUT  the mean of several
  python -m olmo_jax.convert upcycle SRC OUT    a mixture of experts that starts as a dense model
    --n_experts=N             of each layer
    --n_experts_per_token=N   that a token takes (8)
    --router_std=X            of the routers' weights (0.02)
    --seed=N                  of the routers (0)

SRC, A and B are folders of Hugging Face, OLMo, OLMo-core or olmo_jax (a checkpoint or a run), here
or under https://, or ids on the Hugging Face Hub such as allenai/OLMo-2-1124-7B, of which
--revision=NAME (of to_jax, to_hf, upcycle) takes a branch, tag or commit. DST and OUT must not
exist. --debug shows where in the code an error arose.

Exit codes: 0 done (check: equal), 1 failed (check: they differ), 2 wrong command line, 130
interrupted, 143 and 129 ended by SIGTERM and SIGHUP; nothing half-written stays.
"""

if __name__ == "__main__":  # before all else, which takes its time
    from olmo_jax import cli

    cli.run("convert")

import ctypes
import os
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from olmo_jax import cli
from olmo_jax.config.options import ConfigError, Count, NonNegative, Seed
from olmo_jax.files import brief

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Of glibc's `mallopt`: no maps of their own for large arrays, nothing given back, one heap.
KEEP_MEMORY = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


@dataclass(frozen=True)
class ToJax:
    """What `to_jax` takes; this and the following are the arguments of functions."""

    src: str
    dst: str
    _: KW_ONLY
    optimizer: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    padded_vocab_size: Count | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ToHf:
    """What `to_hf` takes."""

    src: str
    dst: str
    _: KW_ONLY
    dtype: Literal["float32", "bfloat16"] | None = None
    max_shard_size: str = "5GB"
    revision: str | None = None


@dataclass(frozen=True)
class Check:
    """What `check` takes."""

    a: str
    b: str
    _: KW_ONLY
    atol: NonNegative = 0.0


@dataclass(frozen=True)
class Average:
    """What `average` takes."""

    sources: tuple[str, ...]
    dst: str


@dataclass(frozen=True)
class Upcycle:
    """What `upcycle` takes."""

    src: str
    dst: str
    _: KW_ONLY
    n_experts: Count
    n_experts_per_token: Count = 8
    router_std: NonNegative = 0.02
    seed: Seed = 0
    revision: str | None = None


ACTIONS = {
    "to_jax": ToJax,
    "to_hf": ToHf,
    "check": Check,
    "average": Average,
    "upcycle": Upcycle,
}


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        code = cli.attempt(argv, __doc__, _convert)
    except SystemExit as end:  # SIGTERM or SIGHUP
        code = int(end.code or 0)
    cli.leave(code)
    return code


def _convert(argv: list[str]) -> int:
    action, arguments = parse(argv)
    # Conversion needs the host only; an accelerator that is busy or small must not matter.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX takes a second to import: a wrong line is answered before.
    from olmo_jax.checkpoints import conversion, storage

    cli.unwind()
    if cli.is_command():
        keep_memory()
    try:
        done = getattr(conversion, action)(**arguments)
    except (ValueError, OSError, ImportError) as error:
        raise OSError(storage.cause(error)) from error
    return cli.FAILED if done is False else cli.DONE  # check: they differ


def parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """What is to be done, a function of `checkpoints.conversion`, and its arguments.

    Raises:
      ConfigError: with all that is wrong in the command line.
    """
    action, *rest = argv
    if action not in ACTIONS:
        close = cli.meant(action, {name: name for name in ACTIONS})
        raise ConfigError([f"{brief(action)}: need one of {', '.join(ACTIONS)}{close}; see --help"])
    arguments = dict(vars(cli.parse(rest, ACTIONS[action])))
    if "max_shard_size" in arguments:
        arguments["max_shard_bytes"] = n_bytes(arguments.pop("max_shard_size"))
    return action, arguments


def keep_memory() -> None:
    """Make this process keep the memory that arrays leave, for those that come.

    Fresh pages would take half of the time. It needs no more memory than giving them back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        for option, value in KEEP_MEMORY.values():
            mallopt(option, value)


def n_bytes(text: str) -> int:
    """The bytes of a size such as 5GB or 500MiB.

    Raises:
      ConfigError: if it is none.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ConfigError([f"--max_shard_size={brief(text)}: need a size such as 5GB or 500MiB"])
    return size
