"""The protocol of a source of rows: what comes when, by arithmetic, and the rows themselves.

A source is an endless order of rows, cut into epochs. Where a run stands in it is a `Position`, a
few integers, so that it goes on anywhere without replay. All but `read` is equal in every process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Position:
    """A place between two batches: all that a run has to remember of its data."""

    epoch: int  # in the source's own counting
    row: int  # how far in this epoch, in the source's own unit
    tokens: int  # seen in the whole run


class Take(NamedTuple):
    """What a batch is made of."""

    ids: np.ndarray  # [rows], numbers of the rows
    seq_len: int  # tokens of each row


class Rows(NamedTuple):
    """Rows of tokens, and what is known of them."""

    tokens: np.ndarray  # [rows, seq] int32
    may_predict: np.ndarray | None = None  # bool that broadcasts to [rows, seq]; None: all tokens
    starts: np.ndarray | None = None  # [rows, seq] bool, of documents; None: rows are one document


class NoPlaceError(ValueError):
    """What a checkpoint says is no place in data of this kind."""


class Source(Protocol):
    """A kind of data, opened.

    Attributes:
      fingerprint: changes where the same numbers would give other rows.
      n_rows: rows of an epoch.
    """

    fingerprint: str
    n_rows: int

    def start(self) -> Position:
        """Where a run begins."""
        ...

    def take(self, at: Position, batch_tokens: int) -> tuple[Take, Position]:
        """What the batch that follows on `at` is made of, and the position after it.

        Raises:
          ValueError: if an epoch has no batch of so many tokens.
        """
        ...

    def after(self, at: Position, batch_tokens: int, n: int) -> Position:
        """The position after `n` batches of one size, found without their rows.

        Raises:
          ValueError: as `take`, and if `at` is none of this source.
        """
        ...

    def left(self, at: Position, batch_tokens: int, epochs: int) -> int:
        """Batches of one size from `at` to the end of the last of a run's `epochs`."""
        ...

    def read(self, take: Take) -> Rows:
        """The rows of a part of a batch, which any process can read alone.

        Raises:
          ValueError, OSError: with file and place, if they cannot be read or hold other ids.
        """
        ...

    def resume(self, position: Mapping[str, Any], data: Mapping[str, Any]) -> Position:
        """The place of a run that stopped at `position` of the data that options `data` gave.

        Raises:
          NoPlaceError: if that is no place in data of this kind.
          ValueError: that says why the place cannot be kept.
        """
        ...
