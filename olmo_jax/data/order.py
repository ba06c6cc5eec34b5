"""Which rows a run reads, and when: the exact orders of OLMo and OLMo-core, by arithmetic.

The order of an epoch is a pure function of (number of rows, seed, epoch), never of hosts or
threads, and the place in it is three integers, so that a run resumes anywhere without replay.
"""

import bisect
import functools
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np

from olmo_jax.config.data import DataConfig, batch_stages
from olmo_jax.config.training import Unit

FIRST_EPOCH = {"core": 1, "legacy": 0}  # OLMo-core counts epochs from 1, OLMo from 0


@dataclass(frozen=True)
class Position:
    """A place between two batches: all that a loader has to remember."""

    epoch: int  # in the order's own counting, see FIRST_EPOCH
    row: int  # rows of this epoch that were read
    tokens: int  # seen in the whole run

    def rescaled(self, seq_len: int, new_seq_len: int) -> "Position":
        """The same place in rows of another length, for one `max_target_seq_len` of both.

        Raises:
          ValueError: if the place lies inside a row of the new length.
        """
        if self.row * seq_len % new_seq_len:
            raise ValueError(
                f"config.data.seq_len={new_seq_len}: the data position, {self.row} rows of"
                f" {seq_len} tokens, is no whole number of rows of {new_seq_len}"
            )
        return Position(self.epoch, self.row * seq_len // new_seq_len, self.tokens)


# --- the order of one epoch -----------------------------------------------------------------------


def core_order(n_rows: int, seed: int, epoch: int, chunk: int = 1) -> np.ndarray:
    """Row numbers of an epoch (from 1) as OLMo-core shuffles them, in chunks that stay together.

    Args:
      chunk: rows per chunk, `max_target_seq_len // seq_len`; a last, partial chunk is dropped.
    Returns: [n_rows // chunk * chunk] uint32 (uint64 above 2^32 rows).
    Source: OLMo-core data/data_loader.py, NumpyFSLDataLoader.
    """
    order = _shuffled(n_rows // chunk, seed + epoch, _index_dtype(n_rows))
    if chunk == 1:
        return order
    return (order[:, None] * chunk + np.arange(chunk, dtype=order.dtype)).reshape(-1)


def legacy_order(
    n_rows: int, seed: int, epoch: int, world_size: int = 1, drop_last: bool = True
) -> np.ndarray:
    """Row numbers of an epoch (from 0) as OLMo shuffles them.

    With `drop_last` cut to a multiple of `world_size`, else padded to one from the order's start.

    Source: OLMo data/iterable_dataset.py, IterableDataset.
    """
    order = _shuffled(n_rows, seed + epoch, _index_dtype(n_rows))
    if drop_last:
        return order[: n_rows // world_size * world_size]
    return np.resize(order, -(-n_rows // world_size) * world_size)


def _index_dtype(n_rows: int) -> type[np.unsignedinteger]:
    return np.uint32 if n_rows <= 2**32 else np.uint64


def _shuffled(n: int, seed: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    order = np.arange(n, dtype=dtype)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    return order


_making = threading.Lock()  # reader threads that need one epoch wait for one maker


@functools.lru_cache(maxsize=2)  # threads that run ahead are in the next epoch already
def _epoch(
    kind: Literal["core", "legacy"], n: int, seed: int, epoch: int, chunk: int
) -> np.ndarray:
    if kind == "core":
        order = core_order(n, seed, epoch, chunk)
    else:
        order = legacy_order(n, seed, epoch)
    order.flags.writeable = False
    return order


# --- the batches of a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """Batches of one size."""

    first: int  # index of its first batch
    start: Position  # before that
    rows: int  # per batch
    count: float  # batches, inf for the last stretch


class DataOrder:
    """The batches of a run from a position on, each found by arithmetic.

    Rows are read in the epoch's order without gaps. What is left when a batch no longer fits is
    dropped, and the next epoch is shuffled anew. A batch takes the size of the stage in which it
    begins.
    """

    def __init__(self, data: DataConfig, n_rows: int, start: Position | None = None):
        """Lay out the batches.

        Args:
          data: the order, its seed and the batch sizes.
          n_rows: rows of `data.seq_len` tokens in an epoch.
          start: where the run goes on; None for its beginning.
        Raises:
          ValueError: if the data has too few rows for a batch, or for `start`.
        """
        self._chunk = (data.max_target_seq_len or data.seq_len) // data.seq_len
        self._data = data
        self.n_rows = n_rows // self._chunk * self._chunk
        self.start = start or Position(FIRST_EPOCH[data.order], 0, 0)
        for _, size in batch_stages(data):
            if size > self.n_rows * data.seq_len:
                raise ValueError(
                    f"config.data.global_batch_size={size} tokens needs"
                    f" {size // data.seq_len} rows of seq_len={data.seq_len}, found"
                    f" {self.n_rows} in config.data.paths"
                )
        if self.start.row > self.n_rows:
            raise ValueError(
                f"config.data.paths: the data position is row {self.start.row} of the epoch, found"
                f" {self.n_rows} rows of seq_len={data.seq_len}; is this another data set?"
            )
        self._stretches = self._lay_out()

    def _lay_out(self) -> list[_Stretch]:
        # OLMo: its loader delays a larger batch until its index in the epoch divides evenly. Rows
        # are counted here instead of batches, so the size changes at the first batch that is due.
        stages = batch_stages(self._data)
        starts = [tokens for tokens, _ in stages]
        stretches, first, position = [], 0, self.start
        for i in range(bisect.bisect_right(starts, position.tokens) - 1, len(stages)):
            size = stages[i][1]
            count = float("inf")
            if i + 1 < len(stages):
                count = max(0, -(-(starts[i + 1] - position.tokens) // size))
            stretch = _Stretch(first, position, size // self._data.seq_len, count)
            stretches.append(stretch)
            if i + 1 < len(stages) and count:
                first += int(count)
                position = self._after(stretch, int(count) - 1)
        return stretches

    def _before(self, stretch: _Stretch, i: int) -> Position:
        """Where batch `i` of a stretch begins, with the epoch that it is read from."""
        at, rows = stretch.start, stretch.rows
        tokens = at.tokens + i * rows * self._data.seq_len
        left = (self.n_rows - at.row) // rows  # batches in the epoch of the stretch's start
        if i < left:
            return Position(at.epoch, at.row + i * rows, tokens)
        epochs, i = divmod(i - left, self.n_rows // rows)
        return Position(at.epoch + 1 + epochs, i * rows, tokens)

    def _after(self, stretch: _Stretch, i: int) -> Position:
        at, rows = self._before(stretch, i), stretch.rows
        return Position(at.epoch, at.row + rows, at.tokens + rows * self._data.seq_len)

    def _find(self, i: int) -> tuple[_Stretch, int]:
        """The stretch of batch `i`, and its index there."""
        # Of stretches that begin at one batch all but the last are empty.
        at = bisect.bisect_right(self._stretches, i, key=lambda s: s.first) - 1
        return self._stretches[at], i - self._stretches[at].first

    def batch(self, i: int) -> tuple[np.ndarray, Position]:
        """Row numbers [rows] of batch `i`, counted from the start, and the position after it."""
        stretch, i = self._find(i)
        begin = self._before(stretch, i)
        order = self.epoch(begin.epoch)
        return order[begin.row : begin.row + stretch.rows], self._after(stretch, i)

    def position(self, i: int) -> Position:
        """The position after `i` batches."""
        if i == 0:
            return self.start
        stretch, last = self._find(i - 1)
        return self._after(stretch, last)

    def epoch(self, epoch: int) -> np.ndarray:
        """Row numbers [n_rows] of an epoch in order, read-only; made once, then kept."""
        d = self._data
        with _making:
            return _epoch(d.order, self.n_rows, d.seed, epoch, self._chunk)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, of the size at the start."""
        return self.n_rows // self._stretches[0].rows

    def steps_for(self, duration: int, unit: Unit, step: int = 0) -> int:
        """The last step of a run with this duration.

        Tokens end with the first batch that reaches them; epochs with the last whole batch of the
        last epoch (OLMo-core: a run ends when `epoch > duration`).

        Args:
          step: steps that were finished at the start position.
        """
        if unit == "steps":
            return duration
        for stretch in self._stretches:
            if unit == "tokens":
                per_batch = stretch.rows * self._data.seq_len
                count = -(-(duration - stretch.start.tokens) // per_batch)
            else:
                last = FIRST_EPOCH[self._data.order] + duration - 1
                at, whole = stretch.start, self.n_rows // stretch.rows
                left = (self.n_rows - at.row) // stretch.rows
                count = left + (last - at.epoch) * whole if last >= at.epoch else 0
            if count < stretch.count:  # else a smaller batch may follow in the same epoch
                return step + stretch.first + max(0, count)
        raise AssertionError("the last stretch has no end")
