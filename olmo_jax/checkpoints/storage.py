"""Arrays on disk, written slice by slice and read onto any mesh; `layout` says what lies where."""

import collections
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from olmo_jax.checkpoints import layout
from olmo_jax.checkpoints.arrays import on_devices
from olmo_jax.files import Path

IN_FLIGHT_BYTES = 128 << 20  # given to TensorStore and not yet on disk


def names(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, such as `params/layers/attn/wq`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


# --- reading --------------------------------------------------------------------------------------


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
    stored, wanted = layout.tree_of(folder), names(abstract)
    if partial:
        parts = {name.split("/")[0] for name in wanted}
        stored = {name: leaf for name, leaf in stored.items() if name.split("/")[0] in parts}
    known = {name: leaf for name, leaf in wanted.items() if not name.endswith(tuple(new))}
    problems = differences(stored, known, cast)
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
        part = ts.open(layout.spec(folder, name), open=True, read=True).result()[index]
        out = np.empty(part.shape, part.dtype.numpy_dtype)
        ts.array(out).write(part).result()
        if once:
            _release(part)
        return out
    except ValueError as error:
        raise ValueError(f"{folder}: leaf {name} is damaged: {cause(error)}") from None


def differences(stored: layout.Leaves, wanted: Mapping[str, Any], cast: bool) -> list[str]:
    """A line for each leaf that is not as wanted, in its shape and, unless `cast`, its dtype."""
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
    try:
        array = ts.open(layout.spec(folder, name), open=True, read=True).result()
        if array.shape != stored.shape or array.dtype.numpy_dtype != stored.dtype:
            raise ValueError(f"{array.shape} {array.dtype.name} is not what was saved")
        return on_devices(leaf, lambda index: np.asarray(array[index].read().result()))
    except ValueError as error:
        raise ValueError(f"{folder}: leaf {name} is damaged: {cause(error)}") from None


# --- writing --------------------------------------------------------------------------------------


class ArrayWriter:
    """Writes one checkpoint, slice by slice: what is held in memory is what is under way.

    ```
    writer = ArrayWriter(path(DST), leaves)
    for layer in range(n_layers):
        writer.write("params/layers/attn/wq", (layer, 0, 0, 0), block)  # [1, d_model, …]
    writer.commit(meta)
    ```
    """

    def __init__(self, folder: Path, leaves: layout.Leaves, *, create: bool = True):
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
            is_empty = not folder.exists() or (folder.is_dir() and not layout.listing(folder))
            if layout.is_link(folder) or not is_empty:
                raise FileExistsError(f"{folder} is there already and is not overwritten")
            folder.mkdir(parents=True, exist_ok=True)
            layout.write_file(folder, layout.BEGUN, layout.BEGUN_TEXT.encode())
        opening = {
            name: ts.open(layout.spec(folder, name, leaf), create=create, open=not create)
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
        layout.refuse_outside(self.folder, files or ())
        self.wait()
        texts = dict(files or {})
        texts["meta.json"] = json.dumps(meta, indent=1).encode()
        texts["_METADATA"] = json.dumps(layout.orbax_metadata(self._leaves)).encode()
        for name, data in texts.items():
            layout.write_file(self.folder, name, data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
        layout.write_marker(self.folder, {"format": layout.FORMAT, "kind": kind, "sha256": digests})
        with contextlib.suppress(OSError):  # beside the marker it says nothing
            (self.folder / layout.BEGUN).unlink()


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


def cause(error: BaseException) -> str:
    """One line, without TensorStore's description of itself."""
    text = str(error) or type(error).__name__
    return text.split(" [tensorstore_spec=")[0].splitlines()[0]
