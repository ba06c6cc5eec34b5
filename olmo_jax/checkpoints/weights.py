"""Somebody's checkpoint, whatever its format, as parameters in our names and our layout.

Each format has a reader, a module with `recognises(src)` and `read(src, optimizer)`. What is done
with checkpoints (convert, compare, average, load) is written once, against `Weights`.
"""

import collections
import concurrent.futures
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from olmo_jax.checkpoints import arrays, layout, names
from olmo_jax.checkpoints.arrays import Index
from olmo_jax.checkpoints.layout import Leaves
from olmo_jax.config.model import ModelConfig

PIECE_BYTES = 128 << 20
AHEAD_BYTES = 192 << 20  # of arrays that are made while another is used
THREADS = 4  # that make them: half of their time is the disk's

T = TypeVar("T")


class NoOptimizerError(ValueError):
    """A checkpoint has no state of an optimizer, though that was asked for."""


class Weights(Protocol):
    """A checkpoint that is read piece by piece."""

    line: str  # what it is, for people: "Hugging Face Olmo3ForCausalLM, 355 tensors in 14 files"
    model: ModelConfig
    # "params/layers/attn/wq", with the optimizer also "opt_state/mu/layers/…" and "step": our
    # shapes, the dtypes that are stored.
    leaves: Leaves
    # To carry along byte for byte: tokenizer.json, generation_config.json, …
    files: dict[str, bytes]
    # What a checkpoint of ours says beside its arrays: "token_ids" (bos_token_id, eos_token_id,
    # pad_token_id, … as the source has them), "dtype" (that of the source, for the way back), and
    # with the optimizer "step", "position" and "config".
    meta: dict[str, Any]
    # Whether big matrices lie there as [outputs, inputs]: parts are then cheap to read along our
    # last dimension, otherwise along our first.
    torch_layout: bool
    # Whether it comes over a network: what is read twice, comes twice.
    is_remote: bool = False

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf, or a part of it such as one layer; reads no more of the source than that needs.

        Args:
          name: of the leaf, as in `leaves`.
          index: a slice (of step 1) for each dimension of ours; None: everything.
        Returns: the values in the stored dtype, C-contiguous.
        """
        return arrays.contiguous(self.view(name, index))

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """What `read` gives, in the order of the source in memory: for who copies it on, once."""
        ...


def whole(shape: tuple[int, ...], index: Index | None) -> Index:
    """The index, or none, with all of the dimensions of `shape` that it does not reach."""
    index = index or ()
    return (*index, *(slice(None),) * (len(shape) - len(index)))


def parts(name: str, leaf: jax.ShapeDtypeStruct) -> list[Index]:
    """The parts of a leaf that are converted one by one, as slices of its first dimensions.

    A part is the whole leaf, a layer, or some experts of a layer: as many as share a chunk of ours.
    """
    if "layers" not in name.split("/"):
        return [()]
    layers = [(slice(i, i + 1),) for i in range(leaf.shape[0])]
    if not names.has_experts(name):
        return layers
    n = layout.chunk_shape(name, leaf)[1]
    return [(*layer, slice(e, e + n)) for layer in layers for e in range(0, leaf.shape[1], n)]


def blocks(name: str, leaf: jax.ShapeDtypeStruct, part: Index = ()) -> list[Index]:
    """The blocks of a part that are whole chunks of ours: some rows of its next dimension each."""
    axis = len(part)
    if len(leaf.shape) == axis:
        return [part]
    step = layout.chunk_shape(name, leaf)[axis]
    starts = range(0, leaf.shape[axis], step)
    return [whole(leaf.shape, (*part, slice(at, at + step))) for at in starts]


def pieces(weights: Weights, name: str, part: Index = (), most: int = PIECE_BYTES) -> list[Index]:
    """Where to read a part of a leaf, so that no piece is large.

    Args:
      weights: that have it; the pieces lie as they do in the source.
      name: of the leaf.
      part: see `parts`.
      most: bytes of a piece in PyTorch's layout, where a row is not more; in ours it is a block.
    """
    leaf = weights.leaves[name]
    if is_by_rows(weights, name) or len(leaf.shape) == len(part):
        return blocks(name, leaf, part)
    row = size(leaf, part) // leaf.shape[-1]
    step = max(1, most // row)
    before, n = whole(leaf.shape[:-1], part), leaf.shape[-1]
    return [(*before, slice(at, min(at + step, n))) for at in range(0, n, step)]


def is_by_rows(weights: Weights, name: str) -> bool:
    """Whether rows of ours lie together in the source, as those of a table always do."""
    return not weights.torch_layout or name.endswith("/embed")


def ahead(makes: Iterable[tuple[int, Callable[[], T]]]) -> Iterator[T]:
    """What each call gives, in order; while one result is used, the next ones are made.

    Args:
      makes: bytes of a result and the call that makes it. AHEAD_BYTES limits the results that are
        there or under way, not counting the one whose turn it is, which may be larger.
    """
    threads = concurrent.futures.ThreadPoolExecutor(THREADS)
    under_way: collections.deque[tuple[int, concurrent.futures.Future[T]]] = collections.deque()
    waiting = 0
    try:
        for n_bytes, make in makes:
            while under_way and waiting + n_bytes > AHEAD_BYTES:
                yield under_way.popleft()[1].result()
                waiting -= under_way[0][0] if under_way else 0
            waiting += n_bytes if under_way else 0
            under_way.append((n_bytes, threads.submit(make)))
        for _, future in under_way:
            yield future.result()
    finally:  # who ends early does not wait for a server that is slow or silent
        threads.shutdown(wait=False, cancel_futures=True)


def size(leaf: jax.ShapeDtypeStruct, index: Index = ()) -> int:
    """The bytes of a leaf, or of the part that is a slice of each of its first dimensions."""
    ends = zip(index, leaf.shape, strict=False)
    lengths = [len(range(*along.indices(n))) for along, n in ends]
    return math.prod([*lengths, *leaf.shape[len(lengths) :]]) * leaf.dtype.itemsize
