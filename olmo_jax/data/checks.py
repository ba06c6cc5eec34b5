"""A look at token files before the first step: are they of the type and the tokenizer of the run?

A file that is read as another type than it was written in gives ids too, and often valid ones.
"""

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Iterator

import numpy as np

from olmo_jax.data.documents import boundaries_path
from olmo_jax.data.token_files import TokenFiles

SAMPLE_BYTES = 2**20  # read at start from the beginning, the middle and the end of each file ...
SAMPLE_BUDGET = 2**29  # ... or less, so that all files together cost at most about this
JUDGED = 4096  # sampled tokens from which on a type is told; so many of a sample are looked at
SIDE_BUDGET = 2**24  # bytes of side files, compressed, that are read to their ends ...
SIDE_FILES = 256  # ... beside the first so many token files

# What a file may be that is read as something narrower, the widest first.
WIDER = {
    np.dtype(order + kind): prefix + name
    for kind, name in (("u8", "int64"), ("f8", "float64"), ("u4", "uint32"), ("f4", "float32"),
                       ("u2", "uint16"))
    for order, prefix in (("<", ""), (">", "big-endian "))
}  # fmt: skip
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")  # not in text
OVERRIDE = "config.data.check_dtype=false reads it all the same"

Sample = tuple[int, np.ndarray]  # offset in the file, tokens


def check(
    files: TokenFiles, vocab_size: int, eos_id: int | None = None, *, check_dtype: bool = True
) -> None:
    """Look for a wrong type or tokenizer in a sample of each file, before the first step.

    Args:
      eos_id: an id that must occur, since documents are told apart by it; None for no such check.
      check_dtype: refuse what looks like text or a wider type, though all ids are valid.
    Raises:
      ValueError: if an id is outside the vocabulary, a file looks like another type, or `eos_id`
        never occurs.
    """
    n_tokens, has_eos = 0, eos_id is None
    short = _Pool()  # files that are too short to be judged one by one
    for file, samples in enumerate(each_sampled(files)):
        if check_dtype:
            _refuse_text(files, file, samples)
        for offset, tokens in samples:
            files.check_ids(file, offset, tokens, vocab_size)
            n_tokens += tokens.size
            has_eos = has_eos or bool((tokens == eos_id).any())
        if check_dtype:
            _refuse_zeros(files, file, samples)
            tokens = np.concatenate([_head(*sample) for sample in samples])
            _refuse_wider(files, short.add(file, tokens), vocab_size)
    if not has_eos:
        raise ValueError(
            f"config.data.eos_id={eos_id} never occurs in the {n_tokens} tokens that were sampled"
            f" from {files.option}, but config.data.document_mask=eos needs it at the end of each"
            " document"
        )


def each_sampled(files: TokenFiles) -> Iterator[list[Sample]]:
    """Of each file the beginning, the middle and the end; a short one whole."""
    size = min(SAMPLE_BYTES, max(SAMPLE_BUDGET // (3 * len(files.paths)), 4096))
    size //= files.dtype.itemsize
    for file, length in enumerate(files.lengths.tolist()):
        starts = (0, (length - size) // 2, length - size)
        spans = [(0, length)] if length <= 3 * size else [(at, at + size) for at in starts]
        yield [(start, files.read(file, start, stop)) for start, stop in spans]


# --- types ----------------------------------------------------------------------------------------


class _Pool:
    """Gathers the tokens of short files until there are enough to judge them together."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._tokens: list[np.ndarray] = []

    def add(self, file: int, tokens: np.ndarray) -> tuple[list[int], np.ndarray] | None:
        """What can be judged now: this file if it is long enough, or the short ones so far."""
        if tokens.size >= JUDGED:
            return [file], tokens
        self._files.append(file)
        self._tokens.append(tokens)
        if sum(t.size for t in self._tokens) < JUDGED:
            return None
        full = self._files, np.concatenate(self._tokens)
        self._files, self._tokens = [], []
        return full


def _head(offset: int, tokens: np.ndarray) -> np.ndarray:
    """The first tokens of a sample, from where to where values of every type begin and end."""
    n = 8 // tokens.itemsize
    tokens = tokens[-offset % n :][:JUDGED]
    return tokens[: tokens.size // n * n]


def _refuse_wider(
    files: TokenFiles, judged: tuple[list[int], np.ndarray] | None, vocab_size: int
) -> None:
    """Refuse files whose values, read as a wider type, are ids nearly all.

    They have to be none when they are read from one token further on: files of few small ids, or
    full of padding, are ids from wherever they are read.
    """
    if judged is None:
        return
    (first, *others), tokens = judged
    for wide, name in WIDER.items():
        n = wide.itemsize // tokens.itemsize
        if n < 2 or _share(tokens[:64], wide, vocab_size) < 0.5:  # so most are passed over soon
            continue
        is_wider = _share(tokens, wide, vocab_size) >= 0.999
        if is_wider and _share(tokens[1 : 1 - n], wide, vocab_size) < 0.99:
            rest = f" and {len(others)} more" if others else ""
            is_known = name in ("uint16", "uint32")
            need = f"config.data.dtype={name}" if is_known else "a file of uint16 or uint32"
            raise ValueError(
                f"{files.option}: {files.paths[first]}{rest} looks like {name}, not"
                f" {files.dtype.name}: of {tokens.size} sampled tokens every {n} make one id for"
                f" config.model.vocab_size={vocab_size}; need {need}; {OVERRIDE}"
            )


def _share(tokens: np.ndarray, wide: np.dtype, vocab_size: int) -> float:
    """How much of the tokens, read as a wider type, is an id by all tokens but the lowest."""
    values, base = tokens.view(wide), 256**tokens.itemsize
    with np.errstate(invalid="ignore"):  # as floats they may be anything
        good = values < -(-vocab_size // base) * base + base
        if wide.kind == "f":
            good &= (values >= 0) & (values == np.floor(values))
    return np.count_nonzero(good) / good.size


def _refuse_zeros(files: TokenFiles, file: int, samples: list[Sample]) -> None:
    # Of all samples together: one of them may be padding with little else.
    first = [np.count_nonzero(tokens[offset % 2 :: 2]) for offset, tokens in samples]
    second = [np.count_nonzero(tokens[1 - offset % 2 :: 2]) for offset, tokens in samples]
    few, many = sorted((sum(first), sum(second)))
    if not few and many > 32:
        raise ValueError(
            f"{files.option}: in {files.paths[file]} every second id is 0; need another"
            f" config.data.dtype? (read as {files.dtype.name}); {OVERRIDE}"
        )


def _refuse_text(files: TokenFiles, file: int, samples: list[Sample]) -> None:
    if files.dtype.itemsize > 1 and all(_is_text(tokens) for _, tokens in samples):
        raise ValueError(
            f"{files.option}: {files.paths[file]} is text, not ids of {files.dtype.name}: all"
            " bytes that were sampled can be printed; need what a tokenizer makes of it;"
            f" {OVERRIDE}"
        )


def _is_text(tokens: np.ndarray) -> bool:
    """Whether the first bytes are a piece of UTF-8 without control characters."""
    data = tokens[:JUDGED].tobytes()
    if len(data) < 64 or 0 in data:
        return False
    start = next((i for i in range(4) if data[i] & 0xC0 != 0x80), 0)  # cut within a character
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    except UnicodeDecodeError:
        return False
    return CONTROL.search(text) is None


# --- side files -----------------------------------------------------------------------------------


def check_side_files(files: TokenFiles) -> None:
    """Refuse token files whose documents, as their side files have them, end elsewhere.

    Where documents are not told apart by them, side files are only a sign of the type. To see its
    end one has to be unpacked whole: SIDE_FILES and SIDE_BUDGET limit which are.

    Raises:
      ValueError: if one ends elsewhere than its token file.
    """
    left = SIDE_BUDGET
    for path, length in zip(files.paths[:SIDE_FILES], files.lengths.tolist(), strict=False):
        side = boundaries_path(path)
        size = os.path.getsize(side) if os.path.isfile(side) else 0
        if 0 < size <= left and (end := _last_end(side)) not in (None, length):
            raise ValueError(
                f"{files.option}: {side} ends at token {end}, but {path} has {length} of"
                f" {files.dtype.name}; another config.data.dtype, or file? {OVERRIDE}"
            )
        left -= size if size <= left else 0


def _last_end(side: str) -> int | None:
    """Where the last document ends; None where the file does not say so in its last line."""
    tail = b""
    try:
        with gzip.open(side) as file:
            while data := file.read(2**20):
                tail = (tail + data)[-(2**16) :]
    except (OSError, EOFError, zlib.error):  # not needed, so not our concern
        return None
    match = re.search(rb"(?:^|\n)(\d{1,18}),(\d{1,18})(?:,[^\n]*)?\r?\n?$", tail)
    return None if match is None else int(match[2])
