"""Paths, local or on gs://, and files: written whole, read by position, or strictly as JSON."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import resource
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from etils import epath

Path = epath.Path

DEEPEST = 100  # groups within groups; Python's own limit depends on its version and on the caller
MOST_OPEN = 16_384  # files, or a quarter of what the process may have open


# --- paths ----------------------------------------------------------------------------------------


def path(name: str | os.PathLike) -> Path:
    """The path of a local folder (made absolute) or of a `gs://` one.

    Raises:
      ValueError: if there is no such home folder, or no such kind of address.
      ImportError: if the package for `gs://` is not installed.
    """
    text = expand(name)
    is_remote, said = is_address(text), brief(text)
    if is_remote and not text.startswith("gs://"):
        raise ValueError(f"{said}: need a local path or gs://BUCKET/…")
    if is_remote and not (_has("gcsfs") or _has("tensorflow")):
        raise ImportError(f"{said}: a folder on gs:// needs gcsfs; pip install gcsfs")
    return epath.Path(text if is_remote else os.path.abspath(text))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def path_problem(path: str) -> str | None:
    """What is wrong with the path of a local file; None if it can be one."""
    if path.startswith("~"):
        return f"there is no home folder of {brief(path.split('/')[0])}; write the whole path"
    if any(ord(c) < 32 for c in path):
        return "need a path without control characters"
    sizes = [len(part.encode(errors="surrogatepass")) for part in path.split("/")]
    if max(sizes) > 255 or sum(sizes) + len(sizes) > 4096:
        return "need a path of at most 4,095 bytes, and 255 in each name"
    return None


def is_address(path: str) -> bool:
    """Whether it begins as `gs://` does, or `gs:/`: no folder here has such a name."""
    return re.match(r"[A-Za-z][\w+.-]*:/", path) is not None


def expand(path: str | os.PathLike[str]) -> str:
    """The path with the home folder in the place of a leading ~: all paths of users come by here.

    Raises:
      ValueError: if there is no such home folder; a folder called ~ is never made.
    """
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith("~"):
        raise ValueError(f"{brief(expanded)}: {path_problem(expanded)}")
    return expanded


def brief(text: str) -> str:
    """The text on one line that is not long."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= 120 else f"{line[:80]} … {line[-20:]}"


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: Any) -> Iterator[BinaryIO]:
    """A file to write into, which gets its name when all of it is on disk, or never.

    Until then others read what was there before, and several may write the same. What a link leads
    to is written, with the mode that it had; a device or a pipe takes the bytes as they come.

    Args:
      path: local, or of a bucket, which does so by itself; its folder is there.
    """
    if is_address(os.fspath(path)):
        held = io.BytesIO()
        yield held
        path.write_bytes(held.getvalue())
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    partial = f"{path}.tmp{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        pathlib.Path(partial).unlink(missing_ok=True)


# --- reading by position --------------------------------------------------------------------------


# A file is not mapped into memory: a map of a file that somebody shortens ends the process without
# a word. Here a read gives fewer bytes, and who asked says so.


class OpenFile:
    """An open file, closed with its last reference: one thread may drop what another reads."""

    _number = -1

    def __init__(self, path: str | os.PathLike[str]):
        self._path = os.fspath(path)
        self._number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    @property
    def size(self) -> int:
        """Bytes in the file, now."""
        return os.fstat(self._number).st_size

    def read_into(self, out: Any, start: int) -> int:
        """Fill `out`, a contiguous array of one dimension, with the file from byte `start` on.

        Returns: bytes that were read; fewer than `out` has only where the file ends.
        Raises:
          OSError: with the file.
        """
        try:
            rest = memoryview(out.view("u1"))
            done = n = os.preadv(self._number, [rest], start)
            while n and done < out.nbytes:  # the system may give less than there is
                n = os.preadv(self._number, [rest[done:]], start + done)
                done += n
        except OSError as error:
            error.filename = self._path  # the system says only what is wrong
            raise
        return done


def most_open() -> int:
    """How many files one owner keeps open; the rest of the process needs some too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, limit // 4))


# --- reading JSON ---------------------------------------------------------------------------------


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      data: the file's bytes.
      where: the file, for errors.
    Raises:
      ValueError: if it is not UTF-8, no JSON, no object, nested too deeply, says a key twice,
        NaN or a number that no file has: readers differ on these, so that two of them see two
        things in one file.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_without_twins,
            parse_constant=_refuse_constant,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    groups: list[Any] = [value]
    for _ in range(DEEPEST):
        values = [v for g in groups for v in (g.values() if isinstance(g, dict) else g)]
        groups = [v for v in values if isinstance(v, (dict, list))]
    if groups:
        raise ValueError(_too_deep(where))
    return value


def is_inside(name: Any) -> bool:
    """Whether this is the name of a file in a folder or below it, on every operating system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not set(name) & set(":\\")
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _too_deep(where: str) -> str:
    return f"{where} is damaged: more than {DEEPEST} groups within each other"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in values if keys.count(k) > 1)!r} is there twice")
    return values


def _integer(text: str) -> int:
    if len(text) > 20:  # of 64 bits, with a sign
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
