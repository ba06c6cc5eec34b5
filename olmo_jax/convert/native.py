"""olmo_jax's own checkpoints, as `train` and `tools/convert.py` write them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmo_jax import checkpoint, storage
from olmo_jax.config import ModelConfig, from_dict
from olmo_jax.convert.weights import Index, Weights, whole


def recognises(src: str) -> bool:
    """Whether this is a checkpoint, a run's folder, or what was to become one."""
    if re.match(r"https?://", src):
        return False
    folder = storage.path(src)
    if storage.is_complete(folder) or (folder / "checkpoints").exists():
        return True
    children = list(folder.iterdir()) if folder.is_dir() else []
    steps = [child for child in children if re.fullmatch(r"step\d+", child.name)]
    is_rest = bool(children) and storage.is_torn(folder)
    return is_rest or any(storage.is_complete(c) or storage.is_torn(c) for c in steps)


def read(src: str, *, optimizer: bool = False) -> "Native":
    """The checkpoint at a path, or the newest one of a run.

    Raises:
      ValueError: if it is incomplete or damaged, or has no optimizer state when that is asked for.
    """
    return Native(checkpoint.find(src, "SRC"), optimizer)


def token_ids(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a checkpoint says it has, or those of the data it was trained on.

    Args:
      meta: what it says beside its arrays.
    """
    eos = meta.get("config", {}).get("data", {}).get("eos_id")
    known = {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
    return meta.get("token_ids", known)


class Native(Weights):
    """`Weights` of a checkpoint of ours."""

    torch_layout = False

    def __init__(self, folder: storage.Path, optimizer: bool = False):
        """Read what it says about itself.

        Args:
          folder: a complete checkpoint.
          optimizer: take more than the parameters.
        """
        self._folder, meta = folder, storage.read_meta(folder)
        self.model = from_dict(meta["model"], ModelConfig, f"{folder}/meta.json: model")
        stored = storage.tree_of(folder)
        if optimizer and not any(name.startswith("opt_state/") for name in stored):
            raise ValueError(f"{folder} has no optimizer state; leave --optimizer")
        self.leaves = {
            name: leaf for name, leaf in stored.items() if optimizer or name.startswith("params/")
        }
        self.files = {name: storage.read(folder, name) for name in storage.files(folder)}
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
