"""How a command begins: signals end it without a traceback, and its output outlives its readers.

First in a command, and of the standard library alone: all else takes a second to import.
"""

import errno
import io
import os
import signal
import sys
from typing import Any, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_codes = {number: 128 + number for number in SIGNALS}  # as shells count
_has_begun = False


def begin(preempted: int | None = None) -> None:
    """Prepare this process for a command; nothing is to be lost yet when a signal ends it.

    Where the output is caught, as in a notebook, the process is not the command's: it stays as it
    is, here and in all that follows.

    Args:
      preempted: exit code after SIGTERM and SIGHUP; None: 143 and 129.
    """
    global _has_begun
    if sys.stdout is not sys.__stdout__:
        return
    _has_begun = True
    if preempted is not None:
        _codes.update({signal.SIGTERM: preempted, signal.SIGHUP: preempted})
    end_at_once()
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def end_at_once() -> None:
    """From here on a signal ends the process: there is nothing to lose yet, or any more."""
    _handle(_end)


def unwind() -> None:
    """From here on a signal unwinds the stack, so that nothing half-written stays."""
    _handle(lambda number, _: sys.exit(_codes[number]))
    _handle(signal.default_int_handler, signal.SIGINT)


def raise_interrupts() -> None:
    """From here on SIGINT raises KeyboardInterrupt."""
    _handle(signal.default_int_handler, signal.SIGINT)


def _handle(handler: Any, *numbers: signal.Signals) -> None:
    for number in numbers or SIGNALS:
        if _has_begun and signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
            signal.signal(number, handler)


def _end(number: int, _: Any) -> None:
    os._exit(_codes[signal.Signals(number)])


class _Output(io.FileIO):
    """A stream that drops what nobody is there to read: `| head`, a `tee` or a terminal gone."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, ConnectionError) and error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def _lasting(stream: TextIO | None) -> TextIO:
    """The stream, with a sign for each character that its encoding has not."""
    if stream is None:  # closed by who started this
        return open(os.devnull, "w", encoding="utf-8")
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=True
    )
