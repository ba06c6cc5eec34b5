"""Options of the data: which tokens, in which order, in which batches.

A kind of data is a class, chosen by its `kind`: what all kinds have is in `DataConfig`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from olmo_jax.config.options import (
    INT32,
    Bears,
    Count,
    File,
    Location,
    Natural,
    Range,
    RowLength,
    Seed,
    SomeUnits,
    Units,
)


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which batches: what all kinds of data have."""

    kind: Annotated[str, Bears.ORDER] = ""  # a name of KINDS
    # Token files or globs; their order is part of the data order.
    paths: Annotated[tuple[File, ...], Bears.ORDER] = ()
    # Put before every relative path.
    root: Annotated[str, Location(may_be_empty=True), Bears.ORDER] = ""
    # Prepare this embedded corpus instead of `paths`.
    corpus: Annotated[Literal["stdlib"] | None, Bears.ORDER] = None
    corpus_vocab_size: Annotated[int, Range(257, INT32), Bears.ORDER] = 4096
    corpus_dir: File = "data"  # where prepared corpora are kept
    # None: smallest for vocab_size.
    dtype: Annotated[Literal["uint8", "uint16", "uint32"] | None, Bears.ORDER] = None
    check_dtype: bool = True  # refuse files that look like another type, though all ids are valid
    tokenizer: File | None = None  # tokenizer.json or sentencepiece .model that made the tokens
    eos_id: Natural | None = None  # where documents end; a checkpoint's own special tokens stay
    seq_len: Annotated[RowLength, Bears.ORDER | Bears.PROGRAM] = 4096  # tokens per row
    global_batch_size: Annotated[Count, Bears.PROGRAM] = 4_194_304  # tokens per step
    batch_sizes: tuple[Count, ...] = ()  # a schedule of global batch sizes, tokens ...
    batch_starts: tuple[Units, ...] = ()  # ... and the tokens seen at which each begins, first 0
    seed: Annotated[Seed, Bears.ORDER] = 34521  # of the order
    # Shuffle the list of paths first.
    source_permutation_seed: Annotated[Seed | None, Bears.ORDER] = None
    # Attend within documents only.
    document_mask: Annotated[Literal["none", "eos", "boundaries"], Bears.PROGRAM] = "none"
    instance_filter: bool = False  # no loss on rows that repeat an n-gram ...
    filter_max_period: Annotated[int, Range(1, 1_000_000)] = 13  # ... of at most so many tokens ...
    filter_min_repeats: Count = 32  # ... at least so often
    n_threads: Annotated[int, Range(1, 1024)] = 4  # that read rows
    prefetch: Annotated[int, Range(1, 65_536)] = 4  # batches made ahead

    @staticmethod
    def kinds() -> dict[str, type["DataConfig"]]:
        """The classes that there are, by their `kind`; the first is that of a config without."""
        return KINDS


@dataclass(frozen=True)
class FixedLength(DataConfig):
    """Rows of one length, cut from the running text of token files."""

    kind: Annotated[Literal["fixed_length"], Bears.ORDER] = "fixed_length"
    # OLMo-core (epochs from 1), OLMo (from 0).
    order: Annotated[Literal["core", "legacy"], Bears.ORDER] = "core"
    # Shuffle in chunks of this many tokens.
    max_target_seq_len: Annotated[SomeUnits | None, Bears.ORDER] = None


KINDS: dict[str, type[DataConfig]] = {"fixed_length": FixedLength}


def batch_stages(data: DataConfig) -> tuple[tuple[int, int], ...]:
    """The batch-size schedule as (tokens seen at its start, tokens per step) pairs."""
    if not data.batch_sizes:
        return ((0, data.global_batch_size),)
    return tuple(zip(data.batch_starts, data.batch_sizes, strict=True))
