"""Documents of token files: where they begin and end, and the side files that say so.

Beside a token file `X.npy` there may be `X.csv.gz` with one line per document:
start,end,id,source,line. Source: OLMo-core data/numpy_dataset.py and data/utils.py; dolma's
tokenizer.
"""

import csv
import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from olmo_jax import files
from olmo_jax.data.token_files import TokenFiles


def starts_after(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Where a document begins inside rows [rows, seq], that is after an EOS: bool [rows, seq]."""
    starts = np.zeros(tokens.shape, bool)
    np.equal(tokens[:, :-1], eos_id, out=starts[:, 1:])
    return starts


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

    def starts(self, file: int, first: int, width: int) -> np.ndarray:
        """Offsets in the `width` tokens from `first` on at which a document begins, but the 0."""
        ends = self._ends[file]
        inside = ends.searchsorted([first, first + width - 1], "right")
        return ends[slice(*inside)] - first


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
    end = 0
    with (
        files.whole(path) as file,  # has its name last
        files.whole(boundaries_path(path)) as raw,
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
    return end
