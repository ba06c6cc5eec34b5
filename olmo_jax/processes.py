"""Several processes act as one: what process 0 says, and when all stop.

They talk through JAX's coordinator and not through the devices, so that a background thread may.
"""

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
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

    A single process stops after the step it is in. Several agree on a step through JAX's preemption
    service, whose SIGTERM handler a Python one would replace: make this after
    `jax.distributed.initialize`, and ask in every process after every step. Use as a context.
    """

    def __init__(self) -> None:
        self._stop = False
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

    def requested(self, step: int) -> bool:
        """Whether to save and stop now.

        Args:
          step: the step just finished, one more at every call.
        """
        if not self._stop and jax.process_count() > 1:
            self._stop = multihost_utils.reached_preemption_sync_point(step)
        return self._stop
