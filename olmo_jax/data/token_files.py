"""The tokens of files cut into rows, with their documents and labels.

Beside a token file `X.npy` there may be `X.csv.gz` with one line per document:
start,end,id,source,line. Source: OLMo-core data/numpy_dataset.py and data/utils.py; dolma's
tokenizer.
"""

import functools
import glob
import hashlib
import os
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from olmo_jax import files
from olmo_jax.data import foreign
from olmo_jax.files import OpenFile

PIECE_BYTES = 2**20  # read at once by who passes through a whole file
DOCUMENTS = re.compile(r"\.(parquet|arrow|jsonl?|csv|txt)(\.(gz|zst|bz2|xz))?$")
# How files begin that are no bare arrays. Ids that do are one in 2^32.
MAGIC = {
    b"\x93NUMPY": "has a NumPy header",
    b"PAR1": "is a Parquet file",
    b"ARROW1": "is an Arrow file",
    b"PK\x03\x04": "is a zip file",
    b"\x1f\x8b\x08\0": "is a gzip file",
    b"\x1f\x8b\x08\x08": "is a gzip file",
    b"(\xb5/\xfd": "is a zstd file",
    b"\xfd7zXZ\0": "is an xz file",
    b"\x89HDF": "is an HDF5 file",
    b"GGUF": "is a GGUF file",
    b"MMIDIDX": "is Megatron's index, whose ids are in the .bin file beside it",
}

# --- found ----------------------------------------------------------------------------------------


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
      FileNotFoundError: if a path or glob matches no file, or something else, which is named.
    """
    files: list[str] = []
    for path in paths:
        path = os.path.join(root, path)
        if "://" in path:
            raise ValueError(f"{option}: {path} is remote; token files must lie on a local disk")
        usable = [path]
        if glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True))
            usable = [m for m in matches if not os.path.isdir(m) and not m.endswith(".csv.gz")]
            if not usable:
                hint = f", but {matches[0]}{_instead(matches[0], option)}" if matches else ""
                raise FileNotFoundError(f"{option}: no token file matches {path}{hint}")
        for file in usable:
            if not os.path.isfile(file):
                hint = _instead(file, option)
                raise FileNotFoundError(f"{option}: no such token file: {file}{hint}")
        files += usable
    if permutation_seed is not None:
        random.Random(permutation_seed).shuffle(files)
    return files


def _instead(path: str, option: str) -> str:
    """What is there that is no token file, and who takes it, as the end of a sentence."""
    if os.path.islink(path) and not os.path.exists(path):
        return f", a link to {os.readlink(path)}, which leads nowhere"
    if not os.path.isdir(path):
        return ", which is no regular file" if os.path.exists(path) else ""
    return f", {_folder(path).replace('config.data.paths', option)}"


def _folder(path: str) -> str:
    """What a folder is."""
    names = sorted(os.listdir(path))
    if {"commit_success.txt", "checkpoints"} & {*names}:
        return "a run or a checkpoint of olmo_jax; it goes to config.checkpoint.load_path"
    if what := foreign.describe(pathlib.Path(path)):
        return what
    if next(glob.iglob(f"{glob.escape(path)}/**/*.npy", recursive=True), None):
        return f"a folder with token files further below: config.data.paths={path}/**/*.npy"
    documents = [name for name in names if DOCUMENTS.search(name)]
    if documents:
        return (
            f"a folder of documents such as {documents[0]}; a tokenizer makes token files of them"
        )
    return "a folder without token files"


def token_dtype(name: str | None, vocab_size: int) -> np.dtype:
    """The type of a token on disk; None for the smallest that holds `vocab_size` ids."""
    if name is None:
        bits = (vocab_size - 1).bit_length()
        name = "uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32"
    return np.dtype(name).newbyteorder("<")


# --- opened and read ------------------------------------------------------------------------------


class TokenFiles:
    """Token files, looked at when listed and opened when first read.

    Threads may read at the same time.
    """

    def __init__(self, paths: Sequence[str], dtype: np.dtype, option: str = "config.data.paths"):
        """List files.

        Raises:
          OSError: if one cannot be read.
          ValueError: if there is none, or one is empty, cut within a token, or has a NumPy header.
        """
        if not paths:
            raise ValueError(f"{option}: no token files")
        self.paths = list(paths)
        self.dtype = np.dtype(dtype)
        self.option = option
        lengths = [self._length(file) for file in range(len(self.paths))]
        self.lengths = np.array(lengths, np.int64)  # tokens
        self._opened = functools.lru_cache(maxsize=files.most_open())(self._open)

    def _length(self, file: int) -> int:
        path, opened, head = self.paths[file], self._open(file), np.zeros(10, np.uint8)
        try:
            size = opened.size
            opened.read_into(head, 0)
        except OSError as error:
            self._refuse(file, error)
        if kind := _other_kind(head.tobytes()):
            raise ValueError(
                f"{self.option}: {path} {kind}; need the bare array of ids, as written by"
                " ndarray.tofile"
            )
        if not size:
            raise ValueError(f"{self.option}: {path} is empty; need at least one row of tokens")
        if size % self.dtype.itemsize:
            raise ValueError(
                f"{self.option}: {path} has {size} bytes, no multiple of the"
                f" {self.dtype.itemsize} of {self.dtype.name}; truncated, or another"
                " config.data.dtype?"
            )
        return size // self.dtype.itemsize

    def _open(self, file: int) -> OpenFile:
        try:
            return OpenFile(self.paths[file])
        except OSError as error:
            self._refuse(file, error)

    def _refuse(self, file: int, error: OSError) -> NoReturn:
        raise OSError(f"{self.option}: cannot read {self.paths[file]}: {error.strerror}") from error

    def read(self, file: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a file, in its own type; see `read_into`."""
        out = np.empty(stop - start, self.dtype)
        self.read_into(out, file, start)
        return out

    def read_into(self, out: np.ndarray, file: int, start: int) -> None:
        """Fill `out` [n], of the files' type, with the tokens of a file from `start` on.

        Raises:
          OSError: if the file cannot be read any more.
          ValueError: if it is shorter than it was when it was listed.
        """
        opened = self._opened(file)
        try:
            n = opened.read_into(out, start * self.dtype.itemsize)
            size = opened.size if n < out.nbytes else 0
        except OSError as error:
            self._refuse(file, error)
        if n < out.nbytes:
            need = int(self.lengths[file]) * self.dtype.itemsize
            raise ValueError(
                f"{self.option}: {self.paths[file]} shrank while it was read: found {size} bytes,"
                f" need {need}"
            )

    def pieces(self, file: int) -> Iterator[tuple[int, np.ndarray]]:
        """A whole file, piece after piece: (offset, tokens)."""
        length, n = int(self.lengths[file]), PIECE_BYTES // self.dtype.itemsize
        for start in range(0, length, n):
            yield start, self.read(file, start, min(start + n, length))

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


def _other_kind(head: bytes) -> str | None:
    """What begins with these bytes and is no bare array."""
    if head[4:] == b'\0\0\0\0{"':
        return "is a safetensors file"
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


class TokenFile:
    """One of the files as a sequence: its length, and slices of step 1, read when asked for."""

    def __init__(self, files: TokenFiles, file: int):
        self._files, self._file = files, file

    def __len__(self) -> int:
        return int(self._files.lengths[self._file])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self._files.read(self._file, start, max(start, stop))


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
