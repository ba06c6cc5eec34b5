"""The batches of a run, read ahead by threads, with grain."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from olmo_jax.data import batch
from olmo_jax.data.batch import Batch
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import Position


class Read(NamedTuple):
    """A batch that was read.

    `batch` holds this process's rows of `tokens`, `targets` (int32), `loss_weights` (float32) and,
    where documents are known, `segment_ids` and `positions` (int32).
    """

    batch: Batch
    n_rows: int  # of the whole batch, in all processes
    position: Position  # after it
    waited_s: float = 0.0  # for it, by who asked


class Loader:
    """Reads the batches of a schedule."""

    def __init__(
        self,
        schedule: BatchSchedule,
        rows_of: Callable[[int], np.ndarray] = np.arange,
        n_threads: int = 4,
        prefetch: int = 4,
    ):
        """Make a loader; nothing is read yet.

        Args:
          schedule: what the batches are made of.
          rows_of: for a number of rows in the global batch, which of them this process reads.
          n_threads: that read.
          prefetch: batches made ahead.
        """
        self._schedule, self._rows_of = schedule, rows_of
        self._options = grain.ReadOptions(n_threads, prefetch)

    def read(self, step: int) -> Read:
        """The batch of a step, read now."""
        take, position = self._schedule.take(step)
        n_rows = len(take.ids)
        part = take._replace(ids=take.ids[self._rows_of(n_rows)])
        return Read(batch.make(self._schedule.source.read(part)), n_rows, position)

    def steps(self, first: int, last: int) -> Iterator[Read]:
        """The batches of the steps after `first` up to `last`, read ahead with threads.

        Errors of a thread are raised here; to leave early ends the threads.
        """
        source = _Steps(self.read, first, last)
        reads = iter(grain.MapDataset.source(source).to_iter_dataset(self._options))
        reads.start_prefetch()
        return _give(reads)


class _Steps:
    """A grain source of whole batches."""

    def __init__(self, read: Callable[[int], Read], first: int, last: int):
        self._read, self._first, self._last = read, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> Read:
        return self._read(self._first + 1 + index)


def _give(reads: grain.DatasetIterator) -> Iterator[Read]:
    try:
        while True:
            began = time.perf_counter()
            read = next(reads, None)
            if read is None:
                return
            yield read._replace(waited_s=time.perf_counter() - began)
    finally:
        reads.close()  # ends the threads
