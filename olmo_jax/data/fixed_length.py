"""Token files cut into rows of one length. Source: OLMo-core data/numpy_dataset.py."""

import bisect

import numpy as np

from olmo_jax.data.token_files import TokenFiles


class Instances:
    """Rows of `seq_len` consecutive tokens of one file; what is left of each file is dropped."""

    def __init__(self, files: TokenFiles, seq_len: int, max_target_seq_len: int | None = None):
        """Number the rows of all files.

        Args:
          max_target_seq_len: a multiple of `seq_len`; files are first cut to multiples of it, so
            that rows of every shorter length cover the same tokens. None: `seq_len`.
        """
        chunk = max_target_seq_len or seq_len
        self.files = files
        self.seq_len = seq_len
        self._ends = (files.lengths // chunk * (chunk // seq_len)).cumsum().tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, row: int) -> tuple[int, int]:
        """The file of a row, and the offset of its first token there."""
        row = int(row)  # NumPy's narrow integers would wrap in the product below
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        file = bisect.bisect_right(self._ends, row)
        return file, (row - (self._ends[file - 1] if file else 0)) * self.seq_len

    def read(self, rows: np.ndarray, vocab_size: int) -> np.ndarray:
        """Tokens [len(rows), seq_len] int32 of numbered rows.

        Raises:
          ValueError: if an id is outside the vocabulary, with its place.
        """
        tokens = np.empty((len(rows), self.seq_len), self.files.dtype)
        for out, row in zip(tokens, rows, strict=True):
            file, start = self.locate(row)
            self.files.read_into(out, file, start)
        if tokens.size and tokens.max() >= vocab_size:
            for out, row in zip(tokens, rows, strict=True):
                self.files.check_ids(*self.locate(row), out, vocab_size)
        return tokens.astype(np.int32)
