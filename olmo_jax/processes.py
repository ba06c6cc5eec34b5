"""Several processes act as one: what process 0 says, when all stop, and that no other run writes.

They talk through JAX's coordinator and not through the devices, so that a background thread may.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

WAIT_S = 1800  # for the word of another process
EXIT_PREEMPTED = 75  # EX_TEMPFAIL, "try again later": the SLURM script answers with a requeue

_calls = itertools.count()


def from_process_0(work: Callable[[], Any], key: str | None = None) -> Any:
    """Run `work` in process 0 and give its result to all processes.

    Args:
      work: returns what JSON can hold.
      key: unique; needed off the main thread, where the order of calls is not that of all others.
    Raises:
      OSError: in the other processes, if it failed; process 0 raises the error itself.
    """
    if jax.process_count() == 1:
        return work()
    key = key or f"olmo_jax {next(_calls)}"
    if jax.process_index() != 0:
        answer = json.loads(hear(key))
        if answer["error"]:
            raise OSError(answer["error"])
        return answer["result"]
    try:
        answer = {"error": "", "result": work()}
    except Exception as error:
        tell(key, json.dumps({"error": str(error) or type(error).__name__}))
        raise
    tell(key, json.dumps(answer))
    return answer["result"]


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be, as long as this process lives.

    The lock is the kernel's, on `.lock` there, so a killed run leaves none behind. A URL, and a
    file system without locks, cannot be kept so.

    Raises:
      OSError: if another run has it (in all processes), or the folder cannot be written.
    """
    name = os.fspath(folder)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                pathlib.Path(name).mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((pathlib.Path(name) / ".lock").open("a+"))
            except OSError as error:
                raise OSError(f"config.dir: cannot write {name}: {error}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OSError(
                    f"config.dir: {name} is in use by another run ({file.read().strip()}); wait for"
                    " its end, stop it, or set another config.dir"
                ) from None
            except OSError:
                return  # no locks here
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()

        if "://" not in name:
            from_process_0(take)
        yield


def say(line: str) -> None:
    """Print a line, once per run and not once per process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def tell(key: str, text: str) -> None:
    """Say something to the other processes, once per key."""
    if jax.process_count() > 1:
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
    """Turns SIGTERM and SIGINT into an orderly end; a second SIGINT ends the process at once.

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
            if jax.process_count() == 1:
                self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"\nstopping after this step; once more ends the run at once\n")
        if jax.process_count() == 1:
            self._stop = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to save and stop now."""
        self._asked += 1
        if not self._stop and jax.process_count() > 1:
            self._stop = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stop
