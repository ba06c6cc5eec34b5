import dataclasses
import json
import statistics
import threading
import time

import numpy as np
import pytest

from olmo_jax.config.data import DataConfig
from olmo_jax.data import token_files
from olmo_jax.data.documents import write_documents
from olmo_jax.data.loader import Loader
from olmo_jax.data.order import DataOrder, Position

SEQ, ROWS, EOS = 16, 8, 0


@pytest.fixture
def data(tmp_path):
    """Two files of 103 and 40 rows and a bit, documents of random lengths."""
    rng = np.random.default_rng(0)
    for name, n in (("a", 103), ("b", 40)):
        lengths = rng.integers(0, 40, n // 2)
        documents = [[*rng.integers(1, 200, length), EOS] for length in lengths]
        documents.append([1] * (n * SEQ + 5 - sum(map(len, documents))))
        write_documents(tmp_path / f"{name}.npy", documents, np.uint8)
    return DataConfig(
        paths=("a.npy", "b.npy"), root=str(tmp_path), seq_len=SEQ, global_batch_size=ROWS * SEQ
    )


def in_memory(data):
    """The rows of the files, and those of each batch, without a loader."""
    parts = [np.fromfile(f"{data.root}/{path}", np.uint8) for path in data.paths]
    rows = np.concatenate([p[: len(p) // SEQ * SEQ].reshape(-1, SEQ) for p in parts])
    return rows.astype(np.int32), DataOrder(data, len(rows))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (batch, position), (other, there) in zip(found, expected, strict=True):
        assert position == there
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_batches_hold_the_rows_of_the_order_with_their_targets_and_weights(data):
    rows, order = in_memory(data)
    loader = Loader(data, 200, n_steps=40)  # more than two epochs
    assert (loader.n_instances, loader.steps_per_epoch) == (143, 17)
    batches = list(loader)
    assert len(batches) == 40
    for i, (batch, position) in enumerate(batches):
        ids, after = order.batch(i)
        assert position == after
        assert sorted(batch) == ["loss_weights", "targets", "tokens"]
        np.testing.assert_array_equal(batch["tokens"], rows[ids])
        np.testing.assert_array_equal(batch["targets"][:, :-1], rows[ids][:, 1:])
        assert not batch["targets"][:, -1].any()
        np.testing.assert_array_equal(batch["loss_weights"], [[1] * 15 + [0]] * ROWS)
        assert [a.dtype for a in batch.values()] == [np.int32, np.int32, np.float32]
    assert batches[-1][1] == Position(3, 6 * ROWS, 40 * ROWS * SEQ)


@pytest.mark.parametrize("mask", ["none", "boundaries"])
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 3), (3, 50)])
def test_a_resumed_loader_goes_on_with_the_same_batches(data, threads, prefetch, mask):
    data = dataclasses.replace(data, threads=threads, prefetch=prefetch, document_mask=mask)
    whole = list(Loader(data, 200, n_steps=40))
    for stop in (1, 16, 17, 25):
        rest = Loader(data, 200, position=whole[stop - 1][1], n_steps=40 - stop)
        assert_same(list(rest), whole[stop:])


def test_hosts_together_read_the_global_batch(data):
    whole = list(Loader(data, 200, n_steps=5))
    for hosts in (2, 4, 8):
        shares = [np.arange(ROWS)[host::hosts] for host in range(hosts)]
        loaders = [Loader(data, 200, lambda n, s=s: s, n_steps=5) for s in shares]
        for (batch, position), *parts in zip(whole, *loaders, strict=True):
            for share, (part, there) in zip(shares, parts, strict=True):
                assert there == position
                for name in batch:
                    np.testing.assert_array_equal(part[name], batch[name][share])


def test_a_batch_size_schedule_changes_the_batches_and_what_a_host_reads(data):
    stages = {"batch_sizes": (4 * SEQ, 8 * SEQ), "batch_starts": (0, 100)}
    loader = Loader(dataclasses.replace(data, **stages), 200, lambda n: np.arange(n // 2), None, 4)
    assert [len(batch["tokens"]) for batch, _ in loader] == [2, 2, 4, 4]


def test_documents_from_eos_and_from_the_side_files_are_the_same(data):
    by_eos = dataclasses.replace(data, document_mask="eos", eos_id=EOS)
    found = list(Loader(by_eos, 200, n_steps=17))
    by_file = dataclasses.replace(data, document_mask="boundaries")
    assert_same(list(Loader(by_file, 200, n_steps=17)), found)
    for batch, _ in found:
        for row, segment, place in zip(
            batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
        ):
            expected, at = [(0, 0)], 0
            for before in row[:-1]:
                at = 0 if before == EOS else at + 1
                expected.append((expected[-1][0] + (before == EOS), at))
            assert list(zip(segment, place, strict=True)) == expected
        assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32


@pytest.mark.parametrize("repetitive", [[3], range(8)])
def test_filtered_rows_keep_their_tokens_and_lose_their_weights(tmp_path, repetitive):  # P02
    rows = np.random.default_rng(0).integers(0, 200, (8, 64))
    rows[list(repetitive)] = 7
    rows.astype(np.uint8).tofile(tmp_path / "a.npy")
    data = DataConfig(
        paths=(str(tmp_path / "a.npy"),),
        seq_len=64,
        global_batch_size=512,
        instance_filter=True,
    )
    batch, _ = Loader(data, 200).batch(0)
    ids = DataOrder(data, 8).batch(0)[0]
    masked = np.isin(ids, list(repetitive))
    np.testing.assert_array_equal(batch["tokens"], rows[ids])
    np.testing.assert_array_equal(batch["loss_weights"][:, :-1].any(axis=1), ~masked)
    assert batch["loss_weights"].sum() == 63 * (8 - len(repetitive))
    off = Loader(dataclasses.replace(data, instance_filter=False), 200)
    assert off.batch(0)[0]["loss_weights"].sum() == 63 * 8


def test_durations_and_fingerprint_come_with_the_loader(data, shared, tmp_path):
    loader = Loader(data, 200)
    assert loader.steps_for(2, "epochs") == 34
    assert loader.steps_for(1000, "tokens") == 8
    assert Loader(data, 200, position=loader.order.position(3)).steps_for(2, "epochs", 3) == 34
    toy = json.loads((shared / "golden/data_order.json").read_text())["core_fsl_toy"]
    (tmp_path / "toy").mkdir()
    for name, ids in toy["files"].items():
        np.array(ids, np.uint16).tofile(tmp_path / "toy" / name)
    data = dataclasses.replace(
        data, root=str(tmp_path / "toy"), seq_len=4, global_batch_size=4, dtype="uint16", eos_id=5
    )
    loader = Loader(data, 32_000)
    assert loader.n_instances == len(toy["instances"])
    assert loader.fingerprint == token_files.fingerprint(loader.files, 32_000, 5)
    assert loader.fingerprint != Loader(dataclasses.replace(data, eos_id=6), 32_000).fingerprint


@pytest.mark.parametrize(
    ("options", "vocab_size", "message"),
    [
        ({"paths": ("c.npy",)}, 200, r"config\.data\.paths: no such token file: .*c\.npy"),
        ({"dtype": "uint16"}, 200, r"config\.data\.paths: .*a\.npy has 1653 bytes, no multiple"),
        ({"paths": ("b.npy",)}, 100, r"b\.npy has id \d+ at token \d+, need ids below"),
        ({"document_mask": "eos", "eos_id": 255}, 200, r"config\.data\.eos_id=255 never occurs"),
        ({"global_batch_size": 144 * SEQ}, 200, r"global_batch_size=2304 .* 144 rows.*found 143"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(data, options, vocab_size, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Loader(dataclasses.replace(data, **options), vocab_size)


def test_an_error_of_a_thread_reaches_the_caller_as_it_was_raised(data, tmp_path):
    loader = Loader(data, 200, n_steps=40)
    row = loader.order.batch(5)[0][2]
    file, offset = loader.instances.locate(row)
    with open(loader.files.paths[file], "r+b") as opened:  # behind the loader's back
        opened.seek(offset + 3)
        opened.write(b"\xfa")
    given = []
    message = rf"has id 250 at token {offset + 3}, need ids below config\.model\.vocab_size=200"
    with pytest.raises(ValueError, match=message):
        given.extend(loader)
    assert len(given) == 5


def test_leaving_the_loop_ends_the_threads(data):
    before = set(threading.enumerate())
    for _ in Loader(data, 200):
        break
    batches = iter(Loader(data, 200))
    next(batches)
    batches.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_no_batches_are_given_where_none_are_left(data):
    assert list(Loader(data, 200, n_steps=0)) == []


def test_the_wait_for_data_is_measured(data):
    def slow(n):
        time.sleep(0.03)
        return np.arange(n)

    loader = Loader(dataclasses.replace(data, threads=1, prefetch=1), 200, slow)
    batches = iter(loader)
    idle = [loader.wait_s for _ in range(10) if next(batches)]
    assert 0.1 < sum(idle) < 60
    busy = []
    for _ in range(5):
        time.sleep(0.1)  # as a step would take
        next(batches)
        busy.append(loader.wait_s)
    assert min(busy) < 0.02
    batches.close()


def test_a_batch_costs_the_main_thread_under_a_millisecond(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, 2**20).astype(np.uint16)
    ids.tofile(tmp_path / "a.npy")
    paths = (str(tmp_path / "a.npy"),)
    data = DataConfig(paths=paths, seq_len=512, global_batch_size=2048, instance_filter=True)
    batches, spent = iter(Loader(data, 4096)), []
    for _ in range(200):
        began = time.thread_time()
        next(batches)
        spent.append(time.thread_time() - began)
    batches.close()
    assert statistics.median(spent) < 0.5e-3
