"""What ends a process in which nothing moves."""

import os
import re
import sys
import threading
import time

import jax

STALLED = 74  # exit code, EX_IOERR: a step takes too long
GRACE_S = 3.0


class Watchdog:
    """Ends the process if nothing moves: a peer that died leaves the others in a collective.

    Use as a context; of a collective that fails it says in one line which step it was.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        # Process 0 holds the coordinator, without which JAX aborts the others: it goes last.
        is_coordinator = jax.process_index() == 0 and jax.process_count() > 1
        self._grace_s = GRACE_S if is_coordinator else 0.0
        self._beat = time.monotonic()
        self._what = "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def beat(self, what: str) -> None:
        """Something moved; `what` begins now."""
        self._beat, self._what = time.monotonic(), what

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        self._stop.set()
        self._thread.join()
        if jax.process_count() > 1 and _is_of_the_devices(error):
            raise OSError(
                f"{self._what} failed in process {jax.process_index()} of {jax.process_count()}:"
                f" {str(error).splitlines()[0]}; another process may have ended before: see its"
                " output"
            ) from error  # type: ignore[arg-type]

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout_s / 4)):
            waited = time.monotonic() - self._beat
            if waited > self._timeout_s + self._grace_s:
                print(
                    f"error: {self._what} has not finished after {waited:.0f} s"
                    f" (config.train.step_timeout_s={self._timeout_s:g}) in process"
                    f" {jax.process_index()} of {jax.process_count()}; the run ends here and can"
                    " be resumed",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED)  # the main thread is stuck inside a collective


def _is_of_the_devices(error: object) -> bool:
    """Whether XLA raised it; from a call, instead of a result, it comes as a ValueError."""
    is_status = isinstance(error, ValueError) and re.match(r"[A-Z_]{4,}: ", str(error)) is not None
    return is_status or isinstance(error, jax.errors.JaxRuntimeError)
