"""Rows that repeat themselves, which OLMo's instance filter masks."""

import numpy as np


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
