"""Batches of a run, read ahead by threads: token files -> order -> arrays, with grain."""

import time
from collections.abc import Callable, Iterator
from sys import maxsize

import grain
import numpy as np

from olmo_jax.config.data import DataConfig
from olmo_jax.config.training import Unit
from olmo_jax.data import checks, documents, fixed_length, token_files
from olmo_jax.data.batch import is_repetitive, next_tokens, segments
from olmo_jax.data.order import DataOrder, Position

Batch = dict[str, np.ndarray]  # each [rows, seq_len]


class _Source:
    """A grain source of whole batches."""

    def __init__(self, batch: Callable[[int], tuple[Batch, Position]], n_batches: int):
        self._batch = batch
        self._n_batches = n_batches

    def __len__(self) -> int:
        return self._n_batches

    def __getitem__(self, index: int) -> tuple[Batch, Position]:
        return self._batch(index)


class Loader:
    """The batches of a run from a position on; iterating gives (batch, position after it).

    A batch holds this process's rows of `tokens`, `targets` (int32), `loss_weights` (float32) and,
    with a document mask, `segment_ids` and `positions` (int32).

    Attributes:
      n_steps: batches to give; None: no end. May be set before iterating.
      order: the DataOrder; its positions and durations need no reading.
      fingerprint: OLMo-core's, of the files' names and sizes and their order.
      wait_s: seconds that the last batch was waited for.
    """

    def __init__(
        self,
        data: DataConfig,
        vocab_size: int,
        rows_of: Callable[[int], np.ndarray] = np.arange,
        position: Position | None = None,
        n_steps: int | None = None,
    ):
        """Open and check the token files.

        Args:
          data: what to read; `paths` are set, also where a corpus was prepared.
          vocab_size: ids must be below it.
          rows_of: for a number of rows in the global batch, which of them this process reads.
          position: where the run goes on; None for its beginning.
          n_steps: batches to give; None: no end.
        Raises:
          ValueError, FileNotFoundError: one line that names file or field, found and needed.
        """
        paths = token_files.resolve_paths(data.paths, data.root, data.source_permutation_seed)
        self.files = token_files.TokenFiles(paths, token_files.token_dtype(data.dtype, vocab_size))
        by_eos = data.document_mask == "eos"
        eos_id = data.eos_id if by_eos else None
        checks.check(self.files, vocab_size, eos_id, check_dtype=data.check_dtype)
        self.instances = fixed_length.Instances(self.files, data.seq_len, data.max_target_seq_len)
        self.order = DataOrder(data, len(self.instances), position)
        self.n_steps = n_steps
        self.wait_s = 0.0
        self.fingerprint = token_files.fingerprint(
            self.files, vocab_size, data.eos_id, max_target_seq_len=data.max_target_seq_len
        )
        self._data = data
        self._vocab_size = vocab_size
        self._rows_of = rows_of
        by_file = data.document_mask == "boundaries"
        if data.check_dtype and not by_file:
            checks.check_side_files(self.files)
        self._boundaries = documents.Boundaries(self.files) if by_file else None

    @property
    def n_instances(self) -> int:
        """Rows in the data."""
        return len(self.instances)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, of the size at the start position."""
        return self.order.steps_per_epoch

    def steps_for(self, duration: int, unit: Unit, step: int = 0) -> int:
        """The last step of a run of this duration, if `step` steps end at the start position."""
        return self.order.steps_for(duration, unit, step)

    def batch(self, i: int) -> tuple[Batch, Position]:
        """Batch `i` from the start position, read now, and the position after it."""
        rows, position = self.order.batch(i)
        return self._read(rows[self._rows_of(len(rows))]), position

    def _read(self, rows: np.ndarray) -> Batch:
        d = self._data
        ids = self.instances.read(rows, self._vocab_size)
        kept = None
        if d.instance_filter:
            masked = is_repetitive(ids, d.filter_max_period, d.filter_min_repeats)
            kept = ~masked[:, None]
        targets, weights = next_tokens(ids, kept)
        batch = {"tokens": ids, "targets": targets, "loss_weights": weights}
        if d.document_mask == "none":
            return batch
        if self._boundaries is not None:
            starts = self._boundaries.starts(self.instances, rows)
        else:
            assert d.eos_id is not None  # checked with the config
            starts = documents.starts_after(ids, d.eos_id)
        batch["segment_ids"], batch["positions"] = segments(starts)
        return batch

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        """Read ahead with threads, from the start position; errors of a thread are raised here."""
        options = grain.ReadOptions(self._data.threads, self._data.prefetch)
        source = _Source(self.batch, maxsize if self.n_steps is None else self.n_steps)
        batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        batches.start_prefetch()
        return self._give(batches)

    def _give(self, batches: grain.DatasetIterator) -> Iterator[tuple[Batch, Position]]:
        try:
            while True:
                began = time.perf_counter()
                item = next(batches, None)
                self.wait_s = time.perf_counter() - began
                if item is None:
                    return
                yield item
        finally:
            batches.close()  # ends the threads
