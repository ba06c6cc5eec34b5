"""What rows of tokens become: targets, the weights of their losses, segments.

Source: OLMo-core data/numpy_dataset.py and data/utils.py.
"""

import numpy as np


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


def segments(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, [rows, seq] int32, from the documents' starts, [rows, seq] bool.

    Segments of a row count from 0, positions from 0 in each segment.
    """
    place = np.arange(starts.shape[1], dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, place, np.int32(0)), axis=1)
    return starts.cumsum(axis=1, dtype=np.int32), place[None] - begin
