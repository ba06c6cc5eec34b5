"""Folders that checkpoints are read from, here or behind `https://`: any stretch of any file.

Nothing is downloaded whole: a reader asks for the bytes that it needs. Requests that fail are
repeated from where they broke off.
"""

import concurrent.futures
import functools
import http.client
import os
import pathlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

import numpy as np

import olmo_jax
from olmo_jax import files

PART_BYTES = 16 << 20  # of one request; several are under way at once
THREADS = 8
ATTEMPTS = 6  # of each request before giving up
FIRST_WAIT = 0.5  # seconds before the second attempt; doubles
TIMEOUT = 60  # seconds without an answer

T = TypeVar("T")


class SourceFolder(Protocol):
    """Files by their names relative to the folder, such as `train/rank0.pt`."""

    name: str  # as the user wrote it

    def has(self, file: str) -> bool:
        """Whether the file is there."""
        ...

    def size(self, file: str) -> int:
        """Bytes in the file.

        Raises:
          FileNotFoundError: if it is not there.
        """
        ...

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes `start` to `stop` of a file, uint8; None: to its end.

        Raises:
          FileNotFoundError: if it is not there.
          ValueError: if it is shorter.
        """
        ...

    def inside(self, folder: str) -> list[str]:
        """The files of a folder in it, as `folder/file`; web servers have no list of theirs."""
        ...


def open(src: str) -> SourceFolder:
    """The folder at a path or an address."""
    return Remote(src) if re.match(r"https?://", src) else Local(src)


def text(folder: SourceFolder, file: str) -> str:
    """The text of a small file."""
    return folder.read(file).tobytes().decode()


class Local:
    """A folder of this machine."""

    def __init__(self, src: str):
        self.name = src
        self.path = pathlib.Path(files.expand(src))
        self._opened = functools.lru_cache(maxsize=files.most_open())(self._open)

    def has(self, file: str) -> bool:
        """Whether the file is there."""
        return (self.path / file).is_file()

    def size(self, file: str) -> int:
        """Bytes in the file."""
        if not self.has(file):
            raise FileNotFoundError(f"{self.name}: {file} is missing")
        return (self.path / file).stat().st_size

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes `start` to `stop` of a file."""
        size = self.size(file)
        stop = size if stop is None else stop
        if stop > size:
            raise ValueError(_short(self.name, file, size, stop))
        out, opened = np.empty(stop - start, np.uint8), self._opened(file)
        if opened.read_into(out, start) < out.nbytes:
            raise ValueError(_short(self.name, file, opened.size, stop))
        return out

    def inside(self, folder: str) -> list[str]:
        """The files of a folder in it, by name; none where it is not there."""
        files = (self.path / folder).iterdir() if (self.path / folder).is_dir() else ()
        return sorted(f"{folder}/{file.name}" for file in files if file.is_file())

    def _open(self, file: str) -> files.OpenFile:
        return files.OpenFile(self.path / file)


class Remote:
    """A folder behind `https://` whose server answers range requests."""

    def __init__(self, src: str):
        self.name = src
        self._base = src.rstrip("/") + "/"
        self.size = functools.lru_cache(maxsize=None)(self._size)

    def has(self, file: str) -> bool:
        """Whether the file is there."""
        try:
            self.size(file)
        except FileNotFoundError:
            return False
        return True

    def _size(self, file: str) -> int:
        """Bytes in the file, from the answer to a request for one of them."""
        return self._request(file, 0, 1)[1]

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes `start` to `stop` of a file, in parts that come at the same time."""
        size = self.size(file)
        stop = size if stop is None else stop
        if stop > size:
            raise ValueError(_short(self.name, file, size, stop))
        out = np.empty(stop - start, np.uint8)

        def part(at: int) -> None:
            end = min(at + PART_BYTES, stop)
            out[at - start : end - start] = np.frombuffer(self._part(file, at, end), np.uint8)

        at_once(part, range(start, stop, PART_BYTES))
        return out

    def inside(self, folder: str) -> list[str]:
        """Nothing: a web server has no list of its files that all would have in common."""
        return []

    def _part(self, file: str, start: int, stop: int) -> bytes:
        """A stretch of a file; what a broken connection left is kept."""
        data = b""
        while len(data) < stop - start:
            more, size = self._request(file, start + len(data), stop)
            if size != self.size(file):
                raise OSError(f"{self._base}{file} changed while it was read")
            data += more
        return data[: stop - start]

    def _request(self, file: str, start: int, stop: int) -> tuple[bytes, int]:
        """Some bytes from `start` on, at least one, and the size of the whole file.

        Raises:
          FileNotFoundError: if the server has no such file.
          OSError: if it gave no answer after ATTEMPTS, or none that can be used.
        """
        url = self._base + file
        headers = {
            "Range": f"bytes={start}-{stop - 1}",
            "User-Agent": f"olmo_jax/{olmo_jax.__version__}",  # some servers refuse urllib's own
        }
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                request = urllib.request.Request(url, headers=headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return _body(answer, url, start, stop)
            except urllib.error.HTTPError as error:
                if error.code in (403, 404, 410):
                    text = f"{self.name}: {file} is missing (HTTP {error.code})"
                    raise FileNotFoundError(text) from None
                if error.code == 416:  # an empty file has no byte to give
                    return b"", 0
                if error.code != 429 and error.code < 500:
                    raise OSError(f"{url}: HTTP {error.code} {error.reason}") from None
                cause = f"HTTP {error.code} {error.reason}"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                if isinstance(error, _UnusableError):
                    raise
                cause = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < ATTEMPTS:
                time.sleep(wait)
                wait *= 2
        raise OSError(f"{url}: no answer after {ATTEMPTS} attempts: {cause}")


def at_once(function: Callable[[Any], T], values: Collection[Any]) -> list[T]:
    """The results in order; several are waited for at the same time."""
    if len(values) < 2:
        return [function(value) for value in values]
    threads = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        return list(threads.map(function, values))
    finally:  # an error or Ctrl-C does not wait for the others
        threads.shutdown(wait=False, cancel_futures=True)


class _UnusableError(OSError):
    """An answer that another attempt would not better."""


def _body(answer: http.client.HTTPResponse, url: str, start: int, stop: int) -> tuple[bytes, int]:
    """What came of the bytes that were asked for, and the size of the file."""
    if answer.status != 206:
        size = int(answer.headers.get("Content-Length", -1))
        if start or size > stop:
            raise _UnusableError(f"{url}: the server does not answer range requests")
        return answer.read(), size
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise _UnusableError(f"{url}: the server answered with another range than bytes {start}-")
    try:
        data = answer.read()
    except http.client.IncompleteRead as error:
        data = error.partial
    if not data:
        raise http.client.HTTPException("the connection broke off")
    return data, int(match[2])


def _short(folder: str, file: str, size: int, need: int) -> str:
    return f"{os.path.join(folder, file)} is truncated: it has {size:,} bytes, {need:,} are needed"
