"""The batches of a run, step by step: a source of rows, cut as the schedule of batch sizes says."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from olmo_jax.config.training import Unit
from olmo_jax.data.source import Position, Source, Take


class _Stretch(NamedTuple):
    """Batches of one size."""

    first: int  # step before its first batch
    start: Position  # there
    size: int  # tokens per batch
    count: float  # batches, inf for the last stretch


class BatchSchedule:
    """The batches of a run from a position on, each found by arithmetic.

    A batch takes the size of the stage in which it begins.

    Attributes:
      source: of the rows.
      first: steps that were finished at the start.
      start: the position there.
      first_size: tokens of a batch of the first stage.
    """

    def __init__(
        self,
        source: Source,
        stages: Sequence[tuple[int, int]],
        start: Position | None = None,
        first: int = 0,
    ):
        """Lay out the batches.

        Args:
          source: of the rows.
          stages: the sizes, as (tokens seen at the start of a stage, tokens per batch).
          start: where the run goes on; None for its beginning.
          first: steps that were finished there.
        Raises:
          ValueError: if the data has too few rows for a batch, or for `start`.
        """
        self.source, self.first, self.start = source, first, start or source.start()
        self.first_size = stages[0][1]
        for _, size in stages:
            source.after(self.start, size, 1)
        self._stretches = self._lay_out(stages)

    def _lay_out(self, stages: Sequence[tuple[int, int]]) -> list[_Stretch]:
        # OLMo: its loader delays a larger batch until its index in the epoch divides evenly. Tokens
        # are counted here instead of batches, so the size changes at the first batch that is due.
        starts = [tokens for tokens, _ in stages]
        stretches, first, position = [], self.first, self.start
        for i in range(bisect.bisect_right(starts, position.tokens) - 1, len(stages)):
            size, count = stages[i][1], float("inf")
            if i + 1 < len(stages):
                count = max(0, -(-(starts[i + 1] - position.tokens) // size))
            stretches.append(_Stretch(first, position, size, count))
            if i + 1 < len(stages) and count:
                first += int(count)
                position = self.source.after(position, size, int(count))
        return stretches

    def take(self, step: int) -> tuple[Take, Position]:
        """What the batch of a step is made of, and the position after it."""
        stretch = self._stretch(step)
        return self.source.take(self.position(step - 1), stretch.size)

    def position(self, step: int) -> Position:
        """The position after a step."""
        if step == self.first:
            return self.start
        stretch = self._stretch(step)
        return self.source.after(stretch.start, stretch.size, step - stretch.first)

    def _stretch(self, step: int) -> _Stretch:
        # Of stretches that begin at one step all but the last are empty.
        return self._stretches[bisect.bisect_left(self._stretches, step, key=lambda s: s.first) - 1]

    def last_step(self, duration: int, unit: Unit) -> int:
        """The last step of a run with this duration.

        Tokens end with the first batch that reaches them, epochs with the last whole batch of the
        last epoch.
        """
        if unit == "steps":
            return duration
        for stretch in self._stretches:
            if unit == "tokens":
                count = -(-(duration - stretch.start.tokens) // stretch.size)
            else:
                count = self.source.left(stretch.start, stretch.size, duration)
            if count < stretch.count:  # else a smaller batch may follow in the same epoch
                return stretch.first + max(0, count)
        raise AssertionError("the last stretch has no end")
