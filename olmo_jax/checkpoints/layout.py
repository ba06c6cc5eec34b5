"""What a checkpoint is on disk: one folder, which plain Orbax restores too.

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
memory; its layout is kept.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import tensorstore as ts

from olmo_jax.files import Path, is_inside, json_object

CHUNK_BYTES = 64 << 20  # largest chunk
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


def is_complete(folder: Path) -> bool:
    """Whether the folder is a checkpoint whose save came to its end."""
    return (folder / MARKER).exists()


def is_by_orbax(folder: Path) -> bool:
    """Whether it is Orbax's own code that says that it has written the folder, not ours."""
    path = folder / MARKER
    return path.is_file() and path.read_bytes().startswith(b"Checkpoint commit was successful")


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
        names = listing(folder)
        if not names or _is_marked(folder, names):
            return True
        leaves = [name for name in names if LEAF.fullmatch(name) and (folder / name).is_dir()]
        inside = [name for leaf in leaves for name in listing(folder / leaf)]
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


def listing(folder: Path) -> list[str]:
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


def files(folder: Path) -> list[str]:
    """Names of the files that were kept beside the arrays, such as `folder/file`.

    Raises:
      ValueError: if one would lie outside of the checkpoint, or of where it is copied to.
    """
    found = [name for name in _marker(folder)["sha256"] if name not in ("meta.json", "_METADATA")]
    refuse_outside(folder, found)
    return found


def refuse_outside(folder: Path, files: Iterable[str]) -> None:
    """Refuse names of files that would lie outside of a checkpoint (ValueError)."""
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


def mark(folder: Path, **changes: str | bool) -> None:
    """Change what a complete checkpoint says of itself: its `kind`, or that it is `confirmed`."""
    write_marker(folder, {**_marker(folder), **changes})


def remove(folder: Path) -> None:
    """Delete a checkpoint, complete or not; no half of it counts as one, and each `is_torn`."""
    if not folder.exists():
        return
    if is_complete(folder):
        (folder / MARKER).replace(folder / BEGUN)  # takes no space, where a disk is full
    children = [folder / name for name in listing(folder) if name != BEGUN]
    is_folder = {child: child.is_dir() and not is_link(child) for child in children}
    for child in sorted(children, key=is_folder.__getitem__):  # arrays alone are known as ours
        child.rmtree() if is_folder[child] else child.unlink()
    folder.rmtree()


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


def _kvstore(folder: Path) -> dict[str, Any]:
    """TensorStore's description of a folder."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, prefix = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    # Each file has one writer, so no locks, which some cluster file systems refuse.
    return {"driver": "file", "path": f"{text}/", "file_io_locking": {"mode": "none"}}


def spec(folder: Path, name: str, leaf: jax.ShapeDtypeStruct | None = None) -> dict[str, Any]:
    """TensorStore's description of a leaf; with its shape and dtype to lay it out."""
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


def orbax_metadata(leaves: Leaves) -> dict[str, Any]:
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


def write_file(folder: Path, name: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, and survives a power cut."""
    ts.KvStore.open(_kvstore(folder)).result().write(name, data).result()


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write what makes the folder a checkpoint."""
    write_file(folder, MARKER, json.dumps(marker).encode())
