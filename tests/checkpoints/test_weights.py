"""Work ahead of its use: in order, within a limit, and with its errors; blocks are whole chunks."""

import functools
import itertools
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest

from olmo_jax.checkpoints import layout, weights
from olmo_jax.checkpoints.derived import Mean, Padded
from olmo_jax.config.model import ModelConfig


def test_results_come_in_order_and_few_wait(monkeypatch):
    monkeypatch.setattr(weights, "AHEAD_BYTES", 10)
    there, most = 0, 0
    lock = threading.Lock()

    def make(i: int) -> int:
        nonlocal there, most
        with lock:
            there += 1
            most = max(most, there)
        return i

    got = []
    for i in weights.ahead((4, lambda i=i: make(i)) for i in range(50)):
        with lock:
            there -= 1
        got.append(i)
    assert got == list(range(50))
    assert 2 <= most <= 4  # the one whose turn it is, two of four bytes, and one handed over


def test_a_result_above_the_limit_does_not_block(monkeypatch):
    monkeypatch.setattr(weights, "AHEAD_BYTES", 1)
    assert list(weights.ahead((size, lambda s=size: s) for size in (5, 100, 0, 7))) == [
        5,
        100,
        0,
        7,
    ]


def test_the_error_of_a_call_is_raised_in_its_turn():
    def fail() -> int:
        raise OSError("no space left")

    results = weights.ahead([(1, lambda: 1), (1, fail), (1, lambda: 3)])
    assert next(results) == 1
    with pytest.raises(OSError, match="no space left"):
        next(results)


def test_who_ends_early_waits_for_nothing_and_nothing_more_begins():
    begun, go_on = [], threading.Event()

    def make(i: int) -> int:
        begun.append(i)
        if i:
            go_on.wait(20)
        return i

    start = time.monotonic()
    results = weights.ahead((1, functools.partial(make, i)) for i in range(50))
    assert next(results) == 0
    results.close()
    assert time.monotonic() - start < 10
    go_on.set()
    time.sleep(0.2)
    assert len(begun) <= 1 + weights.THREADS


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("params/embed", (100_352, 4096), ()),
        ("params/lm_head", (4096, 100_352), ()),
        ("params/layers/mlp/w_gate", (2, 4096, 11_008), (slice(1, 2),)),
        ("params/layers/moe/w_up", (2, 64, 2048, 1024), (slice(0, 1), slice(8, 16))),
        ("params/layers/attn_norm", (2, 4096), (slice(0, 1),)),
        ("step", (), ()),
    ],
)
def test_blocks_are_whole_chunks_and_all_of_the_part(name, shape, part):
    leaf = jax.ShapeDtypeStruct(shape, np.dtype("float32"))
    chunk = layout.chunk_shape(name, leaf)
    at = 0
    for index in weights.blocks(name, leaf, part):
        ends = [along.indices(n)[:2] for along, n in zip(index, shape, strict=True)]
        assert index[: len(part)] == part
        assert weights.size(leaf, index) <= max(weights.PIECE_BYTES, 4 * np.prod(chunk))
        for (start, stop), n, length in zip(ends, chunk, shape, strict=True):
            assert start % n == 0
            assert stop % n == 0 or stop == length
        if len(shape) > len(part):
            rows, *rest = ends[len(part) :]
            assert rows[0] == at
            at = rows[1]
            assert all(
                end == (0, n) for end, n in itertools.zip_longest(rest, shape[len(part) + 1 :])
            )
    assert at == (shape[len(part)] if len(shape) > len(part) else 0)


class Torch:
    """A head as PyTorch has it, on the disk."""

    line, torch_layout, is_remote, model = "a head", True, False, ModelConfig(vocab_size=20_000)
    values = np.random.default_rng(0).standard_normal((20_000, 64), np.float32)

    def __init__(self):
        self.leaves = {"params/lm_head": jax.ShapeDtypeStruct((64, 20_000), np.dtype("float32"))}
        self.files, self.meta = {}, {}

    def view(self, name, index=None):
        return self.values.T[index or ()]

    def read(self, name, index=None):
        return np.ascontiguousarray(self.view(name, index))


@pytest.mark.parametrize(
    "made", [Padded(Torch(), 20_480), Mean([Torch(), Torch(), Torch()])], ids=["padded", "mean"]
)
def test_what_is_made_of_a_head_holds_no_copy_of_it_beside(made):
    name, whole = "params/lm_head", Torch.values.T
    tracemalloc.start()
    values = made.view(name)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.2 * whole.nbytes
    assert np.allclose(values[:, :20_000], whole, rtol=1e-6, atol=0)
    assert not values[:, 20_000:].any()
