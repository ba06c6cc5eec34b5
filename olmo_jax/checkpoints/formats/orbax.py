"""Trees of our names that plain Orbax wrote: a checkpoint that went through somebody's own code.

`StandardCheckpointer`, `PyTreeCheckpointer` and an item of a `CheckpointManager`, as OCDBT or not,
zarr 2 or 3; `{"params": …}` with or without the optimizer's state and the step, or the parameters
alone. Orbax itself reads it, a leaf at a time. It keeps no options: the model's stand in a
`meta.json` or `config.json` beside it, or in the folder of the run that it lies in.
"""

import collections
import contextlib
import logging
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats import native
from olmo_jax.checkpoints.weights import Index, Leaves, NoOptimizerError, Weights, whole
from olmo_jax.files import json_object

METADATA = "_METADATA"
FLOORS = 4  # from an item of a CheckpointManager up to the folder of its run
KEPT = 2  # leaves in memory, of which parts are read


def recognises(src: str) -> bool:
    """Whether Orbax wrote it; ours, which Orbax reads too, are asked for before."""
    return "://" not in src and _item(pathlib.Path(src)) is not None


def read(src: str, *, optimizer: bool = False) -> "Orbax":
    """The checkpoint in a folder.

    Raises:
      ValueError: if Orbax cannot read it, its tree is not that of a model, no file beside it says
        which model it is, or it has no optimizer state when that is asked for.
    """
    return Orbax(pathlib.Path(src).absolute(), optimizer)  # Orbax takes no other path


class Orbax(Weights):
    """`Weights` of a tree that Orbax wrote."""

    torch_layout = False

    def __init__(self, src: pathlib.Path, optimizer: bool):
        """Read the list of its leaves."""
        folder = _item(src)
        assert folder is not None  # it was recognised
        self._folder, self._lock = folder, threading.Lock()
        self._leaves: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._paths, stored = _stored(folder)
        if optimizer and not any(name.startswith("opt_state/") for name in stored):
            raise NoOptimizerError(f"{src} has no optimizer state")
        said, where = _said(folder)
        native.check_said(said, where)
        self.model = native.checked_model(said.get("model"), stored, where)
        self.leaves = {
            name: leaf for name, leaf in stored.items() if optimizer or name.startswith("params/")
        }
        self.files = {}
        self.meta = {"token_ids": native.token_ids(said)}
        if optimizer:
            keep = ("step", "position", "config", "fingerprint")
            self.meta |= {key: said[key] for key in keep if key in said}
        self.line = f"Orbax checkpoint, {len(self.leaves)} arrays ({folder.name}), model of {where}"

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it; the whole leaf is read once, and kept until others come."""
        with self._lock:
            if name not in self._leaves:
                while len(self._leaves) >= KEPT:
                    self._leaves.popitem(last=False)
                self._leaves[name] = _restore(self._folder, self._paths[name])
            return self._leaves[name][whole(self.leaves[name].shape, index)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it raises, with tracebacks, and warns of what is right."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _item(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder itself, or the one item of a `CheckpointManager`'s step that is a tree."""
    if (folder / METADATA).is_file():
        return folder
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    items = [child for child in children if (child / METADATA).is_file()]
    return items[0] if len(items) == 1 and (folder / "_CHECKPOINT_METADATA").is_file() else None


def _stored(folder: pathlib.Path) -> tuple[dict[str, tuple[str, ...]], Leaves]:
    """The keys of each leaf by our name for it, and its shape and dtype."""
    import orbax.checkpoint as ocp  # takes seconds

    try:
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            found: Any = checkpointer.metadata(folder).item_metadata
    except Exception as error:  # Orbax has no kinds of errors; each says that it cannot be read
        raise ValueError(f"{folder}: Orbax cannot read it: {storage.cause(error)}") from error
    if found is None:  # it has only logged why
        raise ValueError(f"{folder}: Orbax cannot read its {METADATA}")
    paths, leaves = {}, {}
    for keys, leaf in _leaves_of(found.tree):
        name = "/".join(keys)
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or any("/" in key for key in keys):
            raise ValueError(f"{folder}: {name} is no array of a model")
        ours = name if {"params", "opt_state"} & {*keys[:1]} or name == "step" else f"params/{name}"
        ours = ours.replace("params/params/", "params/")
        kinds = (jnp.floating,) if ours.startswith("params/") else (jnp.floating, jnp.integer)
        if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise ValueError(f"{folder}: {name} is {dtype}, which is none of a model's")
        if ours in paths:
            raise ValueError(f"{folder}: {name} is there twice, also as {'/'.join(paths[ours])}")
        paths[ours], leaves[ours] = keys, jax.ShapeDtypeStruct(tuple(shape), dtype)
    return paths, leaves


def _leaves_of(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of nested groups, whatever they are, with their keys."""
    if not isinstance(tree, Mapping):
        yield keys, tree
        return
    for key, value in tree.items():
        yield from _leaves_of(value, (*keys, str(key)))


def _restore(folder: pathlib.Path, keys: tuple[str, ...]) -> np.ndarray:
    """One leaf, in the memory of the host."""
    import orbax.checkpoint as ocp

    item: Any = 0
    arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
        item, arguments = {key: item}, {key: arguments}
    try:
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            options = ocp.args.PyTreeRestore(item, arguments, partial_restore=True)
            found = checkpointer.restore(folder, args=options)
    except Exception as error:
        name, why = "/".join(keys), storage.cause(error)
        raise ValueError(f"{folder}: Orbax cannot read {name}: {why}") from error
    for key in keys:
        found = found[key]
    return np.asarray(found)


def _said(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """What a file beside the tree says of it, and which file: of ours, the nearest one."""
    absolute = folder.absolute()
    for place in (absolute, *absolute.parents[: FLOORS - 1]):
        for path in (place / "meta.json", place / "config.json"):
            if path.is_file():
                found = json_object(path.read_bytes(), str(path))
                if isinstance(found.get("model"), dict):
                    is_config = "optim" in found
                    return ({"model": found["model"], "config": found} if is_config else found,
                            str(path))  # fmt: skip
    raise ValueError(
        f"{folder} is a tree that Orbax wrote, which does not say what model it is; put the"
        " config.json of its run beside it"
    )
