"""Token files: headerless arrays of ids, cut into rows, with their documents and labels.

A file `X.npy` is a plain little-endian array (no NumPy header) of documents that each end with the
EOS id; beside it `X.csv.gz` may hold one line per document: start,end,id,source,line.
Source: OLMo-core data/numpy_dataset.py and data/utils.py; dolma's tokenizer.
"""

import bisect
import csv
import functools
import glob
import gzip
import hashlib
import io
import os
import pathlib
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SAMPLE_BYTES = 2**20  # read at start from the beginning, the middle and the end of each file ...
SAMPLE_BUDGET = 2**29  # ... or less, so that all files together cost at most about this

# --- files ----------------------------------------------------------------------------------------


def resolve_paths(
    paths: Sequence[str],
    root: str = "",
    permutation_seed: int | None = None,
    option: str = "config.data.paths",
) -> list[str]:
    """The token files that paths and globs name, in the order that the data order counts them in.

    Args:
      paths: files or globs; the matches of a glob are sorted, without `.csv.gz`.
      root: put before every relative path.
      permutation_seed: shuffles the resulting list as OLMo-core does (Python's generator).
      option: the name of `paths` in errors.
    Raises:
      FileNotFoundError: if a path or glob matches no file.
    """
    files: list[str] = []
    for path in paths:
        path = os.path.join(root, path)
        if "://" in path:
            raise ValueError(f"{option}: {path} is remote; token files must lie on a local disk")
        if glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(glob.glob(path, recursive=True))
            found = [m for m in matches if os.path.isfile(m) and not m.endswith(".csv.gz")]
            if not found:
                raise FileNotFoundError(f"{option}: no token file matches {path}")
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise FileNotFoundError(f"{option}: no such token file: {path}")
    if permutation_seed is not None:
        random.Random(permutation_seed).shuffle(files)
    return files


def token_dtype(name: str | None, vocab_size: int) -> np.dtype:
    """The type of a token on disk; None for the smallest that holds `vocab_size` ids."""
    if name is None:
        bits = (vocab_size - 1).bit_length()
        name = "uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32"
    return np.dtype(name).newbyteorder("<")


class TokenFiles:
    """Token files, checked when listed and mapped into memory when first read."""

    def __init__(self, paths: Sequence[str], dtype: np.dtype, option: str = "config.data.paths"):
        """List files.

        Raises:
          ValueError: if there is none, or one is empty, cut within a token, or has a NumPy header.
        """
        if not paths:
            raise ValueError(f"{option}: no token files")
        self.paths = list(paths)
        self.dtype = np.dtype(dtype)
        self.option = option
        self.lengths = np.array([self._length(path) for path in self.paths], np.int64)  # tokens
        # A map holds no open file, but the kernel allows a process some 65,000 of them.
        self._map = functools.lru_cache(maxsize=16_384)(self._open)

    def _length(self, path: str) -> int:
        size = os.path.getsize(path)
        if not size:
            raise ValueError(f"{self.option}: {path} is empty; need at least one row of tokens")
        if size % self.dtype.itemsize:
            raise ValueError(
                f"{self.option}: {path} has {size} bytes, no multiple of the"
                f" {self.dtype.itemsize} of {self.dtype.name}; truncated, or another"
                " config.data.dtype?"
            )
        with open(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError(
                    f"{self.option}: {path} has a NumPy header; need the bare array, as written by"
                    " ndarray.tofile"
                )
        return size // self.dtype.itemsize

    def _open(self, file: int) -> np.ndarray:
        shape = (int(self.lengths[file]),)
        return np.memmap(self.paths[file], self.dtype, mode="r", shape=shape).view(np.ndarray)

    def read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a file, a view in its own type."""
        return self._map(file)[start:stop]

    def samples(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(file, offset, tokens) from the beginning, the middle and the end of each file."""
        size = min(SAMPLE_BYTES, max(SAMPLE_BUDGET // (3 * len(self.paths)), 4096))
        size //= self.dtype.itemsize
        for file, length in enumerate(self.lengths.tolist()):
            if length <= 3 * size:
                yield file, 0, self.read(file, 0, length)
            else:
                for start in (0, (length - size) // 2, length - size):
                    yield file, start, self.read(file, start, start + size)

    def check_ids(self, file: int, offset: int, tokens: np.ndarray, vocab_size: int) -> None:
        """Check that ids [n], read from `offset` of a file, are of the vocabulary.

        Raises:
          ValueError: with file, token offset and id.
        """
        if tokens.max() >= vocab_size:
            at = int(np.argmax(tokens >= vocab_size))
            raise ValueError(
                f"{self.option}: {self.paths[file]} has id {tokens[at]} at token {offset + at},"
                f" need ids below config.model.vocab_size={vocab_size}; wrong config.data.dtype?"
                f" (read as {self.dtype.name})"
            )


def check(files: TokenFiles, vocab_size: int, eos_id: int | None = None) -> None:
    """Look for a wrong type or tokenizer in a sample of each file, before the first step.

    Args:
      eos_id: an id that must occur, since documents are told apart by it; None for no such check.
    Raises:
      ValueError: if an id is outside the vocabulary, every second one is 0, as in a file of a wider
        type, or `eos_id` never occurs.
    """
    n_tokens, has_eos = 0, eos_id is None
    for file, offset, tokens in files.samples():
        files.check_ids(file, offset, tokens, vocab_size)
        if tokens.size > 64 and tokens[::2].any() != tokens[1::2].any():
            raise ValueError(
                f"{files.option}: in {files.paths[file]} every second id is 0; need another"
                f" config.data.dtype? (read as {files.dtype.name})"
            )
        n_tokens += tokens.size
        has_eos = has_eos or bool((tokens == eos_id).any())
    if not has_eos:
        raise ValueError(
            f"config.data.eos_id={eos_id} never occurs in the {n_tokens} tokens that were sampled"
            f" from {files.option}, but config.data.document_mask=eos needs it at the end of each"
            " document"
        )


def fingerprint(
    files: TokenFiles,
    vocab_size: int,
    eos_id: int | None,
    pad_id: int | None = None,
    bos_id: int | None = None,
    max_target_seq_len: int | None = None,
) -> str:
    """OLMo-core's fingerprint 2.0 of a fixed-length data set: names and sizes, not contents.

    Source: OLMo-core data/numpy_dataset.py, NumpyDatasetBase.fingerprint.
    """
    dtype = files.dtype.newbyteorder("=").type
    text = (
        f"class=NumpyFSLDatasetvocab_size={vocab_size},pad_token_id={pad_id},eos_token_id={eos_id},"
        f"dtype={dtype},max_target_sequence_length={max_target_seq_len},bos_token_id={bos_id},"
    )
    for path, length in zip(files.paths, files.lengths.tolist(), strict=True):
        text += f"path={os.path.basename(path)},size={length * files.dtype.itemsize},"
    return hashlib.sha256(text.encode()).hexdigest()


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
            out[:] = self.files.read(file, start, start + self.seq_len)
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
