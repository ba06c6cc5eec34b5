"""The training step, compiled for devices that are not here, and kept on disk.

A compilation takes minutes of a core, so it runs in a process of its own, whose end is not the end
of this one, and its result is kept under a name made of all that it depends on.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from olmo_jax import files
from olmo_jax.config.costs import GIB
from olmo_jax.config.options import Bears, bearing
from olmo_jax.config.run import Config, from_dict
from olmo_jax.config.text import flatten, to_dict
from olmo_jax.data.batch import dtypes
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import sharding
from olmo_jax.pods import kernels
from olmo_jax.pods.chips import ENVIRONMENT, Slice
from olmo_jax.training import losses, step
from olmo_jax.training.state import abstract_state

PACKAGE = pathlib.Path(__file__).parents[1]
# What a compiled step depends on, of the package and of a config.
SOURCES = (
    "config/model.py", "parallel/sharding.py", "parallel/xla_flags.py", "nn", "kernels",
    "training/experts.py", "training/losses.py", "training/optim.py", "training/optim_optax.py",
    "training/state.py",
    "training/step.py",
)  # fmt: skip
_OUT_OF_MEMORY = re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)")
# What comes of reading what was kept, if it is not whole.
_NOT_WHOLE = (gzip.BadGzipFile, EOFError, zlib.error, ValueError, TypeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or what kept it from being one.

    Attributes:
      text: optimized HLO; empty if it does not fit.
      memory: bytes on a device by kind: argument, output, alias, temp, generated_code.
      needs: bytes that the compiler asked for, where the device has less.
      seconds: that the compiler took.
    """

    text: str
    memory: dict[str, float]
    needs: float | None
    seconds: float


class DoesNotFitError(Exception):
    """A program needs more memory than a device has; `needs` bytes."""

    def __init__(self, needs: float):
        super().__init__(f"needs {needs / GIB:.2f} GiB")
        self.needs = needs


def lower(config: Config, mesh: Mesh) -> Any:
    """The training step on abstract arrays, as `jax.jit(…).lower` gives it."""
    shape = (config.data.global_batch_size // config.data.seq_len, config.data.seq_len)
    split = NamedSharding(mesh, sharding.spec(("batch", "seq")))
    arrays = dtypes(config.data.document_mask != "none")
    batch = {n: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for n, dtype in arrays.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    m, t, o = config.model, config.train, config.optim
    state, model = abstract_state(m, o, mesh), Transformer(m, config.compute)
    objective = losses.next_token(m, config.compute, t)
    update = step.make_update(objective, model, t, o, mesh)
    return update.lower(state, batch, scalar, scalar)


def compile_step(config: Config, mesh: Mesh) -> Any:
    """Compile the step for the devices of a mesh, which need not be here, in this process.

    Raises:
      DoesNotFitError: if it needs more memory than a device has.
    """
    try:
        return lower(config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _OUT_OF_MEMORY.search(str(error)):
            raise DoesNotFitError(_size(found[1])) from error
        raise


def memory_of(compiled: Any) -> dict[str, float]:
    """Bytes that a program takes on a device, by the compiler's kinds."""
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: float(getattr(found, f"{name}_size_in_bytes")) for name in names}


def _size(text: str) -> float:
    return float(text[:-1]) * 2.0 ** (10 * ("KMGT".index(text[-1]) + 1))


@dataclasses.dataclass(frozen=True)
class PlanStore:
    """A folder of what was compiled."""

    folder: pathlib.Path

    def kept(self, config: Config, where: Slice) -> Program | None:
        """The compiled step of a config, if it is there and whole."""
        try:
            return _read(self._path(config, where))
        except (FileNotFoundError, *_NOT_WHOLE):
            return None

    def make(self, config: Config, where: Slice) -> Program:
        """Compile the step of a config, in a process of its own, and keep it.

        Raises:
          RuntimeError: if the compiler fails, or is ended for the memory that it takes.
        """
        path = self._path(config, where)
        self.folder.mkdir(parents=True, exist_ok=True)
        _run_child({"config": to_dict(config), "topology": where.name, "path": str(path)})
        return _read(path)

    def attention(self, case: kernels.Case) -> tuple[float, float]:
        """`kernels.seconds` of a case.

        Raises:
          RuntimeError: as that does.
        """
        path = (
            self.folder
            / f"attention-{_digest([case, _versions(), _sources(('kernels', 'pods/kernels.py'))])}"
        )
        try:
            forward, backward = map(float, json.loads(path.read_bytes()))
        except (FileNotFoundError, *_NOT_WHOLE):
            forward, backward = kernels.seconds(case)
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.whole(path) as file:
                file.write(json.dumps((forward, backward)).encode())
        return forward, backward

    def _path(self, config: Config, where: Slice) -> pathlib.Path:
        options = flatten(to_dict(config))
        known = bearing(Config, Bears.PROGRAM)  # and what is in an open group of options
        reaches = {
            name: value
            for name, value in sorted(options.items())
            if name in known or name.rpartition(".")[0] in known
        }
        what = [reaches, where.name, _versions(), _sources(SOURCES)]
        return self.folder / f"step-{_digest(what)}.json.gz"


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


def _versions() -> list[str]:
    return [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]


def _sources(parts: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: no sources of a program")
        for file in files:
            found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _read(path: pathlib.Path) -> Program:
    with gzip.open(path, "rb") as file:
        return Program(**json.load(file))


def _run_child(task: dict[str, Any]) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.run(
            [sys.executable, "-m", "olmo_jax.pods.compiled"],
            input=json.dumps(task), encoding="utf-8", stdout=log, stderr=log,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        if child.returncode == 0:
            return
        log.seek(0)
        said = log.read().strip()
    if child.returncode < 0:
        raise RuntimeError(
            f"the compiler was ended by signal {-child.returncode}; if that is 9, this machine has"
            " too little memory for it"
        )
    raise RuntimeError(f"the compiler failed: {said[-400:]}")


def _child(task: dict[str, Any]) -> None:
    config, where = from_dict(task["config"]), Slice.parse(task["topology"])
    mesh = sharding.make_mesh(config.mesh, where.devices())
    start = time.monotonic()
    try:
        compiled = compile_step(config, mesh)
    except DoesNotFitError as error:
        made = Program("", {}, error.needs, time.monotonic() - start)
    else:
        made = Program(compiled.as_text(), memory_of(compiled), None, time.monotonic() - start)
    content = json.dumps(dataclasses.asdict(made)).encode()
    with files.whole(task["path"]) as file:
        file.write(gzip.compress(content, 6))


if __name__ == "__main__":
    _child(json.load(sys.stdin))
