"""Folders that Hugging Face's transformers load, of any checkpoint."""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints import arrays, compare, names
from olmo_jax.checkpoints.formats import folders, hf_config, safetensors
from olmo_jax.checkpoints.formats.hf import CONFIG, GENERATION, INDEX, SINGLE
from olmo_jax.checkpoints.names import Row
from olmo_jax.checkpoints.weights import Index, Weights, ahead, parts, pieces, size
from olmo_jax.config.parameters import axis_sizes


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
    lengths = axis_sizes(model) | {"v": model.vocab_size}
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
    lengths = axis_sizes(model) | {"v": model.vocab_size}
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
        arrays.assign(out, one)
    return done


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, indent=2).encode() + b"\n")
