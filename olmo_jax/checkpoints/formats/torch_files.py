"""Files of `torch.save`, read piece by piece without torch.

It writes a zip without compression: `data.pkl`, a pickle whose tensors point to storages, and the
bytes of each storage as `data/0`, `data/1`, …

A pickle is a program. Here it runs on a machine that knows the few names that checkpoints need,
each replaced by a stand-in: nothing is imported, and nothing that it brings is called.
"""

import collections
import functools
import io
import math
import pickle
import pickletools
import reprlib
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints.formats.folders import SourceFolder

BLOCK_BYTES = 16 << 10  # read at once of what surrounds the tensors

_DTYPES = {
    "float64": ("DoubleStorage", np.float64),
    "float32": ("FloatStorage", np.float32),
    "float16": ("HalfStorage", np.float16),
    "bfloat16": ("BFloat16Storage", jnp.bfloat16),
    "int64": ("LongStorage", np.int64),
    "int32": ("IntStorage", np.int32),
    "int16": ("ShortStorage", np.int16),
    "int8": ("CharStorage", np.int8),
    "uint8": ("ByteStorage", np.uint8),
    "bool": ("BoolStorage", np.bool_),
}


# --- pickles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """Where a tensor of a `torch.save` file is: strides and offset count elements."""

    storage: str  # name in the zip, below data/
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        want = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        triples = zip(self.shape, self.strides, want, strict=True)
        return all(size == 1 or stride == need for size, stride, need in triples)

    def part(self, i: int) -> "Tensor":
        """Where an element of its first dimension is."""
        offset = self.offset + i * self.strides[0]
        return replace(self, offset=offset, shape=self.shape[1:], strides=self.strides[1:])


class Record:
    """Stands in for an object: keeps its fields, does nothing."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class Inert:
    """Stands in for what a trainer's state holds beside numbers: takes everything, is nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """Nothing happens."""
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Takes an element."""

    def extend(self, values: Any) -> None:
        """Takes elements."""

    add = append


class _OrderedDict(collections.OrderedDict):
    """Without attributes of its own: a pickle could put a number in the place of `items`."""

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> Tensor:
    name, dtype = storage
    tensor = Tensor(name, dtype, offset, tuple(shape), tuple(strides))
    numbers = (offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or any(
        type(n) is not int or n < 0 for n in numbers
    ):
        raise ValueError(f"no tensor has shape {shape!r}, strides {strides!r}, offset {offset!r}")
    return tensor


def _nothing(*args: Any) -> None:
    return None


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch.Size": tuple,
    "torch.serialization._get_layout": _nothing,
    "builtins.getattr": _nothing,  # how Python 3.11 pickles a member of an enum
    "builtins.set": set,
    f"{_METADATA}._MEM_FORMAT_ENCODING": _nothing,
    **{
        f"{_METADATA}.{name}": Record
        for name in (
            "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata"
            " TensorProperties MetadataIndex StorageMeta"
        ).split()
    },
    **{
        f"pathlib.{path}": Record  # where the checkpoint was written
        for path in ("PosixPath", "PurePosixPath", "_local.PosixPath", "_local.PurePosixPath")
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": Record,
    "olmo_core.distributed.checkpoint.filesystem._StorageInfo": Record,
    **{f"torch.{name}": np.dtype(dtype) for name, (_, dtype) in _DTYPES.items()},
    **{f"torch.{storage}": np.dtype(dtype) for storage, dtype in _DTYPES.values()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, lenient: bool):
        super().__init__(io.BytesIO(data))
        self._lenient = lenient

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}")
        if known is None and not self._lenient:
            raise _ForeignError(f"it asks for {module}.{name}, which is no part of a checkpoint")
        return Inert if known is None else known

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, name = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(name, str):
            raise _ForeignError(f"storage {reprlib.repr(pid)} is of an unknown kind")
        return name, dtype


class _ForeignError(ValueError):
    """A pickle that wants what a checkpoint has no need of."""


def unpickle(data: bytes, where: str, *, lenient: bool = False) -> Any:
    """The object of a pickle, with stand-ins for all that is not a plain value.

    Args:
      data: the pickle.
      where: the file, for errors.
      lenient: put `Inert` in place of unknown names instead of refusing them.
    Raises:
      ValueError: if it is no pickle, or asks for names that no checkpoint needs.
    """
    try:
        for opcode, number, _ in pickletools.genops(data):
            # The machine makes room for as many objects as the highest number says.
            if opcode.name.endswith("PUT") and int(number or 0) > len(data):
                raise ValueError(f"an object with the number {number}")
        return _Unpickler(data, lenient).load()
    except _ForeignError as error:
        raise ValueError(f"{where}: refused, not executed: {error}") from None
    except Exception as error:  # whatever damaged bytes make of the machine
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{where} is damaged: {text}") from None


# --- zips of torch.save ---------------------------------------------------------------------------


class Archive:
    """What one `torch.save` wrote: a file, or a stretch of a file."""

    def __init__(
        self,
        folder: SourceFolder,
        file: str,
        start: int = 0,
        stop: int | None = None,
        *,
        lenient: bool = False,
    ):
        """Read the directory and the pickle, no tensors.

        Args:
          folder: where the file is.
          file: its name.
          start: first byte of the zip in it.
          stop: its end; None: of the file.
          lenient: as for `unpickle`.
        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is damaged, or written by something else.
        """
        self._folder, self._file, self._start = folder, file, start
        self.where = f"{folder.name.rstrip('/')}/{file}"
        size = folder.size(file)
        stop = size if stop is None else stop
        if stop > size:
            raise ValueError(f"{self.where} is truncated: {size:,} bytes of at least {stop:,}")
        self._view = _View(folder, file, start, stop)
        try:
            with zipfile.ZipFile(self._view) as archive:  # type: ignore[arg-type]
                entries = archive.infolist()
                pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
                if len(pickles) != 1 or any(e.compress_type for e in entries):
                    raise zipfile.BadZipFile("not as torch.save writes it")
                data = archive.read(pickles[0])
        except OSError:
            raise
        except Exception as error:  # zipfile has no common base of what damaged bytes make of it
            raise ValueError(
                f"{self.where} is damaged, truncated, or older than torch 1.6: {error}"
            ) from None
        root = pickles[0].removesuffix("data.pkl") + "data/"
        self._entries = {
            e.filename.removeprefix(root): e for e in entries if e.filename.startswith(root)
        }
        self._begin = functools.lru_cache(maxsize=None)(self._find)
        self.tree: Any = unpickle(data, self.where, lenient=lenient)

    def read(self, tensor: Tensor, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor of `tree`, reading only those.

        Args:
          tensor: whose.
          rows: of its first dimension; ignored for a scalar.
        """
        itemsize, shape = tensor.dtype.itemsize, tensor.shape
        first, end = 0, 1
        if shape:
            first, end, _ = rows.indices(shape[0])
            shape = (end - first, *shape[1:])
        if not tensor.is_contiguous:
            at = tensor.offset + first * tensor.strides[0]
            spread = zip(shape, tensor.strides, strict=True)
            stop = at + sum((size - 1) * stride for size, stride in spread) + 1
            flat = self._bytes(tensor.storage, at * itemsize, stop * itemsize).view(tensor.dtype)
            strides = [stride * itemsize for stride in tensor.strides]
            return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)
        row = math.prod(shape[1:]) * itemsize
        at = tensor.offset * itemsize + first * row
        data = self._bytes(tensor.storage, at, at + (end - first) * row)
        return data.view(tensor.dtype).reshape(shape)

    def _bytes(self, storage: str, start: int, stop: int) -> np.ndarray:
        entry = self._entries.get(storage)
        if entry is None or stop > entry.file_size:
            raise ValueError(f"{self.where} is damaged: storage {storage} is missing or too short")
        begin = self._start + self._begin(storage)
        return self._folder.read(self._file, begin + start, begin + stop)

    def _find(self, storage: str) -> int:
        """Where in the zip the bytes of a storage begin: behind a header of its own."""
        at = self._entries[storage].header_offset
        header = self._view.at(at, 30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{self.where} is damaged: no header before storage {storage}")
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        return at + 30 + sum(lengths)


class _View:
    """A stretch of a file as a file, in blocks that are kept: few requests for many small reads."""

    def __init__(self, folder: SourceFolder, file: str, start: int, stop: int):
        self._size, self._at = stop - start, 0

        def block(i: int) -> bytes:
            end = min(start + (i + 1) * BLOCK_BYTES, stop)
            return folder.read(file, start + i * BLOCK_BYTES, end).tobytes()

        self._block = functools.lru_cache(maxsize=16)(block)

    def at(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer only at the end; safe among threads."""
        stop = min(start + size, self._size)
        first, skip = divmod(start, BLOCK_BYTES)
        blocks = [self._block(i) for i in range(first, -(-stop // BLOCK_BYTES))]
        return b"".join(blocks)[skip : skip + max(0, stop - start)]

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self.at(self._at, self._size if size < 0 else size)
        self._at += len(data)
        return data
