"""Arrays of checkpoints: onto devices, where each process reads what its own need, and turned."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

BLOCK = 192  # rows and columns that are transposed at once
Index = tuple[slice, ...]
Ranges = tuple[tuple[int, int], ...]  # start and stop in each dimension


def on_devices(
    leaf: Any, read: Callable[[Index], np.ndarray], pieces: Iterable[Index] | None = None
) -> Any:
    """Read a leaf and put it where it belongs.

    Args:
      leaf: its shape, its dtype there and its sharding; without one it becomes a NumPy array.
      read: gives the values of a part, in any dtype.
      pieces: parts that cover the leaf and are cheap to read, each only once; None: any are.
    """
    shape, dtype, where = tuple(leaf.shape), leaf.dtype, getattr(leaf, "sharding", None)
    whole: tuple[slice, ...] = (slice(None),) * len(shape)
    indices = [whole] if where is None else where.addressable_devices_indices_map(shape).values()
    needed = {_ranges(index, shape) for index in indices}
    if pieces is None:
        blocks = {key: read(_index(key)).astype(dtype, copy=False) for key in needed}
    else:
        blocks = {key: np.empty([stop - start for start, stop in key], dtype) for key in needed}
        _fill(blocks, shape, read, pieces)
    if where is None:
        return blocks[_ranges(whole, shape)]
    return jax.make_array_from_callback(
        shape, where, lambda index: blocks[_ranges(index, shape)], dtype=dtype
    )


def _fill(
    blocks: dict[Ranges, np.ndarray],
    shape: tuple[int, ...],
    read: Callable[[Index], np.ndarray],
    pieces: Iterable[Index],
) -> None:
    """Fill blocks with what each piece has of them."""
    box = tuple(
        (min(along)[0], max(stop for _, stop in along)) for along in zip(*blocks, strict=True)
    )
    for piece in pieces:
        wanted = _common(_ranges(piece, shape), box)
        if wanted is None:
            continue
        values = read(_index(wanted))
        for key, block in blocks.items():
            if (common := _common(wanted, key)) is not None:
                assign(block[(*_within(common, key), ...)], values[_within(common, wanted)])


def _ranges(index: Index | None, shape: tuple[int, ...]) -> Ranges:
    index = index or ()
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(along.indices(n)[:2] for along, n in zip(index, shape, strict=True))


def _index(ranges: Ranges) -> Index:
    return tuple(slice(*along) for along in ranges)


def _common(one: Ranges, other: Ranges) -> Ranges | None:
    ends = zip(one, other, strict=True)
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in ends)
    return None if any(start >= stop for start, stop in common) else common


def _within(inner: Ranges, outer: Ranges) -> Index:
    ends = zip(inner, outer, strict=True)
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in ends)


def assign(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`; transposed in blocks, which is several times as fast.

    Each block is read as it lies in memory, narrowed if it has to be, turned while it is in the
    cache, and written as the result lies in memory.
    """
    if out.ndim < 2 or (out.flags.c_contiguous and values.flags.c_contiguous):
        out[...] = values
    elif out.ndim > 2:
        axis = int(np.argmin(out.shape))
        for i in range(out.shape[axis]):
            at = (slice(None),) * axis + (i,)
            assign(out[at], values[at])
    else:
        order = "F" if out.strides[0] < out.strides[1] else "C"
        for i in range(0, out.shape[0], BLOCK):
            for j in range(0, out.shape[1], BLOCK):
                block = slice(i, i + BLOCK), slice(j, j + BLOCK)
                narrow = out.dtype if out.itemsize < values.itemsize else values.dtype
                piece = values[block].astype(narrow, order="K")
                out[block] = np.array(piece, order=order)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself if it lies in C order in memory, else a copy that does."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    out = np.empty(array.shape, array.dtype)
    assign(out, array)
    return out
