"""Torch's distributed checkpoints, read without torch, any part of any tensor.

`.metadata` is a pickle that says which part of which tensor is where; `__0_0.distcp` and its like
hold what `torch.save` makes of each part, one behind the other.
"""

import functools
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmo_jax.checkpoints.formats.folders import SourceFolder, at_once
from olmo_jax.checkpoints.formats.stacked import Shapes, narrowed
from olmo_jax.checkpoints.formats.torch_files import Archive, Tensor, unpickle
from olmo_jax.files import is_inside

Extents = list[tuple[int, int]]  # start and stop in each dimension


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor: its place there, and the zip that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    stop: int


class Distributed:
    """A distributed checkpoint; `shapes` has shape and dtype of each tensor by key."""

    def __init__(self, folder: SourceFolder, prefix: str = ""):
        """Read the metadata, and look whether all its files are there and long enough.

        Args:
          folder: that it is in.
          prefix: name of its own folder in there, with a slash at the end.
        """
        self._folder = folder
        self.where = f"{folder.name.rstrip('/')}/{prefix}"
        meta = unpickle(folder.read(f"{prefix}.metadata").tobytes(), f"{self.where}.metadata")
        self._archive = functools.lru_cache(maxsize=256)(self._open)
        try:
            places = {
                (index.fqn, tuple(index.__dict__.get("offset") or ())): _place(prefix, info)
                for index, info in meta.storage_data.items()
            }
            stored = meta.state_dict_metadata
            tensors = {key: value for key, value in stored.items() if hasattr(value, "chunks")}
            self.shapes: Shapes = {
                key: _shape(value.size, value.properties.state[0]) for key, value in tensors.items()
            }
            self._chunks = {
                key: [
                    _chunk(c.offsets, c.sizes, *places[key, tuple(c.offsets)]) for c in value.chunks
                ]
                for key, value in tensors.items()
            }
            self._objects = {key: places[key, ()] for key in stored if key not in tensors}
            for key, (shape, _) in self.shapes.items():
                _check_parts(key, shape, self._chunks[key])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.where}.metadata is no metadata of a distributed checkpoint:"
                f" {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from None
        self.files = self._check_files()

    def _check_files(self) -> list[str]:
        needed: dict[str, int] = {}
        everything = [(c.file, c.stop) for chunks in self._chunks.values() for c in chunks]
        for file, stop in everything + [(file, stop) for file, _, stop in self._objects.values()]:
            needed[file] = max(needed.get(file, 0), stop)
        for (file, stop), size in zip(
            needed.items(), at_once(self._folder.size, needed), strict=True
        ):
            if size < stop:
                where = f"{self._folder.name.rstrip('/')}/{file}"
                raise ValueError(f"{where} is truncated: {size:,} bytes of at least {stop:,}")
        return sorted(needed)

    def scalars(self, keys: Sequence[str]) -> dict[str, float]:
        """The values of tensors without dimensions."""
        for key in keys:
            if self.shapes[key][0]:
                raise ValueError(
                    f"{self.where}.metadata: {key} has shape {list(self.shapes[key][0])}"
                )
        return dict(zip(keys, at_once(lambda key: float(self.read(key, ())), keys), strict=True))

    def read(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor.

        Args:
          key: its key.
          index: a slice of step 1 for each dimension.
        """
        shape, dtype = self.shapes[key]
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in ranges], dtype)
        wanted = [(chunk, _overlap(chunk, ranges)) for chunk in self._chunks[key]]
        wanted = [(chunk, common) for chunk, common in wanted if common is not None]
        parts = at_once(lambda pair: self._read_chunk(key, *pair), wanted)
        if len(parts) == 1 and parts[0].size == out.size:
            return parts[0]
        if sum(part.size for part in parts) != out.size:
            raise ValueError(f"{self.where}.metadata is damaged: parts of {key} are missing")
        for part, (_, common) in zip(parts, wanted, strict=True):
            starts = [start for start, _ in ranges]
            into = [slice(a - s, b - s) for (a, b), s in zip(common, starts, strict=True)]
            out[tuple(into)] = part
        return out

    def _read_chunk(self, key: str, chunk: _Chunk, common: Extents) -> np.ndarray:
        """What a chunk has of a part of a tensor: whole rows are read, and narrowed here."""
        archive = self._archive(chunk)
        tensor, (_, dtype) = archive.tree, self.shapes[key]
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, dtype):
            raise ValueError(
                f"{archive.where} is damaged: the part of {key} at byte {chunk.start:,} is not the"
                f" {dtype} {list(chunk.sizes)} of .metadata"
            )
        ends = zip(common, chunk.offsets, strict=True)
        inside = tuple(slice(a - o, b - o) for (a, b), o in ends)
        return narrowed(functools.partial(archive.read, tensor), inside, tensor.shape, dtype)

    def _open(self, chunk: _Chunk) -> Archive:
        return Archive(self._folder, chunk.file, chunk.start, chunk.stop)


def _overlap(chunk: _Chunk, ranges: Extents) -> Extents | None:
    """What a chunk and a part of a tensor have in common, in the tensor's coordinates."""
    common = [
        (max(start, offset), min(stop, offset + size))
        for (start, stop), offset, size in zip(ranges, chunk.offsets, chunk.sizes, strict=True)
    ]
    return None if any(start >= stop for start, stop in common) else common


def _shape(size: Any, dtype: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"{reprlib.repr(dtype)} is no dtype")
    return _whole(*size), dtype


def _chunk(offsets: Any, sizes: Any, file: str, start: int, stop: int) -> _Chunk:
    if len(offsets) != len(sizes):
        raise ValueError(f"a part of {len(sizes)} dimensions at {len(offsets)}")
    return _Chunk(_whole(*offsets), _whole(*sizes), file, start, stop)


def _check_parts(key: Any, shape: tuple[int, ...], chunks: list[_Chunk]) -> None:
    """Raise a ValueError unless each element of a tensor is in one part."""
    if not isinstance(key, str):
        raise ValueError(f"{reprlib.repr(key)} is no name of a tensor")
    starts = np.array([c.offsets for c in chunks], np.int64).reshape(len(chunks), 1, len(shape))
    stops = starts + np.array([c.sizes for c in chunks], np.int64).reshape(starts.shape)
    meet = ((starts < stops.swapaxes(0, 1)) & (starts.swapaxes(0, 1) < stops)).all(-1)
    n_values = sum(math.prod(c.sizes) for c in chunks)
    if (stops > np.array(shape, np.int64)).any() or np.triu(meet, 1).any():
        raise ValueError(f"parts of {key} overlap, or lie outside of it")
    if n_values != math.prod(shape):
        raise ValueError(f"parts of {key} are missing: {n_values:,} of {math.prod(shape):,} values")


def _whole(*numbers: Any) -> tuple[int, ...]:
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError(f"{reprlib.repr(numbers)} are no whole numbers")
    return numbers


def _place(prefix: str, info: Any) -> tuple[str, int, int]:
    if info.__dict__.get("transform_descriptors"):
        raise ValueError(f"it is compressed: {info.transform_descriptors}")
    if not is_inside(info.relative_path):
        raise ValueError(f"{reprlib.repr(info.relative_path)} is no file of this folder")
    start, length = _whole(info.offset, info.length)
    return prefix + info.relative_path, start, start + length
