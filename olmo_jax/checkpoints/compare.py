"""How two checkpoints differ: as models, as trees, number by number, and in their logits."""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints.logits import logits
from olmo_jax.checkpoints.weights import Index, Weights, parts, pieces, size
from olmo_jax.config import changes
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.text import to_dict

LOGIT_TOLERANCE = 1e-5  # of the largest logit, for weights that are equal
LOGIT_BYTES = 4 << 30  # larger models are not run on a few tokens after each conversion
PIECE_BYTES = 512 << 20  # compared at once: the two layouts may lie across each other


class Difference(NamedTuple):
    """The largest difference between two leaves."""

    name: str
    value: float
    at: tuple[int, ...]
    a: float
    b: float

    def __str__(self) -> str:
        return f"{self.value:.3g} in {self.name} at {list(self.at)}: {self.a:.9g} and {self.b:.9g}"


def model_changes(one: ModelConfig, two: ModelConfig) -> list[str]:
    """Options of the function that differ; rows of padding do not belong to it."""
    differ = changes.between({"model": to_dict(one)}, {"model": to_dict(two)})
    return [
        f"{change.key}: {change.old!r} and {change.new!r}"
        for change in differ
        if change.is_of_the_function and change.key != "model.padded_vocab_size"
    ]


def shape_changes(one: Weights, two: Weights) -> list[str]:
    """Leaves that only one of them has, or in another shape; rows of padding may differ."""
    problems = [f"only one has {name}" for name in sorted(one.leaves.keys() ^ two.leaves.keys())]
    for name in one.leaves.keys() & two.leaves.keys():
        a, b = one.leaves[name].shape, two.leaves[name].shape
        if a != b and not name.endswith(("/embed", "/lm_head")):
            problems.append(f"{name} has shape {list(a)} and {list(b)}")
    return problems


def differences(
    one: Weights, two: Weights, report: Callable[[int], None] = lambda n: None
) -> list[Difference]:
    """The largest difference in each leaf, in float32; rows that only one has are padding."""
    pairs = []
    # Ours can be read across for the price of its chunks; a remote tensor would come many times.
    across = two if two.torch_layout else one
    for name, leaf in one.leaves.items():
        worst = Difference(name, -1.0, (), 0.0, 0.0)
        ends = [min(n) for n in zip(leaf.shape, two.leaves[name].shape, strict=True)]
        for part in parts(name, leaf):
            for index in pieces(across, name, part, PIECE_BYTES):
                inner = [along.indices(n)[:2] for along, n in zip(index, ends, strict=True)]
                if all(start < stop for start, stop in inner):
                    here = _difference(one, two, name, tuple(slice(*pair) for pair in inner))
                    worst = max(worst, here, key=lambda d: d.value)
            report(size(leaf) // len(parts(name, leaf)))
        pairs.append(worst)
    return pairs


def _difference(one: Weights, two: Weights, name: str, index: Index) -> Difference:
    a = one.read(name, index).astype(np.float32, copy=False)
    b = two.read(name, index).astype(np.float32, copy=False)
    if np.array_equal(a.view(np.int32), b.view(np.int32)):
        first = (0,) * a.ndim
        return Difference(name, 0.0, first, float(a[first]), float(b[first]))
    apart = np.abs(a - b)
    apart[np.isnan(apart)] = np.inf
    inner = np.unravel_index(np.argmax(apart), apart.shape)
    at = tuple(int(part.start or 0) + int(i) for part, i in zip(index, inner, strict=True))
    return Difference(name, float(apart[inner]), at, float(a[inner]), float(b[inner]))


def tokens_for(model: ModelConfig) -> np.ndarray:
    """A few tokens from all over the vocabulary, `[1, 8]`."""
    return np.array([[(7919 * i + 1) % model.vocab_size for i in range(8)]])


def dtype_of(name: str, leaf: jax.ShapeDtypeStruct, dtype: str) -> np.dtype:
    """The dtype of a leaf in a copy whose parameters have `dtype`."""
    return jnp.dtype(dtype) if name.startswith("params/") else leaf.dtype


def check_copy(source: Weights, copy: Weights, dtype: str) -> str:
    """Compare what was written with its source: names, shapes, dtypes, logits on a few tokens.

    The numbers themselves are compared by their checksums, by the one who wrote them.

    Args:
      source: that was copied.
      copy: read from the disk.
      dtype: that the parameters of the copy are to have.
    Returns: what was found, for people.
    Raises:
      ValueError: if anything differs.
    """
    problems = shape_changes(source, copy) + model_changes(source.model, copy.model)
    for name in source.leaves.keys() & copy.leaves.keys():
        found, need = copy.leaves[name].dtype, dtype_of(name, source.leaves[name], dtype)
        problems += [f"{name} is {found}, need {need}"] if found != need else []
    if problems:
        raise ValueError("the copy differs from its source: " + "; ".join(problems))
    line = f"checked: names, shapes, dtypes and all numbers of {len(copy.leaves)} arrays"
    if sum(size(leaf) for leaf in copy.leaves.values()) > LOGIT_BYTES:
        return line
    tokens = tokens_for(source.model)
    x, y = logits(source, tokens, as_dtype=dtype), logits(copy, tokens)
    apart, largest = float(np.abs(x - y).max()), float(np.abs(x).max())
    if not apart <= LOGIT_TOLERANCE * largest:
        raise ValueError(f"the copy differs from its source: the logits by {apart:.3g}")
    return f"{line}; logits on {tokens.size} tokens differ by {apart:.1g} (largest {largest:.3g})"


def crc(values: np.ndarray, before: int = 0) -> int:
    """The checksum of an array's bytes, behind others."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)


def refuse_nonfinite(name: str, values: np.ndarray, start: Sequence[int]) -> None:
    """Raise a ValueError if a part of an array is not finite.

    Args:
      name: of the array.
      values: the part; integers are finite.
      start: index of its first element in the array.
    """
    kind = values.dtype
    if not jnp.issubdtype(kind, np.floating):
        return
    # Seen as integers, what is not finite is above all that is: bfloat16 and no copies are cheap.
    limit = int(np.array(np.inf, kind).view(f"u{kind.itemsize}"))
    signed, unsigned = (values.view(f"{sign}{kind.itemsize}") for sign in "iu")
    sign_bit = 1 << (8 * kind.itemsize - 1)
    if signed.max(initial=0) < limit and unsigned.max(initial=0) < limit + sign_bit:
        return
    at = np.argwhere(~np.isfinite(values.astype(np.float64)))[0]
    where = [int(i) + int(j) for i, j in zip(at, start, strict=True)]
    raise ValueError(
        f"{name} is {float(values[tuple(at)])} at {where} as {kind}: weights that are not finite"
        " are not converted; take an earlier checkpoint"
    )


def refuse_other_crc(name: str, written: int, found: int) -> None:
    """Raise a ValueError if an array that was read back is not what was written."""
    if written != found:
        raise ValueError(f"the copy differs from its source: {name} is not what was written")
