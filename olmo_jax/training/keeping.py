"""What keeps the work of a run: saving when it is due, and an end where losses are not finite.

The loop of pretraining calls it, and so does any other that trains.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.data.source import Position
from olmo_jax.parallel.processes import say
from olmo_jax.parallel.watchdog import Watchdog
from olmo_jax.records import writer


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal ended the run; the state after `step` is saved, or is being saved."""

    def __init__(self, step: int):
        self.step = step


class FellBack(Exception):  # noqa: N818 - likewise
    """No loss was finite since the start, and an older, confirmed checkpoint is now the newest."""


@dataclasses.dataclass
class Keeper:
    """Saves the state of a run, and counts the steps in a row whose loss is not finite.

    Attributes:
      checkpointer: knows what is due, and keeps it.
      log: is told how long it took.
      watchdog: is told what is done.
      describe: what a checkpoint says beside its arrays, of a position in the data and a step.
      carried: files that all checkpoints hold, by name.
      max_nonfinite: steps in a row without a finite loss that end the run.
      is_async: whether checkpoints are written behind the training.
    """

    checkpointer: Checkpointer
    log: writer.Writer
    watchdog: Watchdog
    describe: Callable[[Position, int], dict[str, Any]]
    carried: Mapping[str, bytes]
    max_nonfinite: int
    is_async: bool
    nonfinite: int = 0  # steps in a row
    last_finite: int | None = None  # the last step with a finite loss, of an earlier start too

    def judge(self, at: int, loss: float | None, norm: float) -> None:
        """Count a step's loss as finite or not; None, if it had no tokens, is neither.

        Raises:
          ValueError, FellBack: after `train.max_nonfinite_steps` in a row.
        """
        if loss is None:
            return
        if math.isfinite(loss + norm):
            self.nonfinite = 0
            self.last_finite = self.checkpointer.finite_step = at
            return
        self.nonfinite += 1
        if self.nonfinite >= self.max_nonfinite:
            self.give_up(f"step {at}: loss {loss}, grad norm {norm}; {self._without()}"
                         " (config.train.max_nonfinite_steps)")  # fmt: skip

    def keep(
        self, state: Any, at: int, position: Position, kind: str | None, is_last: bool, stop: bool
    ) -> None:
        """Save the state after a step that is the last, after a signal, or because it is due.

        Args:
          state: after step `at`.
          at: the step.
          position: in the data.
          kind: of the checkpoint that is due; None: none is.
          is_last: the run ends here.
          stop: a signal asks for it.
        Raises:
          Stopped: after a signal.
          ValueError, FellBack: if the run ends and the loss is not finite.
        """
        if is_last:
            if self.nonfinite:
                self.give_up(f"step {at}: the run ends here; its loss is {self._without()}")
            self.save(state, at, position, "fixed" if kind == "fixed" else "permanent")
            return
        if not self.nonfinite:
            self.save(state, at, position, kind or "ephemeral")
        elif stop:
            say(f"step {at}: the loss is not finite, so its checkpoint takes no other's place")
            self.save(state, at, position, "ephemeral")
        elif kind and self.checkpointer.postpone(kind):
            say(f"step {at}: its checkpoint is postponed to the next step with a finite loss")
        if stop:
            raise Stopped(at)

    def save(self, state: Any, at: int, position: Position, kind: str) -> None:
        """Save the state after step `at`."""
        self.watchdog.beat(f"the checkpoint of step {at}")
        try:
            self.settle(at)
        except OSError:
            with contextlib.suppress(OSError):  # the disk may be well again: lose no step then
                self._save(state, at, position, kind)
                self.checkpointer.finish()
            raise
        self._save(state, at, position, kind)

    def _save(self, state: Any, at: int, position: Position, kind: str) -> None:
        self.log.sync()
        meta = self.describe(position, at) | {"step": at, "last_finite_step": self.last_finite}
        with self.log.pause(at, "checkpoint/save_duration_s"):
            self.checkpointer.save(at, state, meta, kind, self.carried)

    def settle(self, at: int) -> None:
        """Wait for the save under way, and write down at step `at` how long it took."""
        seconds = self.checkpointer.finish()
        if seconds is not None and self.is_async:
            self.log.write(at, {"checkpoint/save_async_duration_s": seconds})

    def rescue(self, state: Any, at: int, position: Position) -> str:
        """Save what was trained before an error of this process; says which step is saved.

        Several processes cannot meet for it: the others wait in a step that will not end.
        """
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):  # the first error is what has to be said
                self.save(state, at, position, "ephemeral")
        return self.saved()

    def saved(self) -> str:
        """Which step the next run starts from, in words for an error."""
        with contextlib.suppress(OSError):
            self.checkpointer.finish()
        newest = self.checkpointer.latest()
        return f"{'no checkpoint' if newest is None else f'step {newest}'} is saved"

    def give_up(self, why: str) -> NoReturn:
        """End the run, or this try to go on from a checkpoint that was never confirmed.

        Raises:
          FellBack: if no step since the start had a finite loss, and a confirmed one is older.
          ValueError: otherwise.
        """
        started = self.checkpointer.latest()
        if self.checkpointer.finite_step is None and (aside := self.checkpointer.fall_back()):
            raise FellBack(
                f"{why}, and never since the start from step {started}: falling back to step"
                f" {self.checkpointer.latest()}, the newest that a finite loss has confirmed;"
                f" {', '.join(aside)} in {self.checkpointer.folder} is what was set aside"
            )
        known = "no step had a finite loss"
        if self.last_finite is not None:
            known = f"the last finite loss is that of step {self.last_finite}"
        saved = self.saved()
        if (confirmed := self.checkpointer.confirmed()) not in (None, self.checkpointer.latest()):
            saved += f", and step {confirmed}, the newest that a finite loss has confirmed"
        raise ValueError(f"{why}; {known}. None of them changed the parameters; {saved}")

    def _without(self) -> str:
        return f"not finite for {self.nonfinite} step{'s' * (self.nonfinite > 1)} in a row"
