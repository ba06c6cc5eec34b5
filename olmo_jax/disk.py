"""Files of this machine, read by position.

They are not mapped into memory: a map of a file that somebody shortens ends the process without a
word. Here a read gives fewer bytes, and who asked says so.
"""

import os
import resource

import numpy as np

MOST_OPEN = 16_384  # files, or a quarter of what the process may have open


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

    def read_into(self, out: np.ndarray, start: int) -> int:
        """Fill `out` [n], which is contiguous, with what is in the file from byte `start` on.

        Returns: bytes that were read; fewer than `out` has only where the file ends.
        Raises:
          OSError: with the file.
        """
        try:
            rest = out.view(np.uint8).data
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
