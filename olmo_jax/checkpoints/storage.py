"""Arrays on disk: one checkpoint is one folder, which plain Orbax restores too.

    step10/
      commit_begun.txt                 written first, gone at the end: whose half a folder is
      params.embed/zarr.json, c/0/0 …  one zarr3 array per leaf, a checksum behind every chunk
      _METADATA                        Orbax's list of the leaves, with shapes and dtypes
      meta.json                        what the caller adds: config, position in the data, …
      tokenizer.json                   and other files that were asked for, in folders too
      commit_success.txt               written last: a folder without it is no checkpoint

Each chunk belongs to one device's shard and lies within one layer, so every file has one writer,
layers can be converted one at a time, and any mesh reads only what it needs. Chunks are not
compressed: random mantissas gain 7 %. The checksum is of a chunk's bytes, not of its place: that
somebody exchanged two files by hand is not noticed; that would take a list of all chunks, to which
all processes write. Orbax's own writer cannot put a checksum on values and holds whole leaves in
memory; its layout is kept, its code is needed only by the tests that restore it.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from olmo_jax.files import Path, is_inside, json_object

CHUNK_BYTES = 64 << 20  # largest chunk
IN_FLIGHT_BYTES = 128 << 20  # given to TensorStore and not yet on disk
MARKER = "commit_success.txt"
BEGUN = "commit_begun.txt"  # without MARKER: half of a checkpoint, being written or deleted
BEGUN_TEXT = "olmo_jax began to write this checkpoint, or to delete it, and will clear it away.\n"
FORMAT = 1

# What checkpoints of runs hold; TensorStore writes each file under another name first.
_NEW = r"(_\w+\.__lock)?"
LEAF = re.compile(r"step|(params|opt_state)\..+")
SMALL_FILE = re.compile(rf"(meta\.json|_METADATA|tokenizer(\.\w+)?|commit_success\.txt){_NEW}")
IN_LEAF = re.compile(rf"(c|zarr\.json){_NEW}")
Leaves = dict[str, jax.ShapeDtypeStruct]  # by name


def names(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, such as `params/layers/attn/wq`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


# --- reading --------------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether the folder is a checkpoint whose save came to its end."""
    return (folder / MARKER).exists()


def is_link(folder: Path) -> bool:
    """Whether it is a link to somewhere else, whatever is there."""
    return os.path.islink(os.fspath(folder))


def is_torn(folder: Path) -> bool:
    """Whether the folder is what an interrupted save or deletion of ours left, and nothing else.

    Either it is marked so, or (older versions did not) it holds nothing but names of our layout.
    """
    if is_complete(folder) or is_link(folder) or not folder.is_dir():
        return False
    try:
        names = _listing(folder)
        if not names or _is_marked(folder, names):
            return True
        leaves = [name for name in names if LEAF.fullmatch(name) and (folder / name).is_dir()]
        inside = [name for leaf in leaves for name in _listing(folder / leaf)]
    except PermissionError:
        return False
    rest = set(names) - set(leaves)
    return (
        bool(leaves)
        and all(map(SMALL_FILE.fullmatch, rest))
        and all(map(IN_LEAF.fullmatch, inside))
    )


def _is_marked(folder: Path, names: list[str]) -> bool:
    if BEGUN not in names:
        return any(re.fullmatch(BEGUN + _NEW, name) for name in names)
    mark = (folder / BEGUN).read_bytes() if (folder / BEGUN).is_file() else b""
    return mark == BEGUN_TEXT.encode() or b'"sha256"' in mark  # a deletion renames MARKER


def _listing(folder: Path) -> list[str]:
    """The names in a folder: all, where `iterdir` leaves out those that end with `~`."""
    name = os.fspath(folder)
    return [child.name for child in folder.iterdir()] if "://" in name else os.listdir(name)


def kind(folder: Path) -> str:
    """The kind that the checkpoint was saved as."""
    return _marker(folder)["kind"]


def is_confirmed(folder: Path) -> bool:
    """Whether the checkpoint has been found good by who trained on from it."""
    return _marker(folder).get("confirmed", False)


def read(folder: Path, name: str) -> bytes:
    """A small file of a checkpoint, after a look at its digest.

    Raises:
      FileNotFoundError: if the checkpoint is incomplete or has no such file.
      ValueError: if the file is not what was written.
    """
    digests = _marker(folder)["sha256"]
    if name not in digests:
        raise FileNotFoundError(f"{folder}: this checkpoint has no {name}")
    if not (folder / name).exists():
        raise ValueError(f"{folder / name} is missing: the checkpoint is damaged")
    data = (folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != digests[name]:
        raise ValueError(f"{folder / name} is damaged: it is not what was saved")
    return data


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta` that was saved with the arrays."""
    return json_object(read(folder, "meta.json"), f"{folder / 'meta.json'}")


def tree_of(folder: Path) -> Leaves:
    """Shapes and dtypes of all leaves by name, without reading them."""
    where = folder / "_METADATA"
    metadata = json_object(read(folder, "_METADATA"), str(where))
    try:
        stored = metadata["custom_metadata"]["leaves"]
        return {name: _leaf(name, *entry) for name, entry in stored.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {error}") from None


def _leaf(name: str, shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    if not is_inside(name) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name!r} has shape {shape!r}")
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def restore(
    folder: Path,
    abstract: Any,
    *,
    partial: bool = False,
    cast: bool = False,
    new: Sequence[str] = (),
) -> Any:
    """Read a checkpoint onto the shardings of `abstract`; each process reads only its own part.

    Args:
      folder: a complete checkpoint.
      abstract: a tree of `jax.ShapeDtypeStruct`; leaves without a sharding become NumPy arrays.
      partial: leave unread the top-level parts (`opt_state`, …) that `abstract` does not have.
      cast: convert to the dtypes of `abstract`; otherwise another dtype is refused.
      new: ends of the names of leaves that the checkpoint has not: they become 0.
    Returns: the tree of `abstract`, filled.
    Raises:
      FileNotFoundError: if the folder is no complete checkpoint.
      ValueError: if the trees differ, with every leaf that does; or if a leaf is damaged.
    """
    stored, wanted = tree_of(folder), names(abstract)
    if partial:
        parts = {name.split("/")[0] for name in wanted}
        stored = {name: leaf for name, leaf in stored.items() if name.split("/")[0] in parts}
    known = {name: leaf for name, leaf in wanted.items() if not name.endswith(tuple(new))}
    problems = _differences(stored, known, cast)
    if problems:
        raise ValueError(f"{folder} does not fit: " + "; ".join(problems))
    filled = [
        _read_leaf(folder, name, stored[name], leaf)
        if name in known
        else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def read_part(
    folder: Path, name: str, index: tuple[slice, ...], *, once: bool = False
) -> np.ndarray:
    """A part of a leaf; reads the chunks that it lies in.

    Args:
      folder: a complete checkpoint.
      name: of the leaf.
      index: a slice for each of its dimensions.
      once: its chunks leave the page cache, since nobody asks for them again.
    Raises:
      ValueError: if the leaf is damaged.
    """
    try:
        part = ts.open(_spec(folder, name), open=True, read=True).result()[index]
        out = np.empty(part.shape, part.dtype.numpy_dtype)
        ts.array(out).write(part).result()
        if once:
            _release(part)
        return out
    except ValueError as error:
        raise ValueError(f"{folder}: leaf {name} is damaged: {cause(error)}") from None


def files(folder: Path) -> list[str]:
    """Names of the files that were kept beside the arrays, such as `folder/file`.

    Raises:
      ValueError: if one would lie outside of the checkpoint, or of where it is copied to.
    """
    found = [name for name in _marker(folder)["sha256"] if name not in ("meta.json", "_METADATA")]
    _refuse_outside(folder, found)
    return found


def _refuse_outside(folder: Path, files: Iterable[str]) -> None:
    for name in files:
        if not is_inside(name):
            raise ValueError(f"{folder}: {name!r} is no name of a file in a checkpoint")


def _marker(folder: Path) -> dict[str, Any]:
    if not is_complete(folder):
        raise FileNotFoundError(f"{folder}: no complete checkpoint here ({MARKER} is missing)")
    try:
        marker = json_object((folder / MARKER).read_bytes(), MARKER)
    except ValueError:
        marker = {}
    match marker:
        case {"format": int(), "kind": str(), "sha256": dict(digests)} if all(
            isinstance(digest, str) for digest in digests.values()
        ):
            pass
        case _:
            raise ValueError(f"{folder / MARKER} is damaged, or not written by olmo_jax")
    if marker["format"] > FORMAT:
        raise ValueError(f"{folder}: format {marker['format']}; this version reads up to {FORMAT}")
    return marker


def _differences(stored: Leaves, wanted: Mapping[str, Any], cast: bool) -> list[str]:
    problems = [f"missing leaf {name}" for name in wanted if name not in stored]
    problems += [f"extra leaf {name}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        found, need = stored[name], wanted[name]
        if found.shape != tuple(need.shape):
            problems.append(f"{name} has shape {found.shape}, need {tuple(need.shape)}")
        if found.dtype != need.dtype and not cast:
            problems.append(f"{name} is {found.dtype}, need {need.dtype}")
    return problems


def _read_leaf(
    folder: Path, name: str, stored: jax.ShapeDtypeStruct, leaf: Any
) -> jax.Array | np.ndarray:
    blocks: dict[Any, np.ndarray] = {}  # replicas on this process share one read

    def block(index: Any) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in blocks:
            blocks[key] = np.asarray(array[index].read().result()).astype(leaf.dtype, copy=False)
        return blocks[key]

    try:
        array = ts.open(_spec(folder, name), open=True, read=True).result()
        if array.shape != stored.shape or array.dtype.numpy_dtype != stored.dtype:
            raise ValueError(f"{array.shape} {array.dtype.name} is not what was saved")
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return block((slice(None),) * len(stored.shape))
        return jax.make_array_from_callback(stored.shape, sharding, block, dtype=leaf.dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: leaf {name} is damaged: {cause(error)}") from None


# --- writing --------------------------------------------------------------------------------------


def chunk_shape(name: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The chunk of a leaf: within one shard, one layer and CHUNK_BYTES, dividing the shard evenly.

    Args:
      name: of the leaf; under `layers/` its first dimension counts layers.
      leaf: its shape, dtype and, where it has one, sharding.
    """
    sharding = getattr(leaf, "sharding", None)
    chunk = list(sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape)
    if chunk and "layers" in name.split("/"):
        chunk[0] = 1
    for axis, size in enumerate(chunk):
        rest = math.prod(chunk) // max(size, 1) * leaf.dtype.itemsize
        fits = (n for n in range(size, 1, -1) if size % n == 0 and n * rest <= CHUNK_BYTES)
        chunk[axis] = next(fits, 1)
    return tuple(chunk)


class Writer:
    """Writes one checkpoint, slice by slice: what is held in memory is what is under way.

    ```
    writer = Writer(path(DST), leaves)
    for layer in range(n_layers):
        writer.write("params/layers/attn/wq", (layer, 0, 0, 0), block)  # [1, d_model, …]
    writer.commit(meta)
    ```
    """

    def __init__(self, folder: Path, leaves: Leaves, *, create: bool = True):
        """Lay out the arrays.

        Args:
          folder: new or empty.
          leaves: shape and dtype of each leaf by name; chunks follow a sharding if it has one.
          create: False opens what another process has laid out.
        Raises:
          FileExistsError: if there is something in the folder, or it is none.
        """
        self.folder = folder
        self._leaves = leaves
        if create:
            is_empty = not folder.exists() or (folder.is_dir() and not _listing(folder))
            if is_link(folder) or not is_empty:
                raise FileExistsError(f"{folder} is there already and is not overwritten")
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, BEGUN, BEGUN_TEXT.encode())
        opening = {
            name: ts.open(_spec(folder, name, leaf), create=create, open=not create)
            for name, leaf in leaves.items()
        }
        self._arrays = {name: future.result() for name, future in opening.items()}
        self._pending: collections.deque[tuple[Any, int, Any]] = collections.deque()
        self._bytes = 0

    def write(self, name: str, start: Sequence[int], block: np.ndarray) -> None:
        """Write a part of a leaf: whole chunks, each once; `block` must stay as it is.

        Args:
          name: of the leaf.
          start: index of the part's first element.
          block: its values, of the leaf's dtype.
        """
        need = self._leaves[name].dtype
        if block.dtype != need:
            raise ValueError(f"{self.folder}: {name} is {need}, found {block.dtype}")
        index = tuple(slice(i, i + n) for i, n in zip(start, block.shape, strict=True))
        part = self._arrays[name][index]
        future = part.write(block, can_reference_source_data_indefinitely=True)
        self._pending.append((future, block.nbytes, part))
        self._bytes += block.nbytes
        while self._bytes > IN_FLIGHT_BYTES:
            self._wait_for_one()

    def wait(self) -> None:
        """Wait until all that was given is on disk."""
        while self._pending:
            self._wait_for_one()

    def abandon(self) -> None:
        """Wait until nothing is under way, whatever came of it: the folder can be deleted then.

        TensorStore would go on otherwise, and make again what was deleted.
        """
        while self._pending:
            self._pending[0][0].exception()
            self._pending.popleft()

    def _wait_for_one(self) -> None:
        future, n_bytes, part = self._pending[0]
        future.result()
        self._pending.popleft()
        self._bytes -= n_bytes
        _release(part)

    def commit(
        self,
        meta: Mapping[str, Any],
        *,
        kind: str = "permanent",
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Make the folder a checkpoint, after everything was written.

        Args:
          meta: what JSON can hold.
          kind: kept for the one who decides what to delete.
          files: what to keep beside the arrays, by file name, which may be `folder/file`.
        Raises:
          ValueError: if a file would lie outside of the checkpoint.
        """
        _refuse_outside(self.folder, files or ())
        self.wait()
        texts = dict(files or {})
        texts["meta.json"] = json.dumps(meta, indent=1).encode()
        texts["_METADATA"] = json.dumps(_orbax_metadata(self._leaves)).encode()
        for name, data in texts.items():
            _write(self.folder, name, data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
        _write_marker(self.folder, {"format": FORMAT, "kind": kind, "sha256": digests})
        with contextlib.suppress(OSError):  # beside MARKER it says nothing
            (self.folder / BEGUN).unlink()


def release(number: int, start: int = 0, n_bytes: int = 0) -> None:
    """Let what an open file has on disk leave the page cache; 0 bytes: all to the end.

    Who passes through files larger than memory finds room in what they leave, instead of the
    memory of others.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(number, start, n_bytes, os.POSIX_FADV_DONTNEED)


def _release(part: ts.TensorStore) -> None:
    """Release the files of a part of a leaf, if they are files."""
    store: Any = part.kvstore
    if store.spec().to_json()["driver"] != "file":
        return
    chunk: Any = part.chunk_layout.read_chunk.shape or ()  # None: a scalar
    each = zip(part.domain.index_exp, chunk, strict=True)
    numbers = [range(along.start // n, -(-along.stop // n)) for along, n in each]
    for at in itertools.product(*numbers):
        with open("/".join([f"{store.path}c", *map(str, at)]), "rb") as file:
            release(file.fileno())


def mark(folder: Path, **changes: str | bool) -> None:
    """Change what a complete checkpoint says of itself: its `kind`, or that it is `confirmed`."""
    _write_marker(folder, {**_marker(folder), **changes})


def remove(folder: Path) -> None:
    """Delete a checkpoint, complete or not; no half of it counts as one, and each `is_torn`."""
    if not folder.exists():
        return
    if is_complete(folder):
        (folder / MARKER).replace(folder / BEGUN)  # takes no space, where a disk is full
    children = [folder / name for name in _listing(folder) if name != BEGUN]
    is_folder = {child: child.is_dir() and not is_link(child) for child in children}
    for child in sorted(children, key=is_folder.__getitem__):  # arrays alone are known as ours
        child.rmtree() if is_folder[child] else child.unlink()
    folder.rmtree()


# --- Orbax's layout -------------------------------------------------------------------------------


def _kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's description of a folder."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, prefix = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    # Each file has one writer, so no locks, which some cluster file systems refuse.
    return {"driver": "file", "path": f"{text}/", "file_io_locking": {"mode": "none"}}


def _spec(folder: Path, name: str, leaf: jax.ShapeDtypeStruct | None = None) -> dict[str, Any]:
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(folder / name.replace("/", ".")),
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,  # a lost chunk is an error, not zeros
    }
    if leaf is not None:
        grid = {"chunk_shape": chunk_shape(name, leaf)}
        spec["metadata"] = {
            "shape": leaf.shape,
            "data_type": leaf.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        }
    return spec


def _orbax_metadata(leaves: Leaves) -> dict[str, Any]:
    """Orbax's `_METADATA`; `np.ndarray` lets it restore without the mesh of the writer."""
    tree = {}
    for name, leaf in leaves.items():
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": k, "key_type": 1 if k.isdigit() else 2} for k in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": chunk_shape(name, leaf),
            },
        }
    ours = {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()}
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": {"leaves": ours},
    }


def _write(folder: Path, name: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, and survives a power cut."""
    ts.KvStore.open(_kvstore(folder)).result().write(name, data).result()


def _write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    _write(folder, MARKER, json.dumps(marker).encode())


def cause(error: BaseException) -> str:
    """One line, without TensorStore's description of itself."""
    text = str(error) or type(error).__name__
    return text.split(" [tensorstore_spec=")[0].splitlines()[0]
