"""Hugging Face folders: `config.json` with safetensors (or torch's `.bin`), in and out."""

import functools
import itertools
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from olmo_jax import parsing
from olmo_jax.convert import compare, folders, hf_config, names, resume, safetensors, torch_files
from olmo_jax.convert.folders import Folder
from olmo_jax.convert.names import Row
from olmo_jax.convert.stacked import Stacked, is_same, narrowed
from olmo_jax.convert.weights import Index, Weights, ahead, parts, pieces, size

CONFIG, GENERATION = "config.json", "generation_config.json"
# Copied byte for byte: tokenizer, chat template, options of generation.
CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json"
    " merges.txt tokenizer.model chat_template.jinja chat_template.json generation_config.json"
).split()
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, which are carried as well
# Single files and indices, in the order in which transformers takes the first that is there.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PLACES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
# Tables that old versions of transformers saved; they follow from the config.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


class Tensor(NamedTuple):
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
        raise ValueError(f"{src}: a Hugging Face folder has no optimizer state; leave --optimizer")
    store = Store(folder, is_tied=model.tie_embeddings)
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
        "dtype": resume.dtype(weights.leaves),
    }
    return weights


class Store:
    """The tensors of a folder by key, as `Stacked` reads them."""

    def __init__(self, folder: Folder, *, is_tied: bool):
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
        self.tensors: dict[str, Tensor] = {}
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


def _one_by_one(key: str, tensor: Tensor) -> dict[str, Tensor]:
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


def _json(folder: Folder, file: str) -> dict[str, Any]:
    return parsing.json_object(folder.read(file).tobytes(), f"{folder.name.rstrip('/')}/{file}")


def _tensors(folder: Folder, places: Sequence[str]) -> dict[str, Tensor]:
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


def _of_shards(folder: Folder, index: str) -> dict[str, Tensor]:
    where = folder.name.rstrip("/")
    weight_map = _json(folder, index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{where}/{index} has no weight_map")
    for key, file in weight_map.items():
        if not parsing.is_inside(file):
            name = reprlib.repr(file)
            raise ValueError(
                f"{where}/{index}: {key} is in {name}, which is no file of this folder"
            )
    found: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if not folder.has(file):
            raise FileNotFoundError(f"{where}: {file}, which {index} names, is missing")
        tensors = _of_file(folder, file)
        if twice := found.keys() & tensors.keys():
            key = min(twice)
            raise ValueError(f"{where}: {key} is there twice: in {found[key].file} and in {file}")
        found |= tensors
    for key, file in weight_map.items():
        if key not in found or found[key].file != file:
            raise ValueError(f"{where}/{index} lists {key} in {file}, which is not there")
    for key in found.keys() - weight_map.keys():
        raise ValueError(f"{where}: {key} in {found[key].file} is not listed in {index}")
    return found


def _of_file(folder: Folder, file: str) -> dict[str, Tensor]:
    if file.endswith(".safetensors"):
        return {
            key: Tensor(file, entry, functools.partial(safetensors.load, folder))
            for key, entry in safetensors.entries(folder, file).items()
        }
    archive = torch_files.Archive(folder, file)
    if not isinstance(archive.tree, dict) or not all(isinstance(key, str) for key in archive.tree):
        raise ValueError(f"{archive.where} holds no tensors by name")
    return {
        key: Tensor(file, t, archive.read)
        for key, t in archive.tree.items()
        if isinstance(t, torch_files.Tensor)
    }


# --- out ------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A tensor to write."""

    row: Row
    part: Index  # of our leaf, which it is, or one expert of; see `weights.parts`
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    weights: Weights,
    folder: pathlib.Path,
    dtype: str | None,
    max_shard_bytes: int,
    report: Callable[[int], None] = lambda n_bytes: None,
) -> dict[str, int]:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
      weights: what to write.
      folder: is there, empty.
      dtype: of the tensors; None: as they are stored, or were where they came from.
      max_shard_bytes: of a file; a tensor above that has one of its own.
      report: told how many bytes of the source are done, again and again.
    Returns: the checksum of each tensor by key.
    Raises:
      ValueError: if Hugging Face has no such model.
    """
    model = weights.model
    as_dtype = jnp.dtype(dtype or weights.meta.get("dtype") or weights.leaves["params/embed"].dtype)
    config = hf_config.write(model, weights.meta.get("token_ids", {}), as_dtype.name)
    plan = _plan(weights, as_dtype)
    shards = _shards(plan, max_shard_bytes)
    lengths = names.sizes(model) | {"v": model.vocab_size}
    written: dict[str, int] = {}

    made = itertools.chain.from_iterable(ahead(_fills(weights, plan, lengths)))

    def make(key: str) -> Iterator[np.ndarray]:  # called in the order of the plan
        left, written[key] = plan[key].n_bytes, 0
        while left:
            rows = next(made)
            begin = plan[key].shape[0] - left * plan[key].shape[0] // plan[key].n_bytes
            compare.refuse_nonfinite(key, rows, (begin, *(0,) * (rows.ndim - 1)))
            written[key] = compare.crc(rows, written[key])
            left -= rows.nbytes
            yield rows
        source = weights.leaves[f"params/{plan[key].row.ours}"]
        report(math.prod(plan[key].shape) * source.dtype.itemsize)

    for file, keys in shards.items():
        shapes = {key: (plan[key].dtype, plan[key].shape) for key in keys}
        safetensors.write(folder / file, shapes, make)
    if len(shards) > 1:
        total = {
            "total_size": sum(planned.n_bytes for planned in plan.values()),
            "total_parameters": sum(math.prod(planned.shape) for planned in plan.values()),
        }
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    _write_json(folder / CONFIG, config)
    for name, data in weights.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if GENERATION not in weights.files:
        ids = {key: config[key] for key in hf_config.TOKEN_IDS if config[key] is not None}
        _write_json(folder / GENERATION, {"_from_model_config": True, **ids})
    return written


def check(
    folder: pathlib.Path,
    written: Mapping[str, int],
    report: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Read the tensors of a folder and compare their checksums.

    Args:
      folder: that was written.
      written: the checksum of each tensor by key.
      report: told how many bytes were read, again and again.
    Raises:
      ValueError: if one is not what was written.
    """
    opened = folders.open(str(folder))
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    entries = {k: e for file in files for k, e in safetensors.entries(opened, file).items()}
    if entries.keys() != written.keys():
        raise ValueError(f"{folder}: not the tensors that were written")
    read = ahead(
        (safetensors.STEP_BYTES, functools.partial(safetensors.checksum, folder, entries[key]))
        for key in written
    )
    for (key, need), crc in zip(written.items(), read, strict=True):
        compare.refuse_other_crc(key, need, crc)
        report(entries[key].n_bytes)


def _plan(weights: Weights, dtype: np.dtype) -> dict[str, Planned]:
    """Every tensor by key: table, layer after layer, norm and head."""
    model = weights.model
    lengths = names.sizes(model) | {"v": model.vocab_size}
    rows = names.rows(model, "Hugging Face")
    layered = [row for row in rows if row.is_layered]
    order = [(row, 0) for row in rows if row.ours == "embed"]
    order += [(row, layer) for layer in range(model.n_layers) for row in layered]
    order += [(row, 0) for row in rows if not row.is_layered and row.ours != "embed"]
    plan = {}
    for row, layer in order:
        shape = names.shape(row.torch_axes, lengths)
        name = f"params/{row.ours}"
        for part in parts(name, weights.leaves[name]):
            if not part or part[0].start == layer:
                experts = range(part[1].start, part[1].stop) if row.is_per_expert else [0]
                for e in experts:
                    plan[row.key_of(layer, e)] = Planned(row, part, dtype, shape)
    return plan


def _shards(plan: Mapping[str, Planned], most: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for key, planned in plan.items():
        if groups[-1] and size + planned.n_bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += planned.n_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05}-of-{len(groups):05}.safetensors": keys for i, keys in enumerate(groups, 1)
    }


def _fills(
    weights: Weights, plan: Mapping[str, Planned], lengths: Mapping[str, int]
) -> Iterator[tuple[int, Callable[[], list[np.ndarray]]]]:
    """Bytes and call of each piece of our leaves, in the order of the plan.

    A call copies its piece to tensors in PyTorch's layout, and returns those that it completes:
    the last piece all of them, a piece of a table its rows.
    """
    for (row, part), group in itertools.groupby(plan.values(), lambda p: (p.row, p.part)):
        name, skip = f"params/{row.ours}", len(part)
        ends = names.shape(row.inner_axes, lengths)
        found = [_within(index[skip:], ends) for index in pieces(weights, name, part)]
        inners = [inner for inner in found if inner is not None]  # the others are padding
        if row.ours == "embed":
            [table] = group
            for inner in inners:
                rows = np.empty((inner[0].stop - inner[0].start, ends[1]), table.dtype)
                call = functools.partial(_fill, weights, name, part, inner, [rows], [rows])
                yield size(weights.leaves[name], inner), call
            continue
        tensors = [np.empty(planned.shape, planned.dtype) for planned in group]
        ours = [names.view(t, row.torch_axes, row.inner_axes, lengths) for t in tensors]
        for inner in inners:
            outs, done = [own[inner] for own in ours], tensors if inner is inners[-1] else []
            call = functools.partial(_fill, weights, name, part, inner, outs, done)
            yield size(weights.leaves[name], (*part, *inner)), call


def _within(index: Index, shape: tuple[int, ...]) -> Index | None:
    """What of an index lies within a shape; None: nothing."""
    inner = tuple(slice(*along.indices(n)) for along, n in zip(index, shape, strict=True))
    return inner if all(along.start < along.stop for along in inner) else None


def _fill(
    weights: Weights,
    name: str,
    part: Index,
    inner: Index,
    outs: list[np.ndarray],
    done: list[np.ndarray],
) -> list[np.ndarray]:
    """Copy a piece of a leaf to where it belongs; returns `done`."""
    values = weights.view(name, (*part, *inner))
    # Experts are a tensor each.
    one_by_one = values[0] if names.has_experts(name) else [values[(0,) * len(part)]]
    for out, one in zip(outs, one_by_one, strict=True):
        names.assign(out, one)
    return done


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, indent=2).encode() + b"\n")
