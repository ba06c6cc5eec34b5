"""`metrics.jsonl`, the file in a run's folder that holds every metric of every step."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from olmo_jax import files

NAME = "metrics.jsonl"
OF_A_STEP = "throughput/total tokens"  # in the record of every finished step


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
    """The record of a line; None for one that is torn or damaged."""
    try:
        record = json.loads(line)
        numbers = (record["step"], record["tokens"])
        is_whole = all(type(number) is int and number >= 0 for number in numbers)
        others = (int, float, list, type(None))
        return record if is_whole and all(isinstance(x, others) for x in record.values()) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class Jsonl:
    """The file of a run, trimmed to the steps that it builds on when it is resumed.

    Lines that are damaged are left out, and the file is kept beside the new one; a torn end is
    what a kill leaves.

    Args:
      path: of the file.
      last_step: records of later steps are removed.
    """

    seen: int  # the highest step that the file had before it was trimmed
    missing: list[tuple[int, int]]  # first and last step of each gap in what it keeps

    def __init__(self, path: pathlib.Path, last_step: int):
        self.path, self.seen = path, last_step
        is_there = bytearray(last_step + 1)  # by step
        if path.exists():
            self._trim(last_step, is_there)
        path.touch()
        self.missing = _gaps(is_there)

    def _trim(self, last_step: int, is_there: bytearray) -> None:
        kept, n_damaged, line = [], 0, b"\n"
        with self.path.open("rb") as f:
            for line in f:
                record = _parse(line)  # a whole one without its end was ended by an editor
                n_damaged += record is None and line.endswith(b"\n")
                step = last_step + 1 if record is None else record["step"]
                kept.append(step <= last_step)
                if record is not None:
                    self.seen = max(self.seen, step)
                    if kept[-1] and OF_A_STEP in record:
                        is_there[step] = 1
        if n_damaged:
            aside = free(self.path.with_name("metrics-damaged.jsonl"))
            shutil.copyfile(self.path, aside)
            print(f"{self.path}: damaged lines ({n_damaged:,}); it is kept as {aside.name}, and"
                  " goes on without them", flush=True)  # fmt: skip
        if not all(kept) or not line.endswith(b"\n"):
            with self.path.open("rb") as f:
                lines = (line.rstrip(b"\n") + b"\n" for line in f)
                with files.whole(self.path) as file:
                    file.writelines(itertools.compress(lines, kept))

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


def _gaps(is_there: bytearray) -> list[tuple[int, int]]:
    """First and last step of each gap, from the first step that is there: a run may begin late."""
    start = max(is_there.find(1, 1), 1)
    found = re.finditer(b"\0+", is_there[start:])
    return [(start + gap.start(), start + gap.end() - 1) for gap in found]


def spans(gaps: list[tuple[int, int]], most: int = 5) -> str:
    """Gaps in words: `step 3 and steps 7 to 9`; of more than `most` the first ones."""
    words = [f"step {i:,}" if i == j else f"steps {i:,} to {j:,}" for i, j in gaps[:most]]
    if len(gaps) > most:
        words.append(f"{sum(j - i + 1 for i, j in gaps[most:]):,} more")
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def free(path: pathlib.Path) -> pathlib.Path:
    """The path, or with -2, -3 … behind its stem, that is not there yet."""
    new, n = path, 1
    while new.exists():
        n += 1
        new = path.with_name(f"{path.stem}-{n}{path.suffix}")
    return new


def set_aside(run_dir: str | os.PathLike[str]) -> str | None:
    """Rename records of a run that has no checkpoint any more; returns their folder's name.

    Returns None where there is no record of a step.
    """
    folder = pathlib.Path(run_dir)
    if "://" in os.fspath(run_dir) or not (folder / NAME).exists() or not read(str(folder)):
        return None
    old = free(folder / time.strftime("records-%Y%m%d-%H%M%S", time.gmtime()))
    with writing(old):
        old.mkdir()
        for name in (NAME, "tensorboard", "wandb.json"):
            if (folder / name).exists():
                os.replace(folder / name, old / name)
    return old.name


class RecordFolder:
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
