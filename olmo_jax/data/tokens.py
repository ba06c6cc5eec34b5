"""The tokens of files cut into rows, with their documents and labels.

Beside a token file `X.npy` there may be `X.csv.gz` with one line per document:
start,end,id,source,line. Source: OLMo-core data/numpy_dataset.py and data/utils.py; dolma's
tokenizer.
"""

import bisect
import csv
import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from olmo_jax.data.files import TokenFiles

# --- rows -----------------------------------------------------------------------------------------


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


def next_tokens(
    tokens: np.ndarray, label_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What each position has to predict, and whether it counts.

    Args:
      tokens: [rows, seq] int32.
      label_mask: bool that broadcasts to [rows, seq], True where a token may be predicted.
    Returns: targets [rows, seq] int32, the tokens shifted left with 0 in the last column, and
      weights [rows, seq] float32, 0 there and where the target is masked.
    """
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, :-1] = 1 if label_mask is None else np.broadcast_to(label_mask, tokens.shape)[:, 1:]
    return targets, weights


def repeats(tokens: np.ndarray, period: int) -> np.ndarray:
    """How often in a row some n-gram of `period` tokens stands, at most, in each of [rows, seq]."""
    n, width = len(tokens), tokens.shape[1] - period + 1
    if width < 2:
        return np.ones(n, np.int64)
    equal = np.zeros((n, width), bool)  # the first column ends the runs of the row before
    np.equal(tokens[:, period:], tokens[:, :-period], out=equal[:, 1:])
    breaks = np.flatnonzero(~equal)
    runs = np.diff(breaks, append=n * width) - 1
    longest = np.maximum.reduceat(runs, np.flatnonzero(breaks % width == 0))
    return (longest + period) // period


def is_repetitive(tokens: np.ndarray, max_period: int, min_repeats: int) -> np.ndarray:
    """Which of the rows [rows, seq] OLMo's instance filter masks: bool [rows].

    Source: OLMo-core data/utils.py, find_periodic_sequences.
    """
    masked = np.zeros(len(tokens), bool)
    for period in range(1, max_period + 1):
        masked |= repeats(tokens, period) >= min_repeats
    return masked


# --- documents ------------------------------------------------------------------------------------


def starts_after(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Where a document begins inside rows [rows, seq], that is after an EOS: bool [rows, seq]."""
    starts = np.zeros(tokens.shape, bool)
    np.equal(tokens[:, :-1], eos_id, out=starts[:, 1:])
    return starts


def segments(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, [rows, seq] int32, from the documents' starts, [rows, seq] bool.

    Segments of a row count from 0, positions from 0 in each segment.
    """
    place = np.arange(starts.shape[1], dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, place, np.int32(0)), axis=1)
    return starts.cumsum(axis=1, dtype=np.int32), place[None] - begin


class Boundaries:
    """Documents of token files as their `.csv.gz` tell; all ends are held, 8 bytes a document."""

    def __init__(self, files: TokenFiles):
        """Read and check the side files.

        Raises:
          FileNotFoundError: if a side file is missing.
          ValueError: if a side file does not cover exactly its token file.
        """
        lengths = files.lengths.tolist()
        pairs = zip(files.paths, lengths, strict=True)
        self._ends = [read_boundaries(path, length) for path, length in pairs]

    def starts(self, instances: Instances, rows: np.ndarray) -> np.ndarray:
        """Where a document begins inside numbered rows: bool [len(rows), seq]."""
        starts = np.zeros((len(rows), instances.seq_len), bool)
        for out, row in zip(starts, rows, strict=True):
            file, first = instances.locate(row)
            ends = self._ends[file]
            inside = ends.searchsorted([first, first + instances.seq_len - 1], "right")
            out[ends[slice(*inside)] - first] = True
        return starts


def boundaries_path(path: str | os.PathLike[str]) -> str:
    """The side file of a token file: same stem, `.csv.gz`."""
    return str(pathlib.Path(path).with_suffix(".csv.gz"))


def read_boundaries(path: str, n_tokens: int) -> np.ndarray:
    """Ends [documents] int64, exclusive, of the documents of a token file, from its side file.

    Raises:
      FileNotFoundError: without a side file.
      ValueError: if its documents do not follow each other from token 0 to `n_tokens`.
    """
    side = boundaries_path(path)
    if not os.path.isfile(side):
        raise FileNotFoundError(
            f"config.data.document_mask=boundaries: {path} needs its document boundaries in {side}"
        )
    last, ends = 0, []
    try:
        with gzip.open(side, "rt", encoding="utf-8", newline="") as file:
            for start, end in ((int(line[0]), int(line[1])) for line in csv.reader(file)):
                if start != last or end < start:
                    raise ValueError(f"document {len(ends)} is [{start}, {end}) after {last}")
                ends.append(end)
                last = end
    except (ValueError, IndexError, EOFError, OSError, csv.Error, zlib.error) as error:
        raise ValueError(f"config.data.document_mask=boundaries: {side}: {error}") from error
    if last != n_tokens:
        raise ValueError(
            f"config.data.document_mask=boundaries: {side} ends at token {last}, but {path} has"
            f" {n_tokens}"
        )
    return np.array(ends, np.int64)


def write_documents(
    path: str | os.PathLike[str],
    documents: Iterable[Sequence[int] | np.ndarray],
    dtype: np.dtype | str,
    sources: Iterable[str] | None = None,
) -> int:
    """Write documents, ids with their EOS, as a token file with its side file; count the tokens.

    Both files appear whole or not at all, the token file last, and equal input gives equal bytes.

    Args:
      path: the token file, `X.npy`.
      sources: where each document comes from, for the side file; its line is 1.
    Raises:
      ValueError: if an id does not fit `dtype`.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    names = iter(sources) if sources is not None else iter(lambda: "", None)
    final = (boundaries_path(path), os.fspath(path))
    partial = [f"{name}.tmp{os.getpid()}" for name in final]
    end = 0
    try:
        with (
            open(partial[1], "wb") as file,
            open(partial[0], "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
        ):
            table = csv.writer(text, lineterminator="\n")
            for number, document in enumerate(documents):
                ids = np.asarray(document, np.int64)
                if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(dtype).max:
                    raise ValueError(f"{path}: document {number} has ids outside {dtype.name}")
                file.write(ids.astype(dtype).tobytes())
                table.writerow((end, end + ids.size, number, next(names), 1))
                end += ids.size
        for old, new in zip(partial, final, strict=True):
            os.replace(old, new)
    finally:
        for name in partial:
            pathlib.Path(name).unlink(missing_ok=True)
    return end
