"""Token files cut into rows of one length. Source: OLMo-core data/numpy_dataset.py."""

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmo_jax.config.data import FixedLength
from olmo_jax.data import repetition
from olmo_jax.data.documents import Boundaries, starts_after
from olmo_jax.data.order import FIRST_EPOCH, epoch_order
from olmo_jax.data.source import NoPlaceError, Position, Rows, Take
from olmo_jax.data.token_files import TokenFiles, fingerprint


class FixedLengthSource:
    """Rows of `seq_len` consecutive tokens of one file; what is left of each file is dropped.

    They are read in the epoch's order without gaps. What is left when a batch no longer fits is
    dropped, and the next epoch is shuffled anew.
    """

    def __init__(
        self,
        files: TokenFiles,
        options: FixedLength,
        vocab_size: int,
        boundaries: Boundaries | None = None,
    ):
        """Number the rows of all files.

        Files are first cut to multiples of `max_target_seq_len`, so that rows of every shorter
        length cover the same tokens.

        Args:
          files: the tokens.
          options: how they are cut and shuffled.
          vocab_size: ids must be below it.
          boundaries: of the documents, where `document_mask` asks for them.
        """
        longest = options.max_target_seq_len or options.seq_len
        self._files, self._options, self._vocab_size = files, options, vocab_size
        self._boundaries = boundaries
        self._chunk = longest // options.seq_len
        self._ends = (files.lengths // longest * self._chunk).cumsum().tolist()
        self.n_rows: int = self._ends[-1]
        self.fingerprint = fingerprint(
            files, vocab_size, options.eos_id, max_target_seq_len=options.max_target_seq_len
        )

    def start(self) -> Position:
        """The first row of the first epoch."""
        return Position(FIRST_EPOCH[self._options.order], 0, 0)

    def take(self, at: Position, batch_tokens: int) -> tuple[Take, Position]:
        """The next rows of the epoch's order, or the first of the next epoch; see `Source`."""
        after = self.after(at, batch_tokens, 1)
        o = self._options
        order = epoch_order(o.order, self.n_rows, o.seed, after.epoch, self._chunk)
        n = batch_tokens // o.seq_len
        return Take(order[after.row - n : after.row], o.seq_len), after

    def after(self, at: Position, batch_tokens: int, n: int) -> Position:
        """The position after `n` batches of one size; see `Source`."""
        rows = self._batch_rows(batch_tokens)
        if at.row > self.n_rows:
            raise ValueError(
                f"config.data.paths: the data position is row {at.row} of the epoch, found"
                f" {self.n_rows} rows of seq_len={self._options.seq_len}; is this another data set?"
            )
        tokens = at.tokens + n * batch_tokens
        left = (self.n_rows - at.row) // rows  # batches in the epoch of `at`
        if n <= left:
            return Position(at.epoch, at.row + n * rows, tokens)
        epochs, i = divmod(n - left - 1, self.n_rows // rows)
        return Position(at.epoch + 1 + epochs, (i + 1) * rows, tokens)

    def left(self, at: Position, batch_tokens: int, epochs: int) -> int:
        """Batches of one size until the epochs of a run are over; see `Source`.

        As in OLMo-core a run ends when `epoch > duration`.
        """
        rows = self._batch_rows(batch_tokens)
        last = FIRST_EPOCH[self._options.order] + epochs - 1
        if last < at.epoch:
            return 0
        return (self.n_rows - at.row) // rows + (last - at.epoch) * (self.n_rows // rows)

    def _batch_rows(self, batch_tokens: int) -> int:
        seq_len = self._options.seq_len
        if batch_tokens > self.n_rows * seq_len:
            raise ValueError(
                f"config.data.global_batch_size={batch_tokens} tokens needs"
                f" {batch_tokens // seq_len} rows of seq_len={seq_len}, found {self.n_rows} in"
                " config.data.paths"
            )
        return batch_tokens // seq_len

    def locate(self, row: int) -> tuple[int, int]:
        """The file of a row, and the offset of its first token there."""
        row = int(row)  # NumPy's narrow integers would wrap in the product below
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row {row} of {self.n_rows}")
        file = bisect.bisect_right(self._ends, row)
        return file, (row - (self._ends[file - 1] if file else 0)) * self._options.seq_len

    def read(self, take: Take) -> Rows:
        """Rows with what the options say of their documents and losses; see `Source`."""
        o, tokens = self._options, self._tokens(take)
        may_predict = starts = None
        if o.instance_filter:
            repeats = repetition.is_repetitive(tokens, o.filter_max_period, o.filter_min_repeats)
            may_predict = ~repeats[:, None]
        if self._boundaries is not None:
            starts = np.zeros(tokens.shape, bool)
            for out, row in zip(starts, take.ids, strict=True):
                out[self._boundaries.starts(*self.locate(row), take.seq_len)] = True
        elif o.document_mask == "eos":
            assert o.eos_id is not None  # checked with the config
            starts = starts_after(tokens, o.eos_id)
        return Rows(tokens, may_predict, starts)

    def _tokens(self, take: Take) -> np.ndarray:
        tokens = np.empty((len(take.ids), take.seq_len), self._files.dtype)
        places = [self.locate(row) for row in take.ids]
        for out, place in zip(tokens, places, strict=True):
            self._files.read_into(out, *place)
        if tokens.size and tokens.max() >= self._vocab_size:
            for out, place in zip(tokens, places, strict=True):
                self._files.check_ids(*place, out, self._vocab_size)
        return tokens.astype(np.int32)

    def resume(self, position: Mapping[str, Any], data: Mapping[str, Any]) -> Position:
        """The place of a run that stopped, also with another `seq_len` or `order`.

        Raises:
          NoPlaceError: if it is no place.
          ValueError: if it lies inside a row of the new length.
        """
        match [position, data]:
            case [
                {"epoch": int(epoch), "row": int(row), "tokens": int(tokens)},
                {"seq_len": int(old_len), "order": str(order)},
            ] if order in FIRST_EPOCH and old_len > 0 and min(epoch, row, tokens) >= 0:
                pass
            case _:
                raise NoPlaceError("no place in data of fixed length")
        seq_len = self._options.seq_len
        if row * old_len % seq_len:
            raise ValueError(
                f"config.data.seq_len={seq_len}: the data position, {row} rows of {old_len}"
                f" tokens, is no whole number of rows of {seq_len}"
            )
        shift = FIRST_EPOCH[self._options.order] - FIRST_EPOCH[order]
        return Position(epoch + shift, row * old_len // seq_len, tokens)
