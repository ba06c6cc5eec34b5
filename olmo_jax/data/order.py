"""The exact orders of OLMo and OLMo-core: which row of an epoch comes when.

The order is a pure function of (number of rows, seed, epoch), never of hosts or threads.
"""

import functools
import threading
from typing import Literal

import numpy as np

FIRST_EPOCH = {"core": 1, "legacy": 0}  # OLMo-core counts epochs from 1, OLMo from 0


def core_order(n_rows: int, seed: int, epoch: int, chunk: int = 1) -> np.ndarray:
    """Row numbers of an epoch (from 1) as OLMo-core shuffles them, in chunks that stay together.

    Args:
      chunk: rows per chunk, `max_target_seq_len // seq_len`; a last, partial chunk is dropped.
    Returns: [n_rows // chunk * chunk] uint32 (uint64 above 2^32 rows).
    Source: OLMo-core data/data_loader.py, NumpyFSLDataLoader.
    """
    order = _shuffled(n_rows // chunk, seed + epoch, _index_dtype(n_rows))
    if chunk == 1:
        return order
    return (order[:, None] * chunk + np.arange(chunk, dtype=order.dtype)).reshape(-1)


def legacy_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers [n_rows] of an epoch (from 0) as OLMo shuffles them.

    Its ranks share them evenly, so that a rest of fewer rows than ranks is dropped.

    Source: OLMo data/iterable_dataset.py, IterableDataset.
    """
    return _shuffled(n_rows, seed + epoch, _index_dtype(n_rows))


def _index_dtype(n_rows: int) -> type[np.unsignedinteger]:
    return np.uint32 if n_rows <= 2**32 else np.uint64


def _shuffled(n: int, seed: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    order = np.arange(n, dtype=dtype)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    return order


_making = threading.Lock()  # reader threads that need one epoch wait for one maker


def epoch_order(
    kind: Literal["core", "legacy"], n_rows: int, seed: int, epoch: int, chunk: int = 1
) -> np.ndarray:
    """Row numbers of an epoch in order, read-only; made once, then kept."""
    with _making:
        return _kept(kind, n_rows, seed, epoch, chunk)


@functools.lru_cache(maxsize=2)  # threads that run ahead are in the next epoch already
def _kept(kind: str, n_rows: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    if kind == "core":
        order = core_order(n_rows, seed, epoch, chunk)
    else:
        order = legacy_order(n_rows, seed, epoch)
    order.flags.writeable = False
    return order
