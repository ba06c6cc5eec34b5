"""olmo_jax's own checkpoints, as `train` and `convert` write them."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmo_jax import files
from olmo_jax.checkpoints import checkpointer, layout, storage
from olmo_jax.checkpoints.formats import fields, resume
from olmo_jax.checkpoints.formats.fields import odd_ids
from olmo_jax.checkpoints.weights import Index, Leaves, NoOptimizerError, Weights, whole
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.parameters import table
from olmo_jax.config.renamed import modern
from olmo_jax.config.run import from_dict
from olmo_jax.data import foreign


def recognises(src: str) -> bool:
    """Whether this is a checkpoint, a run's folder, or what was to become one."""
    if re.match(r"https?://", src):
        return False
    folder = files.path(src)
    if layout.is_complete(folder):
        return not layout.is_by_orbax(folder)
    if (folder / "checkpoints").exists():
        return True
    children = list(folder.iterdir()) if folder.is_dir() else []
    steps = [child for child in children if re.fullmatch(r"step\d+", child.name)]
    is_rest = bool(children) and layout.is_torn(folder)
    return is_rest or any(layout.is_complete(c) or layout.is_torn(c) for c in steps)


def read(src: str, *, optimizer: bool = False) -> "Native":
    """The checkpoint at a path, or the newest one of a run.

    Raises:
      ValueError: if it is incomplete or damaged, or has no optimizer state when that is asked for.
    """
    return Native(find(src, "SRC"), optimizer)


def find(name: str, option: str = "config.checkpoint.load_path") -> files.Path:
    """The checkpoint at a path: itself, or the newest complete one of a run's folder.

    Args:
      name: local or `gs://`.
      option: what to call it in errors.
    Raises:
      ValueError: if there is none.
    """
    if not name.strip():
        raise ValueError(f"{option} is empty: name a checkpoint or a run's folder, or none")
    folder = files.path(name)
    if not folder.exists():
        raise ValueError(f"{option}: {name} does not exist")
    if layout.is_complete(folder):
        return folder
    others: dict[str, list[str]] = {"incomplete": [], "not written by olmo_jax": []}
    for parent in (folder / "checkpoints", folder):
        children = sorted(checkpointer.children(parent))
        complete = [step for step, child in children if layout.is_complete(child)]
        if complete:
            return parent / f"step{max(complete)}"
        for _, child in children:
            is_ours = layout.is_torn(child)
            others["incomplete" if is_ours else "not written by olmo_jax"].append(child.name)
    rest = [
        f"; {', '.join(names)} {'is' if len(names) == 1 else 'are'} {words}"
        for words, names in others.items()
        if names
    ]
    what = foreign.describe(folder)
    rest = [f"; it is {what}"] if what else rest
    raise ValueError(f"{option}: no complete checkpoint in {name}{''.join(rest)}")


def token_ids(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a checkpoint says it has, or those of the data it was trained on.

    Args:
      meta: what it says beside its arrays.
    """
    eos = fields.find(meta, "config", "data", "eos_id")
    known = {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
    return meta.get("token_ids", known)


class Native(Weights):
    """`Weights` of a checkpoint of ours."""

    torch_layout = False

    def __init__(self, folder: files.Path, optimizer: bool = False):
        """Read what it says about itself.

        Args:
          folder: a complete checkpoint.
          optimizer: take more than the parameters.
        """
        self._folder, meta = folder, _meta(folder)
        stored = layout.tree_of(folder)
        self.model = checked_model(meta.get("model"), stored, f"{folder}/meta.json")
        if optimizer and not any(name.startswith("opt_state/") for name in stored):
            raise NoOptimizerError(f"{folder} has no optimizer state")
        self.leaves = {
            name: leaf for name, leaf in stored.items() if optimizer or name.startswith("params/")
        }
        self.files = {name: layout.read(folder, name) for name in layout.files(folder)}
        self.meta = {"token_ids": token_ids(meta)}
        self.meta |= {"dtype": meta["dtype"]} if "dtype" in meta else {}
        if optimizer:
            keep = ("step", "position", "config", "fingerprint")
            self.meta |= {key: meta[key] for key in keep if key in meta}
        step = f" after step {meta['step']:,}" if "step" in meta else ""
        self.line = f"olmo_jax checkpoint{step}, {len(self.leaves)} arrays ({folder.name})"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it."""
        index = whole(self.leaves[name].shape, index)
        return storage.read_part(self._folder, name, index)

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """The same, by who passes once through all of it."""
        index = whole(self.leaves[name].shape, index)
        return storage.read_part(self._folder, name, index, once=True)


def _meta(folder: files.Path) -> dict[str, Any]:
    """What the checkpoint says of itself, after a look at it."""
    meta = layout.read_meta(folder)
    check_said(meta, f"{folder}/meta.json")
    return meta


def check_said(meta: Mapping[str, Any], where: str) -> None:
    """Refuse what no checkpoint says of itself (ValueError); `where` is the file that says it."""
    for key in ("token_ids", "config"):
        if not isinstance(meta.get(key, {}), dict):
            raise ValueError(f"{where}: {key} is {reprlib.repr(meta[key])}, need a group of values")
    if odd := odd_ids(meta.get("token_ids", {})):
        raise ValueError(f"{where}: {'; '.join(odd)}")
    if meta.get("dtype", "float32") not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"{where}: dtype is {reprlib.repr(meta['dtype'])}, need one of floats")
    resume.whole(meta.get("step", 0), "step", where)


def checked_model(values: Any, stored: Leaves, where: str) -> ModelConfig:
    """The model that `values` describe, after a look whether the `stored` arrays are that model's.

    Raises:
      ValueError: if not; `where` is the file that has the values.
    """
    try:
        model = from_dict(modern({"model": values})["model"], ModelConfig, "model")
    except ConfigError as error:
        raise ValueError(f"{where}: {'; '.join(error.problems)}") from None
    n_kinds = len(model.layer_types)
    if not n_kinds or model.n_layers % n_kinds:
        raise ValueError(f"{where}: {n_kinds} layer_types for {model.n_layers} layers")
    for path, row in table(model).items():
        found = stored.get(f"params/{path}")
        if found is None or found.shape != row.shape:
            shape = "not there" if found is None else list(found.shape)
            raise ValueError(
                f"{where}: its model has params/{path} {list(row.shape)}; it is {shape}"
            )
    return model
