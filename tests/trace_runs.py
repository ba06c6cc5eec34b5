"""Traced training runs in a process of their own: a trace looks into every thread of its process.

Run by the tests: `trace_runs.py FOLDER part.option=value …`. Each trace goes to FOLDER/NAME; prints
as JSON how each run ended: exit code, output, errors, and whether a trace was still being written.
"""

import contextlib
import itertools
import json
import pathlib
import sys
from unittest import mock

import jax
import runs

from olmo_jax.parallel import processes
from olmo_jax.training import loop


def is_tracing() -> bool:
    """Whether a trace is still being written, which is ended."""
    try:
        jax.profiler.stop_trace()
    except RuntimeError:
        return False
    return True


def a_signal() -> contextlib.AbstractContextManager:
    """The third look for a signal finds one."""
    looks = itertools.chain([False, False, True], itertools.repeat(False))
    return mock.patch.object(processes.Preemption, "requested", side_effect=looks)


def an_error() -> contextlib.AbstractContextManager:
    """The record of step 3 cannot be made."""
    record = loop.Run.record

    def fails(self, pending):
        if pending and pending[0] == 3:
            raise ValueError("the disk is on fire")
        record(self, pending)

    return mock.patch.object(loop.Run, "record", fails)


def main(to: str, *options: str) -> None:
    """Train, and print."""
    folder, ends = pathlib.Path(to), {}
    for name, of, steps, duration, event in (
        ("whole", "one", "[3,5]", 6, contextlib.nullcontext()),
        ("cut by a signal", "two", "2,9", 12, a_signal()),
        ("resumed", "two", "2,6", 12, contextlib.nullcontext()),
        ("too late", "two", "2,6", 14, contextlib.nullcontext()),
        ("cut by an error", "three", "2,9", 12, an_error()),
    ):
        run = folder / "runs" / of
        with event:
            result = runs.run(
                *options, f"dir={run}", f"profile.steps={steps}", f"train.duration={duration}"
            )
        ends[name] = [result.code, result.out, result.err, is_tracing()]
        if (run / "profile").exists():
            (run / "profile").rename(folder / name)
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
