"""A look at token files before the first step: is this the type and the tokenizer of the run?"""

from collections.abc import Iterator

import numpy as np

from olmo_jax.data.files import TokenFiles

SAMPLE_BYTES = 2**20  # read at start from the beginning, the middle and the end of each file ...
SAMPLE_BUDGET = 2**29  # ... or less, so that all files together cost at most about this


def check(files: TokenFiles, vocab_size: int, eos_id: int | None = None) -> None:
    """Look for a wrong type or tokenizer in a sample of each file, before the first step.

    Args:
      eos_id: an id that must occur, since documents are told apart by it; None for no such check.
    Raises:
      ValueError: if an id is outside the vocabulary, every second one is 0, as in a file of a wider
        type, or `eos_id` never occurs.
    """
    n_tokens, has_eos = 0, eos_id is None
    for file, offset, tokens in samples(files):
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


def samples(files: TokenFiles) -> Iterator[tuple[int, int, np.ndarray]]:
    """(file, offset, tokens) from the beginning, the middle and the end of each file."""
    size = min(SAMPLE_BYTES, max(SAMPLE_BUDGET // (3 * len(files.paths)), 4096))
    size //= files.dtype.itemsize
    for file, length in enumerate(files.lengths.tolist()):
        if length <= 3 * size:
            yield file, 0, files.read(file, 0, length)
        else:
            for start in (0, (length - size) // 2, length - size):
                yield file, start, files.read(file, start, start + size)
