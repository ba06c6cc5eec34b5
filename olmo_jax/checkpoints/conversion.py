"""What is done with checkpoints of any kind: convert, compare, average, upcycle.

A result appears under its name when it is complete and was compared with its source; until then it
is a sibling `NAME.partial`, which an error removes.
"""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import olmo_jax
from olmo_jax import files
from olmo_jax.checkpoints import arrays, compare, layout, storage
from olmo_jax.checkpoints.derived import Mean, Padded, Upcycled
from olmo_jax.checkpoints.formats import hf, hf_write, native, tokenizer_config
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.logits import logits
from olmo_jax.checkpoints.weights import (
    PIECE_BYTES,
    Index,
    Leaves,
    NoOptimizerError,
    Weights,
    ahead,
    blocks,
    is_by_rows,
    parts,
    size,
)
from olmo_jax.config.text import to_dict
from olmo_jax.records.speed import Bar

Say = Callable[[str], None]
Checksums = list[tuple[str, Index, int]]  # of each block of each leaf


class LeafRows(NamedTuple):
    """Some rows of a leaf, as they are written."""

    name: str
    index: Index
    values: np.ndarray
    checksum: int


# --- convert --------------------------------------------------------------------------------------


def to_jax(
    src: str,
    dst: str,
    *,
    optimizer: bool = False,
    dtype: str = "float32",
    padded_vocab_size: int | None = None,
    revision: str | None = None,
    say: Say = print,
) -> None:
    """Write a checkpoint of any kind as one of ours, which `train` and `olmo_jax.load` take.

    Args:
      src: see `weights.open`.
      dst: the new checkpoint, local or `gs://`.
      optimizer: take Adam's moments and the step along.
      dtype: of the parameters; training needs float32, in which bfloat16 loses nothing.
      padded_vocab_size: rows that the tables are to have, for a mesh that splits them.
      revision: of a Hub id.
      say: told what is found and done, line by line.
    Raises:
      FileExistsError: if there is something at `dst`.
      FileNotFoundError, ValueError, OSError: if the source is not whole, or is not copied exactly.
    """
    _refuse_existing(dst)
    try:
        source = open_weights(src, optimizer=optimizer, revision=revision)
    except NoOptimizerError as error:
        raise ValueError(f"{error}; leave --optimizer") from None
    if padded_vocab_size is not None:
        source = Padded(source, padded_vocab_size)
    say(f"{src}: {source.line}")
    _to_jax(source, dst, dtype, say, optimizer=optimizer)


def to_hf(
    src: str,
    dst: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    revision: str | None = None,
    say: Say = print,
) -> None:
    """Write a checkpoint of any kind as a folder for `AutoModelForCausalLM.from_pretrained`.

    Args:
      src: see `weights.open`.
      dst: the new folder.
      dtype: float32 or bfloat16; None: as it was where the parameters come from.
      max_shard_bytes: of each file.
      revision: of a Hub id.
      say: told what is found and done, line by line.
    Raises:
      FileExistsError: if there is something at `dst`.
      FileNotFoundError, ValueError, OSError: if the source is not whole, has no counterpart, or is
        not copied exactly.
    """
    _refuse_existing(dst)
    source = open_weights(src, revision=revision)
    say(f"{src}: {source.line}")
    with _result(dst) as partial:
        with _bar("writing", _n_bytes(source)) as report:
            written = hf_write.write(source, partial, dtype, max_shard_bytes, report)
        tokenizer_config.complete(partial, say)
        same = hf.read(str(partial))
        with _bar("checking", _n_bytes(same)) as report:
            hf_write.check(partial, written, report)
        say(compare.check_copy(source, same, same.leaves["params/embed"].dtype.name))
    say(f"wrote {dst}")


def average(sources: Sequence[str], dst: str, *, say: Say = print) -> None:
    """Write the mean of the parameters of several checkpoints, taken in float32, as one of ours.

    Raises:
      FileExistsError: if there is something at `dst`.
      ValueError: if the models are not the same.
    """
    _refuse_existing(dst)
    if len(sources) < 2:
        raise ValueError("average: need at least two checkpoints before OUT")
    opened = [open_weights(src) for src in sources]
    for src, source in zip(sources, opened, strict=True):
        say(f"{src}: {source.line}")
        _refuse_other_model(sources[0], opened[0], src, source)
    _to_jax(Mean(opened), dst, "float32", say)


def upcycle(
    src: str,
    dst: str,
    *,
    n_experts: int,
    n_experts_per_token: int = 8,
    router_std: float = 0.02,
    seed: int = 0,
    revision: str | None = None,
    say: Say = print,
) -> None:
    """Write a mixture of experts that starts as a dense checkpoint, see `Upcycled`, as one of ours.

    Raises:
      FileExistsError: if there is something at `dst`.
      FileNotFoundError, ValueError, OSError: if the source is not whole, or no dense model.
    """
    _refuse_existing(dst)
    dense = open_weights(src, revision=revision)
    moe = Upcycled(dense, n_experts, n_experts_per_token, router_std, seed)
    say(f"{src}: {moe.line}")
    _to_jax(moe, dst, "float32", say)


def _to_jax(source: Weights, dst: str, dtype: str, say: Say, *, optimizer: bool = False) -> None:
    """Write, read what was written, compare."""
    with _result(dst) as partial:
        written = _write_native(source, files.path(str(partial)), dtype)
        same = native.Native(files.path(str(partial)), optimizer)
        _check_native(same, written)
        say(compare.check_copy(source, same, dtype))
    say(f"wrote {dst}")


def _write_native(source: Weights, folder: files.Path, dtype: str) -> Checksums:
    """Write a checkpoint of ours, one block of one leaf after the other."""
    written: Checksums = []
    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, compare.dtype_of(name, leaf, dtype))
        for name, leaf in source.leaves.items()
    }
    writer = storage.ArrayWriter(folder, leaves)
    try:
        with _bar("writing", sum(map(size, leaves.values()))) as report:
            for name, index, values, checksum in ahead(_blocks(source, leaves)):
                writer.write(name, [along.start or 0 for along in index], values)
                written.append((name, index, checksum))
                report(values.nbytes)
            writer.wait()
    except BaseException:
        writer.abandon()
        raise
    config = {"model": to_dict(source.model)}
    meta = {
        "model": to_dict(source.model),
        "config": config,
        "position": {},
        "metrics_position": None,
        "fingerprint": None,
        "source": source.line,
        "versions": {"olmo_jax": olmo_jax.__version__, "jax": jax.__version__},
    }
    meta |= source.meta | {"config": source.meta.get("config", {}) | config}
    writer.commit(meta, files=source.files)
    return written


def _blocks(source: Weights, leaves: Leaves) -> Iterator[tuple[int, Callable[[], LeafRows]]]:
    """Bytes and maker of each block, in order; what they are made from is read ahead of them.

    A source that lies across our rows is passed through once for several blocks: as many as make
    a piece, or all of a part that is remote.
    """
    reads: list[tuple[str, Index, list[Index]]] = []
    for name, leaf in leaves.items():
        for part in parts(name, leaf):
            rows, n_bytes = blocks(name, leaf, part), size(source.leaves[name], part)
            n = len(rows) if source.is_remote else max(1, PIECE_BYTES * len(rows) // n_bytes)
            n = 1 if is_by_rows(source, name) else n
            groups = [rows[i : i + n] for i in range(0, len(rows), n)]
            reads += [(name, _together(group, len(part)), group) for group in groups]

    def make(name: str, index: Index, values: np.ndarray) -> LeafRows:
        out = np.empty(values.shape, leaves[name].dtype)
        arrays.assign(out, values)
        compare.refuse_nonfinite(name, out, [along.start or 0 for along in index])
        return LeafRows(name, index, out, compare.crc(out))

    read = ahead(
        (size(source.leaves[name], index), functools.partial(source.view, name, index))
        for name, index, _ in reads
    )
    for (name, index, rows), values in zip(reads, read, strict=True):
        for row in rows:
            starts = [along.start or 0 for along in index]
            cut = tuple(
                along if along.start is None else slice(along.start - at, along.stop - at)
                for along, at in zip(row, starts, strict=True)
            )
            make_it = functools.partial(make, name, row, values[(*cut, ...)])
            yield size(leaves[name], row), make_it


def _together(rows: list[Index], axis: int) -> Index:
    """What blocks make together that follow each other along an axis, if they have it."""
    first, last = rows[0], rows[-1]
    if len(first) == axis:
        return first
    return (*first[:axis], slice(first[axis].start, last[axis].stop), *first[axis + 1 :])


def _check_native(copy: Weights, written: Checksums) -> None:
    """Read what was written."""

    def found(name: str, index: Index) -> int:
        return compare.crc(copy.view(name, index))

    read = ahead(
        (size(copy.leaves[name], index), functools.partial(found, name, index))
        for name, index, _ in written
    )
    with _bar("checking", _n_bytes(copy)) as report:
        for (name, index, need), checksum in zip(written, read, strict=True):
            compare.refuse_other_crc(name, need, checksum)
            report(size(copy.leaves[name], index))


# --- compare --------------------------------------------------------------------------------------


def check(a: str, b: str, *, atol: float = 0.0, say: Say = print) -> bool:
    """Compare two checkpoints of any kind, leaf by leaf, and their logits on a few tokens.

    Args:
      a, b: see `weights.open`.
      atol: largest difference between parameters that counts as none.
      say: told the differences, line by line.
    Returns: whether they are the same model.
    Raises:
      ValueError: if a source is not whole, or they have different parameters.
    """
    one, two = open_weights(a), open_weights(b)
    say(f"{a}: {one.line}")
    say(f"{b}: {two.line}")
    options = compare.model_changes(one.model, two.model)
    for line in options:
        say(line)
    shapes = compare.shape_changes(one, two)
    if shapes:
        raise ValueError(f"{a} and {b} cannot be compared: " + "; ".join(shapes))
    with _bar("comparing", _n_bytes(one)) as report:
        found = compare.differences(one, two, report)
    worst = max(found, key=lambda d: d.value)
    n_equal = sum(d.value == 0 for d in found)
    say(f"parameters: {n_equal} of {len(found)} are equal; largest difference {worst}")
    tokens = np.asarray(compare.tokens_for(one.model))
    x, y = logits(one, tokens), logits(two, tokens)
    position = np.unravel_index(np.argmax(np.abs(x - y)), x.shape)
    at = ", ".join(map(str, position[1:]))
    say(f"logits: largest difference {np.abs(x - y).max():.3g} at [{at}], of {np.abs(x).max():.3g}")
    return not options and not worst.value > atol


def _refuse_other_model(a: str, one: Weights, b: str, two: Weights) -> None:
    problems = compare.model_changes(one.model, two.model) + compare.shape_changes(one, two)
    if one.model.vocab_rows != two.model.vocab_rows:
        problems.append(f"rows of the vocabulary: {one.model.vocab_rows}, {two.model.vocab_rows}")
    if problems:
        raise ValueError(f"{a} and {b} are different models: " + "; ".join(problems))


# --- results that are there whole or not at all ---------------------------------------------------


def _refuse_existing(dst: str) -> None:
    path = files.path(dst)
    if path.exists() or layout.is_link(path):
        raise FileExistsError(f"{dst} is there already and is not overwritten")


@contextlib.contextmanager
def _result(dst: str) -> Iterator[Any]:
    """A place to write; it becomes `dst` at the end, or is removed.

    A checkpoint on `gs://` has no sibling: there only its last file makes it one.
    """
    if "://" in dst:
        folder = files.path(dst)
        try:
            yield folder
        except FileExistsError:  # somebody else's
            raise
        except BaseException:
            layout.remove(folder)
            raise
        return
    final = pathlib.Path(files.path(dst))
    partial = final.with_name(f"{final.name}.partial")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()  # whoever makes it has it
    except FileExistsError:
        raise FileExistsError(
            f"{partial} is there, from a conversion that was killed or still runs; delete it first"
        ) from None
    try:
        yield partial
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _n_bytes(checkpoint: Weights) -> int:
    return sum(map(size, checkpoint.leaves.values()))


@contextlib.contextmanager
def _bar(words: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in megabytes; what it gives is told the bytes that are done."""
    bar, done = Bar(), 0

    def report(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        bar.draw(min(done, total) >> 20, total >> 20, f"MB {words}")

    try:
        yield report
    finally:
        bar.clear()
