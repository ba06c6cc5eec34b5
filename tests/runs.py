"""Training runs for tests, started as a user starts them: in this process or in others."""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from olmo_jax import train

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "tiny_olmo2.py"  # 20 steps of 8 rows of 64 tokens, ids below 512
EOS = 0
# What other processes of the tests import from.
PATHS = os.pathsep.join(str(ROOT / f) for f in (".", "tests", "tests/checkpoints", "tests/records"))


@dataclasses.dataclass
class Result:
    """How a run in this process ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What it complained about; a traceback or anything else on stderr is a fault."""
        lines = self.err.splitlines()
        assert all(line.startswith("error: ") for line in lines), self.err
        return [line.removeprefix("error: ") for line in lines]


def flags(*options: str) -> list[str]:
    """Arguments from `part.option=value` words; those that begin with -- stay."""
    return [o if o.startswith("--") else f"--config.{o}" for o in options]


def run(*options: str) -> Result:
    """Run the trainer here, on the tiny config unless the options name another."""
    arguments = flags(*options)
    if not any(a.startswith("--config=") for a in arguments):
        arguments = [f"--config={CONFIG}", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main(arguments)
    return Result(code, out.getvalue(), err.getvalue())


def xla_flags(n_devices: int) -> str:
    """`XLA_FLAGS` of another process: those of the tests, with so many virtual devices."""
    count = "--xla_force_host_platform_device_count="
    others = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(count)]
    return " ".join([*others, f"{count}{n_devices}"])


def start(
    *arguments: str, code: str = "", n_devices: int = 8, n_threads: int = 16, **keywords
) -> subprocess.Popen:
    """Start the trainer in a process of its own, on the tiny config.

    Args:
      arguments: its command line, after `--config`.
      code: runs before.
      n_devices: virtual ones.
      n_threads: of XLA; a thread per core would not do, each device blocks one in a collective.
      keywords: of Popen.
    """
    environment = os.environ | {
        "PYTHONPATH": PATHS,
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "NPROC": str(n_threads),
        "XLA_FLAGS": xla_flags(n_devices),
    }
    command = [sys.executable, "-m", "olmo_jax.train"]
    if code:
        last = "\nimport sys\nfrom olmo_jax import train\nsys.exit(train.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code + last]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, f"--config={CONFIG}", *arguments], env=environment, **pipes | keywords
    )


def write_tokens(path: pathlib.Path, n: int = 20_000, seed: int = 0) -> pathlib.Path:
    """A token file with some order in it: documents of 48 to 112 ids that each end with EOS."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 9, n)
    ids = 1 + np.cumsum(steps) % 511
    ids[np.cumsum(rng.integers(48, 112, n // 80)) % n] = EOS
    ids.astype("<u2").tofile(path)
    return path


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Every file under a folder with a digest of what it holds."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def arrays(checkpoint: pathlib.Path, parts: tuple[str, ...] = ("step", "params", "opt_state")):
    """The arrays of a checkpoint as stored: each file's digest, by leaf and chunk."""
    files = contents(checkpoint)
    return {name: digest for name, digest in files.items() if name.split(".")[0] in parts}


@contextlib.contextmanager
def processes(*commands: subprocess.Popen) -> Iterator[tuple[subprocess.Popen, ...]]:
    """Processes that are ended with the block, however that ends."""
    try:
        yield commands
    finally:
        for process in commands:
            if process.poll() is None:
                process.kill()
            process.communicate()
