"""The arrays of a batch: what rows of tokens become for a step.

Source: OLMo-core data/numpy_dataset.py and data/utils.py.
"""

from collections.abc import Mapping

import numpy as np

from olmo_jax.data.source import Rows

Batch = dict[str, np.ndarray]  # each [rows, seq]


def make(rows: Rows) -> Batch:
    """The arrays of some rows, as `dtypes` names them."""
    targets, weights = next_tokens(rows.tokens, rows.may_predict)
    batch = {"tokens": rows.tokens, "targets": targets, "loss_weights": weights}
    if rows.starts is not None:
        batch["segment_ids"], batch["positions"] = segments(rows.starts)
    return batch


def dtypes(has_documents: bool) -> Mapping[str, type[np.generic]]:
    """The arrays [rows, seq] of a batch by name."""
    ids = ["tokens", "targets", *(("segment_ids", "positions") if has_documents else ())]
    return dict.fromkeys(ids, np.int32) | {"loss_weights": np.float32}


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


def segments(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, [rows, seq] int32, from the documents' starts, [rows, seq] bool.

    Segments of a row count from 0, positions from 0 in each segment.
    """
    place = np.arange(starts.shape[1], dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, place, np.int32(0)), axis=1)
    return starts.cumsum(axis=1, dtype=np.int32), place[None] - begin
