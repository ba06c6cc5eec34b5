"""Tensors as PyTorch has them, one for each layer and heads merged, served in our layout."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from olmo_jax.checkpoints import names
from olmo_jax.checkpoints.names import Row
from olmo_jax.checkpoints.weights import Index, Leaves, Weights, whole
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import axis_sizes

SHOWN = 3  # problems of one kind in an error
COMPARED_ROWS = 4096  # at once
BAND_BYTES = 32 << 20  # read at once of rows that are narrowed

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # and dtypes, by key


class TensorStore(Protocol):
    """Tensors by key."""

    where: str  # for errors

    @property
    def shapes(self) -> Shapes:
        """Shape and dtype of each tensor."""
        ...

    def read(self, key: str, index: Index) -> np.ndarray:
        """A part of a tensor, a slice of step 1 for each dimension; reads no more than that."""
        ...


class _Tree(NamedTuple):
    """Tensors that mirror the parameters: these themselves, or a moment of each."""

    store: TensorStore
    rows: list[Row]
    key_of: Callable[[str], str]  # the store's key of a parameter's


class Stacked(Weights):
    """`Weights` over stores of PyTorch tensors."""

    torch_layout = True

    def __init__(self, model: ModelConfig, *, is_remote: bool = False):
        self.model, self.is_remote = model, is_remote
        self.line = ""
        self.leaves: Leaves = {}
        self.files: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self._lengths = axis_sizes(model)
        self._trees: dict[str, tuple[_Tree, Row]] = {}
        self._values: dict[str, np.ndarray] = {}

    def add(
        self,
        prefix: str,
        store: TensorStore,
        rows: list[Row],
        key_of: Callable[[str], str],
        own: Iterable[str],
        dtype: Any = None,
    ) -> None:
        """Add leaves that mirror the parameters.

        Args:
          prefix: of our names: `params/`, `opt_state/mu/`, …
          store: that has them.
          rows: the table.
          key_of: the store's key of a parameter, from the parameter's key.
          own: keys of the store that must all be used.
          dtype: to convert them to; None: as they are stored.
        Raises:
          ValueError: with what is missing, left over, or of another shape.
        """
        tree = _Tree(store, rows, key_of)
        self._check(tree, own)
        for row in rows:
            name = prefix + row.ours
            shape = names.shape(row.axes, self._lengths)
            layers = (self.model.n_layers,) if row.is_layered else ()
            _, stored = store.shapes[key_of(row.key_of(0))]
            self.leaves[name] = jax.ShapeDtypeStruct((*layers, *shape), dtype or stored)
            self._trees[name] = tree, row

    def add_value(self, name: str, value: np.ndarray) -> None:
        """Add a leaf that is known already."""
        self.leaves[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        self._values[name] = value

    def view(self, name: str, index: Index | None = None) -> np.ndarray:
        """A leaf or a part of it as the source has it in memory, see `Weights`."""
        shape = self.leaves[name].shape
        index = whole(shape, index)
        if name in self._values:
            return np.require(self._values[name][index], requirements="C")
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        tree, row = self._trees[name]
        dtype = self.leaves[name].dtype
        if not row.is_layered:
            return self._read(tree, row, 0, ranges).astype(dtype, copy=False)
        layers = range(*ranges[0])
        if len(layers) == 1:
            return self._read(tree, row, layers[0], ranges[1:])[None].astype(dtype, copy=False)
        out = np.empty([stop - start for start, stop in ranges], dtype)
        for i, layer in enumerate(layers):
            out[i] = self._read(tree, row, layer, ranges[1:])
        return out

    def _read(self, tree: _Tree, row: Row, layer: int, ranges: list[tuple[int, int]]) -> np.ndarray:
        """A part of a leaf's layer."""
        if not row.is_per_expert:
            return self._read_one(tree, row, row.key_of(layer), ranges)
        experts = range(*ranges[0])
        parts = [self._read_one(tree, row, row.key_of(layer, e), ranges[1:]) for e in experts]
        return parts[0][None] if len(parts) == 1 else np.stack(parts)

    def _read_one(
        self, tree: _Tree, row: Row, key: str, ranges: list[tuple[int, int]]
    ) -> np.ndarray:
        """A part of one tensor, with our axes: whole rows are read, and narrowed here."""
        axes = row.inner_axes
        wanted = dict(zip(axes.split(), ranges, strict=True))
        got, index, inner = dict(self._lengths), [], set()
        for group in names.groups(row.torch_axes):
            first, *rest = group.split()
            size = math.prod(self._lengths[axis] for axis in rest)
            start, stop = wanted[first]
            index.append((start * size, stop * size))
            got[first] = stop - start
            inner |= set(rest)
        before = [r for r in _stacked(tree, row) if (r.part or 0) < (row.part or 0)]
        offset = sum(self._first_axis(r) for r in before)
        index[0] = (index[0][0] + offset, index[0][1] + offset)
        array = tree.store.read(tree.key_of(key), tuple(slice(*part) for part in index))
        ours = names.view(array, row.torch_axes, axes, got)
        narrow = [slice(*wanted[a]) if a in inner else slice(None) for a in axes.split()]
        return ours[tuple(narrow)]

    def _first_axis(self, row: Row) -> int:
        return names.shape(row.torch_axes, self._lengths)[0]

    def _check(self, tree: _Tree, own: Iterable[str]) -> None:
        """Names, shapes and dtypes of a tree, before anything is read."""
        n_keys = sum(count(row, self.model) for row in tree.rows)
        if n_keys > 10 * len(tree.store.shapes) + 100:  # too many to list what is missing
            raise ValueError(
                f"{tree.store.where} does not fit its config: {len(tree.store.shapes):,} tensors of"
                f" {n_keys:,}"
            )
        missing, wrong, used = [], [], set()
        for row in tree.rows:
            shape = list(names.shape(row.torch_axes, self._lengths))
            if row.part is not None:
                shape[0] = sum(self._first_axis(r) for r in _stacked(tree, row))
            dtypes = {}
            for key in map(tree.key_of, keys_of(row, self.model)):
                used.add(key)
                if key not in tree.store.shapes:
                    missing.append(key)
                    continue
                found, dtype = tree.store.shapes[key]
                if list(found) != shape:
                    wrong.append(f"{key} has shape {list(found)}, need {shape}")
                dtypes.setdefault(dtype, key)
                if not jnp.issubdtype(dtype, np.floating):
                    wrong.append(f"{key} is {dtype}, need floats")
            if len(dtypes) > 1:
                wrong.append("; ".join(f"{key} is {dtype}" for dtype, key in dtypes.items()))
        extra = [key for key in own if key not in used]
        problems = [
            f"{what} {', '.join(keys[:SHOWN])}" + _more(keys)
            for what, keys in (("missing", missing), ("left over", extra))
            if keys
        ]
        problems += ["; ".join(dict.fromkeys(wrong[:SHOWN])) + _more(wrong)] if wrong else []
        if problems:
            raise ValueError(f"{tree.store.where} does not fit its config: {'; '.join(problems)}")


def keys_of(row: Row, model: ModelConfig) -> list[str]:
    """All of PyTorch's keys of a parameter."""
    layers = range(model.n_layers if row.is_layered else 1)
    experts = range(model.n_experts if row.is_per_expert else 1)
    return [row.key_of(layer, expert) for layer in layers for expert in experts]


def count(row: Row, model: ModelConfig) -> int:
    """How many keys of PyTorch's a parameter has."""
    layers = model.n_layers if row.is_layered else 1
    return layers * model.n_experts if row.is_per_expert else layers


def narrowed(
    load: Callable[[slice], np.ndarray], index: Index, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """A part of a tensor of which `load` reads whole rows; what it cuts off does not add up.

    Args:
      load: gives some rows.
      index: a slice of step 1 for each dimension.
      shape, dtype: of the tensor.
    """
    ranges = [along.indices(n)[:2] for along, n in zip(index, shape, strict=True)]
    if all(along == (0, n) for along, n in zip(ranges[1:], shape[1:], strict=True)):
        return load(index[0] if index else slice(None))
    out = np.empty([stop - start for start, stop in ranges], dtype)
    first, last = ranges[0]
    step = max(1, BAND_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
    for at in range(first, last, step):
        rows = slice(at, min(at + step, last))
        out[at - first : rows.stop - first] = load(rows)[(slice(None), *index[1:])]
    return out


def is_same(store: TensorStore, one: str, other: str) -> bool:
    """Whether two tensors of a store are equal, read some rows at a time."""
    (shape, dtype), (n_rows, *rest) = store.shapes[one], store.shapes[one][0]
    if store.shapes[other] != (shape, dtype):
        return False
    whole_rows = (slice(None),) * len(rest)
    parts = [(slice(at, at + COMPARED_ROWS), *whole_rows) for at in range(0, n_rows, COMPARED_ROWS)]
    return all(np.array_equal(store.read(one, part), store.read(other, part)) for part in parts)


def _stacked(tree: _Tree, row: Row) -> list[Row]:
    """The rows that share this row's tensor; none if it is alone there."""
    return [r for r in tree.rows if r.key == row.key] if row.part is not None else []


def _more(found: list[str]) -> str:
    return f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""


def dtype(leaves: Leaves) -> str:
    """The dtype of a checkpoint's parameters; of several the widest."""
    found = [leaf.dtype for name, leaf in leaves.items() if name.startswith("params/")]
    return functools.reduce(jnp.promote_types, found).name
