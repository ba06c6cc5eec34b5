"""`metrics.jsonl`, the file in a run's folder that holds every metric of every step."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

NAME = "metrics.jsonl"


def read(run_dir: Any) -> dict[int, dict[str, Any]]:
    """The records of a run: by ascending step, metrics by name, with `tokens` and `time`.

    Tables are lists of rows. A value that was written twice counts as last written. Null is NaN.

    Args:
      run_dir: a folder, as a string or as a path object (needed for a URL).

    Raises:
      FileNotFoundError: if there are none.
    """
    path = (pathlib.Path(run_dir) if isinstance(run_dir, str) else run_dir) / NAME
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; need the folder of a run, which has it")
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        record = _parse(line)
        if record is not None:
            step = record.pop("step")
            values = {k: math.nan if v is None else v for k, v in record.items()}
            steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for one that was torn by a crash."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class Jsonl:
    """The file of a run, trimmed to the steps that it builds on when it is resumed.

    Args:
      path: of the file.
      last_step: records of later steps are removed.
    """

    seen: int  # the highest step that the file had before it was trimmed

    def __init__(self, path: pathlib.Path, last_step: int):
        self.path, self.seen = path, last_step
        if path.exists():
            self._trim(last_step)
        path.touch()

    def _trim(self, last_step: int) -> None:
        def keep(line: bytes) -> bool:
            record = _parse(line) if line.endswith(b"\n") else None
            if record is None:
                return False
            self.seen = max(self.seen, record["step"])
            return record["step"] <= last_step

        with self.path.open("rb") as f:
            kept = [keep(line) for line in f]
        if not all(kept):
            with self.path.open("rb") as f:
                replace(self.path, filter(keep, f))

    def log(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Append a record, which survives the process, whatever ends that."""
        record = {"step": step, "tokens": tokens, "time": round(time.time(), 3)}
        is_lost = lambda v: isinstance(v, float) and not math.isfinite(v)  # noqa: E731
        record |= {k: None if is_lost(v) else v for k, v in values.items()}
        with self.path.open("ab", buffering=0) as f:
            f.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Bring the file to disk, so that it survives the machine too."""
        with self.path.open("ab") as f:
            os.fsync(f.fileno())


def set_aside(run_dir: str | os.PathLike[str]) -> str | None:
    """Rename records of a run that has no checkpoint any more; returns their folder's name.

    Returns None where there is no record of a step.
    """
    folder = pathlib.Path(run_dir)
    if "://" in os.fspath(run_dir) or not (folder / NAME).exists() or not read(str(folder)):
        return None
    old = folder / time.strftime("records-%Y%m%d-%H%M%S", time.gmtime())
    with writing(old):
        old.mkdir()
        for name in (NAME, "tensorboard", "wandb.json"):
            if (folder / name).exists():
                os.replace(folder / name, old / name)
    return old.name


class Folder:
    """The folder of the records: the run's own, or a local copy of it where that is a URL."""

    local: pathlib.Path  # where to write

    def __init__(self, run_dir: Any):
        self._remote, self._pushed = None, {}
        if "://" not in os.fspath(run_dir):
            self.local = pathlib.Path(run_dir)
            with writing(self.local):
                self.local.mkdir(parents=True, exist_ok=True)
            return
        if isinstance(run_dir, str):
            raise ValueError(f"{run_dir}: need a path object for a URL")
        self._remote = run_dir
        self._temporary = tempfile.TemporaryDirectory(prefix="olmo_jax_")
        self.local = pathlib.Path(self._temporary.name)
        for name in (NAME, "wandb.json"):  # what a resumed run reads
            if (run_dir / name).exists():
                (self.local / name).write_bytes((run_dir / name).read_bytes())

    def push(self) -> None:
        """Copy the files that grew to the URL.

        Before each checkpoint is often enough: what follows the last checkpoint is trained, and so
        recorded, again.
        """
        if self._remote is None:
            return
        for path in sorted(self.local.rglob("*")):
            name, size = path.relative_to(self.local).as_posix(), path.stat().st_size
            if path.is_file() and self._pushed.get(name) != size and name[:6] != "wandb/":
                target = self._remote / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._pushed[name] = size

    def close(self) -> None:
        """Remove the local copy."""
        if self._remote is not None:
            self._temporary.cleanup()


def replace(path: pathlib.Path, parts: Iterable[bytes]) -> None:
    """Write a file anew, wholly or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        f.writelines(parts)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Say what to do when records cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{error.filename or path}: cannot write the records of the run:"
            f" {error.strerror or error}; free some space, or set config.dir to another folder"
        ) from error
