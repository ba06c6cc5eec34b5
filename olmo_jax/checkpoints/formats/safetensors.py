"""Files of the safetensors format: eight bytes with the length of a JSON header, it, the tensors.

Source: the format's description in github.com/huggingface/safetensors. Their reader allocates what
it reads; this one takes any stretch of a tensor from a `SourceFolder`, so also from behind https.
"""

import json
import math
import os
import pathlib
import reprlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from olmo_jax import files
from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats.folders import SourceFolder

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
STEP_BYTES = 64 << 20  # written or read before memory is released
LARGEST_HEADER = 100_000_000  # as in Hugging Face's reader


class Entry(NamedTuple):
    """Where a tensor is."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, i: int) -> "Entry":
        """Where an element of its first dimension is."""
        part = self._replace(shape=self.shape[1:])
        return part._replace(start=self.start + i * part.n_bytes)


def entries(folder: SourceFolder, file: str) -> dict[str, Entry]:
    """The tensors of a file by name, after a look whether all of them are there.

    Raises:
      ValueError: if the file is truncated, or no safetensors file.
    """
    where, size = f"{folder.name.rstrip('/')}/{file}", folder.size(file)
    if size < 8:
        raise ValueError(f"{where} is truncated: {size} bytes are no safetensors file")
    length = int.from_bytes(folder.read(file, 0, 8).tobytes(), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"{where} is no safetensors file: a header of {length:,} bytes")
    if 8 + length > size:
        raise ValueError(f"{where} is truncated: {size:,} bytes of at least {8 + length:,}")
    header = files.json_object(folder.read(file, 8, 8 + length).tobytes(), f"{where}: its header")
    header.pop("__metadata__", None)
    try:
        found = {key: _entry(file, 8 + length, key, value) for key, value in header.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _refuse_gaps(where, found, 8 + length, size)
    return found


def _entry(file: str, base: int, key: str, value: Any) -> Entry:
    match value:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [start, stop]} if all(
            type(n) is int and n >= 0 for n in (*shape, start, stop)
        ):
            pass
        case _:
            raise ValueError(
                f"the header is damaged: {key} is {reprlib.repr(value)}; need its dtype, shape and"
                " data_offsets"
            )
    if kind not in DTYPES:
        raise ValueError(f"{key} is {kind}; weights are one of {', '.join(DTYPES)}")
    entry = Entry(file, DTYPES[kind], tuple(shape), base + start)
    if stop - start != entry.n_bytes:
        raise ValueError(f"the header is damaged: {key} {shape} in {stop - start:,} bytes")
    return entry


def _refuse_gaps(where: str, found: Mapping[str, Entry], begin: int, size: int) -> None:
    """Raise a ValueError unless the tensors fill the file, one behind the other."""
    at, before = begin, "the header"
    for key, entry in sorted(found.items(), key=lambda pair: (pair[1].start, pair[1].n_bytes)):
        if entry.start != at:
            what = "overlaps with" if entry.start < at else "does not begin at the end of"
            raise ValueError(f"{where} is damaged: {key} {what} {before}")
        at, before = at + entry.n_bytes, key
    if at > size:
        raise ValueError(f"{where} is truncated: {size:,} bytes of {at:,}")
    if at < size:
        raise ValueError(f"{where} is damaged: {size - at:,} bytes behind the last tensor")


def load(folder: SourceFolder, entry: Entry, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or some rows of it; only these are read."""
    if not entry.shape:
        rows = slice(0, 1)
    first, last, _ = rows.indices(entry.shape[0] if entry.shape else 1)
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    data = folder.read(entry.file, entry.start + first * row, entry.start + last * row)
    shape = (last - first, *entry.shape[1:]) if entry.shape else ()
    return data.view(entry.dtype).reshape(shape)


def checksum(folder: pathlib.Path, entry: Entry) -> int:
    """The CRC-32 of a tensor's bytes on the disk; they do not stay in memory."""
    left = entry.n_bytes
    crc, buffer = 0, memoryview(bytearray(min(left, STEP_BYTES)))
    with open(folder / entry.file, "rb", buffering=0) as file:
        file.seek(entry.start)
        while left:
            n = file.readinto(buffer[:left])
            if not n:
                raise ValueError(f"{folder / entry.file} is shorter than what was written")
            crc, left = zlib.crc32(buffer[:n], crc), left - n
            storage.release(file.fileno(), file.tell() - n, n)
    return crc


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for key, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        fields[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def write(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    make: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Write a file, tensor by tensor, and see that it is on disk.

    Args:
      path: of the new file.
      tensors: dtype and shape of each by name.
      make: the values of a tensor, in pieces along its first dimension.
    Raises:
      FileExistsError: if there is a file already.
    """
    in_memory = 0
    with open(path, "xb", buffering=0) as file:

        def write_all(data: bytes | memoryview) -> None:
            nonlocal in_memory
            left = memoryview(data)
            while left:
                try:
                    n = os.write(file.fileno(), left[:STEP_BYTES])
                except OSError as error:
                    error.filename = os.fspath(path)  # the system says only what is wrong
                    raise
                left, in_memory = left[n:], in_memory + n
                if in_memory >= STEP_BYTES:
                    in_memory = 0
                    os.fsync(file.fileno())
                    storage.release(file.fileno())

        write_all(header(tensors))
        for key, (dtype, shape) in tensors.items():
            written = 0
            for piece in make(key):
                assert piece.dtype == dtype, f"{key}: {piece.dtype}, not {dtype}"
                write_all(np.ascontiguousarray(piece).view(np.uint8).data.cast("B"))
                written += piece.size
            assert written == math.prod(shape), f"{key}: {written} values of {shape}"
        os.fsync(file.fileno())
