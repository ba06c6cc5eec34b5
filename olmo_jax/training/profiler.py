"""A trace of some steps, for XProf: what the devices and the host did, and when."""

import pathlib
from typing import Any

import jax

from olmo_jax.config.options import ConfigError
from olmo_jax.parallel.processes import say


class Profiler:
    """Traces the steps that `profile.steps` names; ends the trace with the block, however it ends.

    As elsewhere in the field only process 0 writes one: all processes run the same program. While
    a trace begins and ends the host waits for the devices, so that whole steps are in it.

    Args:
      steps: [start, stop), or None for no trace.
      first: finished steps at the start of this process.
      last: step of the run.
    Raises:
      ConfigError: if the run has no such steps.
    """

    def __init__(self, steps: tuple[int, int] | None, first: int, last: int):
        self._start, self._stop = steps or (0, 0)
        self._is_on, self._folder = False, None
        self.line = ""  # where the trace is, once there is one
        if steps is None:
            return
        if self._stop - 1 > last:
            raise ConfigError([f"config.profile.steps={list(steps)}: the run ends at step {last}"])
        if self._stop - 1 <= first:
            say(f"profile: no trace, step {first:,} is done; config.profile.steps={list(steps)}")
        self._start = max(self._start, first + 1)  # resumed among them: the rest

    def begins_at(self, at: int) -> bool:
        """Whether the trace is to begin before step `at`."""
        return at == self._start < self._stop

    def ends_at(self, at: int) -> bool:
        """Whether the trace is to end after step `at`."""
        return self._is_on and at + 1 == self._stop

    def start(self, folder: pathlib.Path | None, state: Any) -> None:
        """Begin the trace once `state` is there, on all devices.

        Args:
          folder: where the trace gets a new folder; None in all processes but one.
          state: arrays that the step before makes.
        """
        jax.block_until_ready(state)
        self._is_on, self._folder = True, folder
        if folder is not None:
            jax.profiler.start_trace(folder)

    def stop(self, state: Any = ()) -> None:
        """End the trace, if there is one, once `state` is there, and say where it lies."""
        if not self._is_on:
            return
        jax.block_until_ready(state)
        self._is_on = False
        if self._folder is not None:
            jax.profiler.stop_trace()
            self.line = (
                f"profile: {self._folder}; to look at it: pip install xprof, then xprof server"
                f" --logdir={self._folder}, or open its .trace.json.gz at ui.perfetto.dev"
            )
            say(self.line)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def step(at: int) -> Any:
    """A context that marks what the host does inside as step `at` of the training."""
    return jax.profiler.StepTraceAnnotation("train", step_num=at)
