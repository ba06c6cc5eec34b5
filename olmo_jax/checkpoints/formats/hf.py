"""Hugging Face folders: `config.json` with safetensors (or torch's `.bin`), in and out."""

import functools
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from olmo_jax import files
from olmo_jax.checkpoints import names
from olmo_jax.checkpoints.formats import folders, hf_config, safetensors, stacked, torch_files
from olmo_jax.checkpoints.formats.folders import SourceFolder
from olmo_jax.checkpoints.formats.hub import CARRIED, TEMPLATES
from olmo_jax.checkpoints.formats.stacked import Stacked, is_same, narrowed
from olmo_jax.checkpoints.weights import Index, NoOptimizerError

CONFIG, GENERATION = "config.json", "generation_config.json"
# Single files and indices, in the order in which transformers takes the first that is there.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLACES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
# Tables that old versions of transformers saved; they follow from the config.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


class FoundTensor(NamedTuple):
    """A tensor in one of the files, or some rows of one."""

    file: str
    place: Any  # a safetensors.Entry, or a torch_files.Tensor
    read: Callable[[Any, slice], np.ndarray]
    first: int = 0
    n_rows: int | None = None  # None: all

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return self.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own, as it is read."""
        return self.place.shape if self.n_rows is None else (self.n_rows, *self.place.shape[1:])

    def load(self, rows: slice) -> np.ndarray:
        """Some of its rows; no more is read."""
        if self.shape:
            start, stop, _ = rows.indices(self.shape[0])
            rows = slice(self.first + start, self.first + stop)
        return self.read(self.place, rows)


# --- in -------------------------------------------------------------------------------------------


def recognises(src: str) -> bool:
    """Whether there is a folder as `save_pretrained` writes it."""
    folder = folders.open(src)
    if not folder.has(CONFIG):
        return False
    config = _json(folder, CONFIG)
    return "model_type" in config or "architectures" in config


def read(src: str, *, optimizer: bool = False) -> Stacked:
    """The folder at a path or an address.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if config, index and tensors do not fit together, or `optimizer` is asked for.
    """
    folder = folders.open(src)
    config = _json(folder, CONFIG)
    model = hf_config.read(config, f"{src.rstrip('/')}/{CONFIG}")
    architecture = f"{hf_config.family(config, CONFIG)}ForCausalLM"
    if optimizer:
        raise NoOptimizerError(f"{src}: a Hugging Face folder has no optimizer state")
    store = Tensors(folder, is_tied=model.tie_embeddings)
    weights = Stacked(model, is_remote=isinstance(folder, folders.Remote))
    rows = names.rows(model, "Hugging Face")
    weights.add("params/", store, rows, lambda key: key, store.shapes)
    n_files = len({tensor.file for tensor in store.tensors.values()})
    many = "s" * (n_files != 1)
    weights.line = (
        f"Hugging Face {architecture}, {len(store.tensors)} tensors in {n_files} file{many}"
    )
    if len(store.places) > 1:
        used, *unused = store.places
        weights.line += f" ({used}, as transformers; {', '.join(unused)} not used)"
    carried = [name for name in CARRIED if folder.has(name)]
    carried += [name for name in folder.inside(TEMPLATES) if name.endswith(".jinja")]
    weights.files = {name: folder.read(name).tobytes() for name in carried}
    weights.meta = {
        "token_ids": hf_config.token_ids(config),
        "dtype": stacked.dtype(weights.leaves),
    }
    return weights


class Tensors:
    """The tensors of a folder by key, as `Stacked` reads them."""

    def __init__(self, folder: SourceFolder, *, is_tied: bool):
        """Read the index and the headers.

        Args:
          folder: that they are in.
          is_tied: there is one table for both ends.
        Raises:
          ValueError: if a tensor is there twice, or the two tables of a tied model differ.
        """
        self.where = folder.name.rstrip("/")
        self.places = [place for place in PLACES if folder.has(place)]  # the first is used
        found = _tensors(folder, self.places)
        self.tensors: dict[str, FoundTensor] = {}
        for key, tensor in found.items():
            if DERIVED.fullmatch(key):
                continue
            parts = _one_by_one(key, tensor)
            if twice := self.tensors.keys() & parts.keys():
                raise ValueError(
                    f"{self.where}: {min(twice)} is there twice: alone, and among all experts"
                )
            self.tensors |= parts
        self.shapes = {key: (t.shape, t.dtype) for key, t in self.tensors.items()}
        if is_tied and HEAD in self.tensors:  # either table may be the one
            if EMBED in self.tensors and not is_same(self, EMBED, HEAD):
                raise ValueError(
                    f"{self.where}: tie_word_embeddings=true, but {HEAD} and {EMBED} differ"
                )
            self.tensors.setdefault(EMBED, self.tensors.pop(HEAD))
            self.shapes.setdefault(EMBED, self.shapes.pop(HEAD))

    def read(self, key: str, index: Index) -> np.ndarray:
        """A part of a tensor."""
        tensor = self.tensors[key]
        return narrowed(tensor.load, index, tensor.shape, tensor.dtype)


def _one_by_one(key: str, tensor: FoundTensor) -> dict[str, FoundTensor]:
    """A tensor of all experts, as transformers 5 has them in memory, as one for each of them."""
    match = FUSED.fullmatch(key)
    if match is None or len(tensor.shape) != 3:
        return {key: tensor}
    prefix, name = match.groups()
    n_experts, n_rows, _ = tensor.shape
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    size, rest = divmod(n_rows, len(parts))
    if rest:  # does not fit, which is said with all that does not
        return {key: tensor}
    return {
        f"{prefix}.{e}.{part}.weight": tensor._replace(
            place=tensor.place.part(e), first=i * size, n_rows=size
        )
        for e in range(n_experts)
        for i, part in enumerate(parts)
    }


def _json(folder: SourceFolder, file: str) -> dict[str, Any]:
    return files.json_object(folder.read(file).tobytes(), f"{folder.name.rstrip('/')}/{file}")


def _tensors(folder: SourceFolder, places: Sequence[str]) -> dict[str, FoundTensor]:
    """All tensors by key, from the one file or the shards that the index names."""
    where = folder.name.rstrip("/")
    if folder.has(ADAPTER):
        beside = places[0] if places else CONFIG
        raise ValueError(
            f"{where}: {ADAPTER} beside {beside}: transformers adds the adapter to the weights"
            " where PEFT is installed; merge it into them (merge_and_unload), or take it away"
        )
    if not places:
        raise FileNotFoundError(
            f"{where}: no weights beside {CONFIG}; need {SINGLE} or pytorch_model.bin, or their"
            " shards"
        )
    read = _of_shards if places[0].endswith(".json") else _of_file
    return read(folder, places[0])


def _of_shards(folder: SourceFolder, index: str) -> dict[str, FoundTensor]:
    where = folder.name.rstrip("/")
    weight_map = _json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{where}/{index} has no weight_map")
    for key, file in weight_map.items():
        if not files.is_inside(file):
            name = reprlib.repr(file)
            raise ValueError(
                f"{where}/{index}: {key} is in {name}, which is no file of this folder"
            )
    by_key: dict[str, FoundTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not folder.has(file):
            raise FileNotFoundError(f"{where}: {file}, which {index} names, is missing")
        tensors = _of_file(folder, file)
        if twice := by_key.keys() & tensors.keys():
            key = min(twice)
            raise ValueError(f"{where}: {key} is there twice: in {by_key[key].file} and in {file}")
        by_key |= tensors
    for key, file in weight_map.items():
        if key not in by_key or by_key[key].file != file:
            raise ValueError(f"{where}/{index} lists {key} in {file}, which is not there")
    for key in by_key.keys() - weight_map.keys():
        raise ValueError(f"{where}: {key} in {by_key[key].file} is not listed in {index}")
    return by_key


def _of_file(folder: SourceFolder, file: str) -> dict[str, FoundTensor]:
    if file.endswith(".safetensors"):
        return {
            key: FoundTensor(file, entry, functools.partial(safetensors.load, folder))
            for key, entry in safetensors.entries(folder, file).items()
        }
    archive = torch_files.Archive(folder, file)
    if not isinstance(archive.tree, dict) or not all(isinstance(key, str) for key in archive.tree):
        raise ValueError(f"{archive.where} holds no tensors by name")
    return {
        key: FoundTensor(file, t, archive.read)
        for key, t in archive.tree.items()
        if isinstance(t, torch_files.Tensor)
    }
