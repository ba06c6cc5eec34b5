"""Several processes act as one: what process 0 says, when all stop, and that no other run writes.

They talk through JAX's coordinator and not through the devices, so that a background thread may.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jax._src import distributed  # its state has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

WAIT_S = 1800  # for the word of another process
LOCK_WAIT_S = 60.0  # for another run to leave the folder

_calls = itertools.count()
_kept: list[Any] = []  # files of locks that only the end of the process closes


def count() -> int:
    """Processes of the run; unlike JAX's own answer this one wakes no device."""
    return distributed.global_state.num_processes


def index() -> int:
    """Which of them this is."""
    return distributed.global_state.process_id


def from_process_0(work: Callable[[], Any], key: str | None = None) -> Any:
    """Run `work` in process 0 and give its result to all processes.

    Args:
      work: returns what JSON can hold.
      key: unique; needed off the main thread, where the order of calls is not that of all others.
    Raises:
      OSError: in the other processes, if it failed; process 0 raises the error itself.
    """
    if count() == 1:
        return work()
    key = key or f"olmo_jax {next(_calls)}"
    if index() != 0:
        answer = json.loads(hear(key))
        if answer["error"]:
            raise OSError(answer["error"])
        return answer["result"]
    try:
        answer = {"error": "", "result": work()}
    except BaseException as error:
        tell(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    tell(key, json.dumps(answer))
    return answer["result"]


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be, until the block ends.

    Enter it before anything of the folder is read: a run that is being stopped still writes there,
    and is waited for. Nothing stays of a folder in which nothing was written. A URL, and a file
    system without locks, cannot be kept so; that is said.

    Raises:
      OSError: if another run keeps it, or it cannot be written; in all processes.
    """
    name = os.fspath(folder)
    if "://" in name:
        say(f"config.dir: {name} has no lock; see that no other run writes there")
        yield
        return
    lock = _Lock(name)
    from_process_0(lock.take)
    try:
        yield
    except BaseException:
        lock.release(for_good=count() == 1)
        raise
    lock.release()


class _Lock:
    """The kernel's lock on `.lock` in a folder, so that a killed run leaves none behind."""

    def __init__(self, name: str):
        self._folder = pathlib.Path(name)
        self._path = self._folder / ".lock"
        self._file: Any = None
        self._made: list[pathlib.Path] = []  # folders that were not there, the inner one first

    def take(self) -> None:
        """Take the lock; wait for another run that is being stopped."""
        deadline, has_said = time.monotonic() + LOCK_WAIT_S, False
        while (holder := self._try()) is not None:
            found = f"config.dir: {self._folder} is in use by another run ({holder})"
            if time.monotonic() > deadline:
                raise OSError(f"{found}; wait for its end, stop it, or set another config.dir")
            if not has_said:
                print(f"{found}; waiting up to {LOCK_WAIT_S:g} s for its end", flush=True)
            has_said = True
            time.sleep(0.2)

    def _try(self) -> str | None:
        """Take the lock if it is free; else says who has it."""
        while True:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    return file.read().decode(errors="replace") or "at its beginning"
            except OSError as error:
                print(f"config.dir: {self._folder} has no lock ({error.strerror}); see that no"
                      " other run writes there", flush=True)  # fmt: skip
            if self._is_there(file):
                break
            file.close()  # who had it has removed it
        self._file = file
        with contextlib.suppress(OSError):  # a full disk; the name is for people
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        return None

    def _open(self) -> Any:
        try:
            path = self._folder.absolute()
            for _ in range(100):
                self._made = [part for part in (path, *path.parents) if not part.exists()]
                self._folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # removed between the two
                    return self._path.open("a+b", buffering=0)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
        except OSError as error:
            raise OSError(f"config.dir: cannot write {self._folder}: {error}") from error

    def _is_there(self, file: Any) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self, for_good: bool = True) -> None:
        """Give the folder back, and remove it if it is as empty as it was made.

        Args:
          for_good: False keeps the lock as long as the process lives if something was written: a
            save may be under way behind the error that ends one of several processes.
        """
        if self._file is None:  # not process 0
            return
        with contextlib.suppress(OSError):  # what is not empty stays
            if os.listdir(self._folder) == [self._path.name]:
                self._path.unlink()
                for_good = True
                for part in self._made:
                    part.rmdir()
        if not for_good:
            _kept.append(self._file)
            return
        self._file.close()


def say(line: str) -> None:
    """Print a line, once per run and not once per process."""
    if index() == 0:
        print(line, flush=True)


def tell(key: str, text: str) -> None:
    """Say something to the other processes, once per key."""
    if count() > 1:
        _client().key_value_set(key, text)


def hear(key: str) -> str:
    """What another process said.

    Raises:
      OSError: if it says nothing for WAIT_S.
    """
    try:
        return _client().blocking_key_value_get(key, WAIT_S * 1000)
    except RuntimeError as error:
        raise OSError(f"no word from another process ({key}) within {WAIT_S} s") from error


def _client() -> Any:
    return distributed.global_state.client


class Preemption:
    """Turns SIGTERM, SIGINT and SIGHUP into an orderly end; a second SIGINT ends it at once.

    SIGHUP stays ignored where it was: nohup asks for that.

    A single process stops when it asks next. Several agree on the question at which they stop
    through JAX's preemption service, whose SIGTERM handler a Python one would replace: make this
    after `jax.distributed.initialize`, and ask equally often in every process, after every step
    and every batch of an evaluation. Use as a context.
    """

    def __init__(self) -> None:
        self._stop = False
        self._asked = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if count() == 1:
                numbers.append(signal.SIGTERM)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._old = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # the signal may have ended who reads this
                os.write(2, b"\nstopping after this step; once more ends the run at once\n")
        if count() == 1:
            self._stop = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to save and stop now."""
        self._asked += 1
        if not self._stop and count() > 1:
            self._stop = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stop
