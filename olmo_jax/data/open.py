"""Data of every kind, opened: options -> a source of rows, after a look at its files."""

from olmo_jax.config.data import DataConfig, FixedLength
from olmo_jax.data import checks, documents, token_files
from olmo_jax.data.fixed_length import FixedLengthSource
from olmo_jax.data.source import Source


def open_source(data: DataConfig, vocab_size: int) -> Source:
    """Open and check the data of a run.

    Args:
      data: what to read; `paths` are set, also where a corpus was prepared.
      vocab_size: ids must be below it.
    Raises:
      ValueError, FileNotFoundError: one line that names file or field, found and needed.
    """
    match data:
        case FixedLength():
            return _fixed_length(data, vocab_size)
        case _:
            raise ValueError(f"config.data.kind={data.kind} cannot be trained on")


def _fixed_length(data: FixedLength, vocab_size: int) -> FixedLengthSource:
    paths = token_files.resolve_paths(data.paths, data.root, data.source_permutation_seed)
    files = token_files.TokenFiles(paths, token_files.token_dtype(data.dtype, vocab_size))
    eos_id = data.eos_id if data.document_mask == "eos" else None
    checks.check(files, vocab_size, eos_id, check_dtype=data.check_dtype)
    by_file = data.document_mask == "boundaries"
    if data.check_dtype and not by_file:
        checks.check_side_files(files)
    boundaries = documents.Boundaries(files) if by_file else None
    return FixedLengthSource(files, data, vocab_size, boundaries)
