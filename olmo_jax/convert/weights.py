"""Somebody's checkpoint, whatever its format, as parameters in our names and our layout.

Each format has a reader, a module with `recognises(src)` and `read(src, optimizer)`. What is done
with checkpoints (convert, compare, average, load) is written once, against `Weights`.
"""

import collections
import concurrent.futures
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from olmo_jax import storage
from olmo_jax.config import ModelConfig

PIECE_BYTES = 128 << 20
AHEAD = 2  # arrays that are made while one is used

T = TypeVar("T")
Index = tuple[slice, ...]
Leaves = dict[str, jax.ShapeDtypeStruct]  # by name


class Weights(Protocol):
    """A checkpoint that is read piece by piece."""

    line: str  # what it is, for people: "Hugging Face Olmo3ForCausalLM, 355 tensors in 14 files"
    model: ModelConfig
    # "params/layers/attn/wq", with the optimizer also "opt_state/mu/layers/…" and "step": our
    # shapes, the dtypes that are stored.
    leaves: Leaves
    # To carry along byte for byte: tokenizer.json, generation_config.json, …
    files: dict[str, bytes]
    # What a checkpoint of ours says beside its arrays: "token_ids" (bos_token_id, eos_token_id and
    # pad_token_id as the source has them), "dtype" (that of the source, for the way back), and with
    # the optimizer "step", "position" and "config".
    meta: dict[str, Any]
    # Whether big matrices lie there as [outputs, inputs]: parts are then cheap to read along our
    # last dimension, otherwise along our first.
    torch_layout: bool

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf, or a part of it such as one layer; reads no more of the source than that needs.

        Args:
          name: of the leaf, as in `leaves`.
          index: a slice (of step 1) for each dimension of ours; None: everything.
        Returns: the values in the stored dtype, C-contiguous.
        """
        ...

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """What `read` gives, in the order that the source has in memory: for who copies it on."""
        ...


def open(src: str, *, optimizer: bool = False, revision: str | None = None) -> Weights:
    """The checkpoint at a path, address or Hub id, after finding out which kind it is.

    Args:
      src: a folder (Hugging Face, olmo_jax's checkpoint or run, legacy OLMo, OLMo-core), local or
        `https://`, or an id on the Hugging Face Hub such as `allenai/OLMo-2-1124-7B`.
      optimizer: whether Adam's moments and the step are wanted too, where the source has them.
      revision: branch, tag or commit on the Hub.
    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if it is no checkpoint that is known, or one that cannot be right.
    """
    # The readers use this module.
    from olmo_jax.convert import hf, hub, legacy, native, olmo_core

    folder = src
    if "://" not in src and not pathlib.Path(src).expanduser().exists():
        if not is_hub_id(src):
            raise FileNotFoundError(f"{src} does not exist")
        folder = str(hub.download(src, revision))
    elif revision is not None:
        raise ValueError(f"--revision={revision} is for ids on the Hugging Face Hub; {src} is none")
    for reader in (native, hf, legacy, olmo_core):
        if reader.recognises(folder):
            return reader.read(folder, optimizer=optimizer)
    raise ValueError(
        f"{src} is no checkpoint that is known here: found neither config.json with safetensors"
        " (Hugging Face), nor commit_success.txt (olmo_jax), nor config.yaml (legacy OLMo), nor"
        " model_and_optim (OLMo-core)"
    )


class Padded:
    """`Weights` with rows of zeros behind the vocabulary: they never score, and split evenly."""

    def __init__(self, source: Weights, rows: int):
        """Widen the tables, and what the optimizer keeps of them.

        Args:
          source: without optimizer or with it.
          rows: of the tables from now on.
        Raises:
          ValueError: if there are more.
        """
        if rows < source.model.vocab_rows:
            there = source.model.vocab_rows
            raise ValueError(f"padded_vocab_size={rows} is below the {there} rows of the source")
        self._source, self.line = source, f"{source.line}, {rows} rows"
        self.model = dataclasses.replace(source.model, padded_vocab_size=rows)
        self.files, self.meta, self.torch_layout = source.files, source.meta, source.torch_layout
        self.leaves = dict(source.leaves)
        for name, leaf in source.leaves.items():
            if name.endswith("/embed"):
                self.leaves[name] = jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype)
            elif name.endswith("/lm_head"):
                self.leaves[name] = jax.ShapeDtypeStruct((leaf.shape[0], rows), leaf.dtype)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it."""
        leaf, stored = self.leaves[name], self._source.leaves[name].shape
        if leaf.shape == stored:
            return self._source.read(name, index)
        ends = zip(whole(leaf.shape, index), leaf.shape, strict=True)
        wanted = [part.indices(n)[:2] for part, n in ends]
        there = [(min(a, n), min(b, n)) for (a, b), n in zip(wanted, stored, strict=True)]
        out = np.zeros([b - a for a, b in wanted], leaf.dtype)
        if all(a < b for a, b in there):
            values = self._source.read(name, tuple(slice(a, b) for a, b in there))
            out[tuple(slice(n) for n in values.shape)] = values
        return out

    view = read


def is_hub_id(src: str) -> bool:
    """Whether a name that is no path here reads like `organisation/model`."""
    match = re.fullmatch(r"([\w.-]+)/[\w.-]+", src)
    return match is not None and not pathlib.Path(match[1]).exists()


def whole(shape: tuple[int, ...], index: Index | None) -> Index:
    """The index with its None filled in: a slice for each dimension of `shape`."""
    return index if index is not None else (slice(None),) * len(shape)


def pieces(
    weights: Weights, name: str, layer: int | None = None, most: int = PIECE_BYTES
) -> list[Index]:
    """Where to read a leaf, or a layer of it, so that no piece is large.

    Args:
      weights: that have it; the pieces lie as they do in the source.
      name: of the leaf.
      layer: of a leaf that has layers; None: it has none.
      most: bytes of a piece in PyTorch's layout, where a row is not more; in ours it is a chunk.
    """
    leaf = weights.leaves[name]
    index, first = list(whole(leaf.shape, None)), 0
    if layer is not None:
        index[0], first = slice(layer, layer + 1), 1
    if len(leaf.shape) == first:
        return [tuple(index)]
    if weights.torch_layout and not name.endswith("/embed"):  # a table has its rows first in both
        axis = len(leaf.shape) - 1
        row = math.prod(leaf.shape[first:-1]) * leaf.dtype.itemsize
        step = max(1, most // row)
    else:
        axis, step = first, storage.chunk_shape(name, leaf)[first]
    return [
        (*index[:axis], slice(at, min(at + step, leaf.shape[axis])), *index[axis + 1 :])
        for at in range(0, leaf.shape[axis], step)
    ]


def layers_of(weights: Weights, name: str) -> list[int] | list[None]:
    """The layers of a leaf, for `pieces`."""
    return list(range(weights.leaves[name].shape[0])) if "layers" in name.split("/") else [None]


def ahead(makes: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each call gives, in order; while one result is used, the next ones are made."""
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as threads:
        under_way: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        for make in makes:
            under_way.append(threads.submit(make))
            if len(under_way) > AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def n_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """The size of a leaf."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
