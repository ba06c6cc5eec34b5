"""Which checkpoints a run keeps, and where it starts from.

Kinds: `permanent` (every `interval` steps, step 0, the last step), `fixed` (named steps, never
deleted), `ephemeral` (every `ephemeral_interval` steps, or on preemption: deleted when a newer
checkpoint is complete).

The last update before a checkpoint may have wrecked the parameters, and only a loss after it tells.
So a checkpoint is *confirmed* by the first later step with a finite loss; its marker says so from
the next save on. The newest confirmed one is never deleted, and a start deletes nothing before it
has had a finite loss. A start that has none falls back to the newest confirmed one.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from olmo_jax import files
from olmo_jax.checkpoints import layout, snapshot
from olmo_jax.config.training import CheckpointConfig
from olmo_jax.files import brief
from olmo_jax.parallel import processes

log = logging.getLogger(__name__)


# --- finding --------------------------------------------------------------------------------------


def steps(folder: files.Path) -> dict[int, str]:
    """The complete checkpoints `step{N}` in a folder: the kind of each, by rising step.

    One elsewhere, which a link leads to, is of kind "linked"; it is never changed or deleted.

    Raises:
      ValueError: if the newest one is damaged. An older one is of kind "damaged", never deleted.
    """
    found = {step: child for step, child in children(folder) if layout.is_complete(child)}
    kinds = {}
    for step, child in sorted(found.items()):
        try:
            kind = layout.kind(child)
            kinds[step] = "linked" if layout.is_link(child) else kind
        except ValueError:
            if step == max(found):
                raise
            kinds[step] = "damaged"
    return kinds


def _foreign(folder: files.Path) -> dict[int, str]:
    """What has the name of a step's checkpoint in a folder and is none, nor the rest of one."""
    return {
        step: str(child)
        for step, child in children(folder)
        if not layout.is_complete(child) and not layout.is_torn(child)
    }


def children(folder: files.Path) -> list[tuple[int, files.Path]]:
    """What has the name of a step's checkpoint in a folder, with its step."""
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(r"step(0|[1-9]\d*)", child.name), child) for child in folder.iterdir()]
    return [(int(match[1]), child) for match, child in matches if match]


# --- saving ---------------------------------------------------------------------------------------


KINDS = ("fixed", "permanent", "ephemeral")  # that `due` gives, the one kept longest first


class Checkpointer:
    """Saves a run's state and keeps what the config asks for; all processes make the same calls.

    `finite_step` is the last step since the start that had a finite loss: who trains sets it.
    """

    def __init__(self, options: CheckpointConfig, run_dir: str):
        """Look for the checkpoints that the run has already; writes nothing.

        Args:
          options: what is kept, and when.
          run_dir: the run's folder.
        """
        self.options = options
        self.folder = files.path(run_dir) / "checkpoints"
        found, known = processes.from_process_0(self._look)
        self.kinds: dict[int, str] = dict(found)  # of each complete checkpoint
        self.finite_step: int | None = None
        self._known: int | None = known  # the newest that says that it is confirmed
        self._postponed: str | None = None
        self._pending: snapshot.Save | None = None
        self._kinds_then: dict[int, str] = {}  # when that is complete

    def _look(self) -> tuple[list[tuple[int, str]], int | None]:
        kinds = steps(self.folder)
        newest_first = [step for step in reversed(kinds) if kinds[step] != "damaged"]
        for step in newest_first:
            _refuse_renamed(self.folder_of(step), step)
        known = (step for step in newest_first if layout.is_confirmed(self.folder_of(step)))
        return list(kinds.items()), next(known, None)

    def confirmed(self) -> int | None:
        """The newest checkpoint after which there was a finite loss; None if none is known."""
        if self.finite_step is None:
            return self._known
        return max((step for step in self.kinds if step < self.finite_step), default=None)

    def latest(self) -> int | None:
        """The newest step that is saved."""
        return max(self.kinds, default=None)

    def folder_of(self, step: int) -> files.Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step{step}"

    def refuse_foreign(self, last: int) -> None:
        """Refuse to train where what others put there has the name of a checkpoint to come.

        Args:
          last: the step whose checkpoint is there already; -1 if there is none.
        Raises:
          ValueError: with its path (OSError in processes but 0).
        """

        def look() -> None:
            found = {step: name for step, name in _foreign(self.folder).items() if step > last}
            if found:
                rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise ValueError(
                    f"config.dir: {found[min(found)]}{rest} is not written by olmo_jax and has the"
                    " name of a checkpoint of this run; move it away, or set another config.dir"
                )

        processes.from_process_0(look)

    def due(self, step: int) -> str | None:
        """The kind of checkpoint to save after a step, or since an earlier one; None: none."""
        kinds = {self._due(step), self._postponed}
        return next((kind for kind in KINDS if kind in kinds), None)

    def postpone(self, kind: str) -> bool:
        """Leave a checkpoint that is due for a later step; returns whether none was left before."""
        is_first, self._postponed = self._postponed is None, kind
        return is_first

    def _due(self, step: int) -> str | None:
        every = self.options.ephemeral_interval
        if step in self.options.fixed_steps:
            return "fixed"
        if step == 0:
            return "permanent" if self.options.step0 else None
        if step % self.options.interval == 0:
            return "permanent"
        return "ephemeral" if every and step % every == 0 else None

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        kind: str = "permanent",
        files: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Save the state after a step, behind the training if the config says so.

        Args:
          step: finished steps.
          state: the TrainState; its arrays may be donated when this returns.
          meta: what JSON can hold, for who resumes.
          kind: permanent, fixed or ephemeral.
          files: what to keep beside the arrays, by file name.
        Returns: False if the step is saved already; a complete checkpoint is never overwritten.
        Raises:
          OSError: if this save failed, or the one before it did in the background.
        """
        self.finish()
        self._postponed = None
        if step in self.kinds:
            if self.kinds[step] == "ephemeral" != kind:
                processes.from_process_0(lambda: layout.mark(self.folder_of(step), kind=kind))
                self.kinds[step] = kind
            return False
        confirmed = self.confirmed()
        spared = confirmed if self.finite_step is not None else None
        superseded = to_remove(self.kinds, self.options.keep, spared)
        self.kinds = _without(self.kinds, superseded)
        kinds = self.kinds | {step: kind}
        old = to_remove(kinds, self.options.keep, spared)
        self._kinds_then = _without(kinds, old)
        is_new, self._known = confirmed != self._known, confirmed

        def make_room() -> None:
            if confirmed is not None and is_new and kinds[confirmed] != "linked":
                self._confirm(confirmed)
            self._remove(superseded)
            self._remove_torn()

        self._pending = snapshot.save(
            self.folder_of(step),
            state,
            meta,
            kind=kind,
            files=files,
            background=self.options.async_save,
            before=make_room,
            after=lambda: self._remove(old),
        )
        if not self.options.async_save:
            self.finish()
        return True

    def finish(self) -> float | None:
        """Wait for the save under way.

        Returns: seconds from its call until it was complete; None if there was none.
        Raises:
          OSError: if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        pending.wait()
        self.kinds = self._kinds_then
        return pending.seconds

    def fall_back(self) -> list[str]:
        """Rename what is newer than the newest confirmed checkpoint, which then is the newest.

        Returns: the new names; none if no checkpoint is confirmed, or the newest one is.
        Raises:
          OSError: if that cannot be done.
        """
        self.finish()
        confirmed = self.confirmed()
        newer = [step for step in self.kinds if confirmed is not None and step > confirmed]
        self.kinds = _without(self.kinds, newer)
        return processes.from_process_0(
            lambda: [_set_aside(self.folder_of(step)) for step in sorted(newer, reverse=True)]
        )

    def _remove_torn(self) -> None:
        """Make room: what an interrupted save or deletion of ours left is of no use."""
        for _, child in children(self.folder):
            if layout.is_torn(child):
                print(f"removing {child}: its save, or its deletion, was interrupted", flush=True)
                layout.remove(child)

    def _confirm(self, step: int) -> None:
        try:
            layout.mark(self.folder_of(step), confirmed=True)
        except OSError as error:  # the next start just knows less
            log.warning("could not mark %s as confirmed: %s", self.folder_of(step), error)

    def _remove(self, old: Iterable[int]) -> None:
        for step in old:
            try:
                layout.remove(self.folder_of(step))
            except OSError as error:  # too many checkpoints are no reason to end a run
                log.warning("could not delete %s: %s", self.folder_of(step), error)


def _refuse_renamed(folder: files.Path, step: int) -> None:
    """Refuse a copy under the name of another step: what is deleted and resumed goes by names.

    Raises:
      ValueError: with its path and the step that it says.
    """
    said = layout.read_meta(folder).get("step", step)
    if said != step:
        raise ValueError(
            f"config.dir: {folder} is the checkpoint of step {brief(str(said))} under another name;"
            " move it away"
        )


def _set_aside(folder: files.Path) -> str:
    names = (f"{folder.name}.nonfinite{n}" for n in itertools.chain([""], itertools.count(2)))
    new = next(new for name in names if not (new := folder.with_name(name)).exists())
    folder.rename(new)
    return new.name


def to_remove(kinds: Mapping[int, str], keep: int | None, confirmed: int | None) -> list[int]:
    """The steps to delete once the newest of them is complete.

    Args:
      kinds: the kind of each checkpoint by step, the newest included.
      keep: permanent ones to keep; None: all.
      confirmed: the newest with a finite loss after it, which stays; None: all stay.
    """
    if confirmed is None:
        return []
    newest = max(kinds)
    permanent = sorted(step for step, kind in kinds.items() if kind == "permanent")
    old = permanent[:-keep] if keep else []
    old += [step for step, kind in kinds.items() if kind == "ephemeral" and step != newest]
    return sorted(step for step in old if step != confirmed)


def _without(kinds: Mapping[int, str], old: Sequence[int]) -> dict[int, str]:
    return {step: kind for step, kind in kinds.items() if step not in old}
