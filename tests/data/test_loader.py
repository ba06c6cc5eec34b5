import dataclasses
import json
import statistics
import threading
import time

import numpy as np
import pytest

from olmo_jax.config.data import FixedLength, batch_stages
from olmo_jax.data import token_files
from olmo_jax.data.documents import write_documents
from olmo_jax.data.loader import Loader
from olmo_jax.data.open import open_source
from olmo_jax.data.order import core_order
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import Position

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
    return FixedLength(
        paths=("a.npy", "b.npy"), root=str(tmp_path), seq_len=SEQ, global_batch_size=ROWS * SEQ
    )


def in_memory(data):
    """The rows of the files, without a loader."""
    parts = [np.fromfile(f"{data.root}/{path}", np.uint8) for path in data.paths]
    rows = np.concatenate([p[: len(p) // SEQ * SEQ].reshape(-1, SEQ) for p in parts])
    return rows.astype(np.int32)


def schedule(data, vocab_size=200, position=None, first=0):
    return BatchSchedule(open_source(data, vocab_size), batch_stages(data), position, first)


def loader(data, rows_of=np.arange, **where):
    return Loader(schedule(data, **where), rows_of, data.n_threads, data.prefetch)


def reads(data, last, rows_of=np.arange, **where):
    """(batch, position after it) of the steps up to `last`."""
    found = loader(data, rows_of, **where).steps(where.get("first", 0), last)
    return [(read.batch, read.position) for read in found]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (batch, position), (other, there) in zip(found, expected, strict=True):
        assert position == there
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_batches_hold_the_rows_of_the_order_with_their_targets_and_weights(data):
    rows = in_memory(data)
    assert open_source(data, 200).n_rows == len(rows) == 143
    batches = reads(data, 40)  # more than two epochs, of 17 batches each
    assert len(batches) == 40
    for i, (batch, position) in enumerate(batches):
        epoch, at = 1 + i // 17, i % 17 * ROWS
        ids = core_order(143, data.seed, epoch)[at : at + ROWS]
        assert position == Position(epoch, at + ROWS, (i + 1) * ROWS * SEQ)
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
    data = dataclasses.replace(data, n_threads=threads, prefetch=prefetch, document_mask=mask)
    whole = reads(data, 40)
    for stop in (1, 16, 17, 25):
        rest = reads(data, 40, position=whole[stop - 1][1], first=stop)
        assert_same(rest, whole[stop:])


def test_hosts_together_read_the_global_batch(data):
    whole = reads(data, 5)
    for hosts in (2, 4, 8):
        shares = [np.arange(ROWS)[host::hosts] for host in range(hosts)]
        parts_of = [reads(data, 5, lambda n, s=s: s) for s in shares]
        for (batch, position), *parts in zip(whole, *parts_of, strict=True):
            for share, (part, there) in zip(shares, parts, strict=True):
                assert there == position
                for name in batch:
                    np.testing.assert_array_equal(part[name], batch[name][share])


def test_a_batch_size_schedule_changes_the_batches_and_what_a_host_reads(data):
    stages = {"batch_sizes": (4 * SEQ, 8 * SEQ), "batch_starts": (0, 100)}
    half = loader(dataclasses.replace(data, **stages), lambda n: np.arange(n // 2))
    sizes = [(len(read.batch["tokens"]), read.n_rows) for read in half.steps(0, 4)]
    assert sizes == [(2, 4), (2, 4), (4, 8), (4, 8)]


def test_documents_from_eos_and_from_the_side_files_are_the_same(data):
    by_eos = dataclasses.replace(data, document_mask="eos", eos_id=EOS)
    found = reads(by_eos, 17)
    by_file = dataclasses.replace(data, document_mask="boundaries")
    assert_same(reads(by_file, 17), found)
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
    data = FixedLength(
        paths=(str(tmp_path / "a.npy"),),
        seq_len=64,
        global_batch_size=512,
        instance_filter=True,
    )
    batch = loader(data).read(1).batch
    ids = core_order(8, data.seed, 1)
    masked = np.isin(ids, list(repetitive))
    np.testing.assert_array_equal(batch["tokens"], rows[ids])
    np.testing.assert_array_equal(batch["loss_weights"][:, :-1].any(axis=1), ~masked)
    assert batch["loss_weights"].sum() == 63 * (8 - len(repetitive))
    off = loader(dataclasses.replace(data, instance_filter=False))
    assert off.read(1).batch["loss_weights"].sum() == 63 * 8


def test_durations_and_fingerprint_come_with_the_source(data, shared, tmp_path):
    steps = schedule(data)
    assert steps.last_step(2, "epochs") == 34
    assert steps.last_step(1000, "tokens") == 8
    assert schedule(data, position=steps.position(3), first=3).last_step(2, "epochs") == 34
    toy = json.loads((shared / "golden/data_order.json").read_text())["core_fsl_toy"]
    (tmp_path / "toy").mkdir()
    for name, ids in toy["files"].items():
        np.array(ids, np.uint16).tofile(tmp_path / "toy" / name)
    data = dataclasses.replace(
        data, root=str(tmp_path / "toy"), seq_len=4, global_batch_size=4, dtype="uint16", eos_id=5
    )
    source = open_source(data, 32_000)
    assert source.n_rows == len(toy["instances"])
    paths = [str(tmp_path / "toy" / path) for path in data.paths]
    files = token_files.TokenFiles(paths, np.dtype("<u2"))
    assert source.fingerprint == token_files.fingerprint(files, 32_000, 5)
    other = open_source(dataclasses.replace(data, eos_id=6), 32_000)
    assert source.fingerprint != other.fingerprint


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
        schedule(dataclasses.replace(data, **options), vocab_size)


def test_an_error_of_a_thread_reaches_the_caller_as_it_was_raised(data, tmp_path):
    steps = loader(data).steps(0, 40)
    plan = schedule(data)
    file, offset = plan.source.locate(plan.take(6)[0].ids[2])
    with open(tmp_path / data.paths[file], "r+b") as opened:  # behind the loader's back
        opened.seek(offset + 3)
        opened.write(b"\xfa")
    given = []
    message = rf"has id 250 at token {offset + 3}, need ids below config\.model\.vocab_size=200"
    with pytest.raises(ValueError, match=message):
        given.extend(steps)
    assert len(given) == 5


def test_leaving_the_loop_ends_the_threads(data):
    before = set(threading.enumerate())
    for _ in loader(data).steps(0, 40):
        break
    batches = loader(data).steps(0, 10**9)
    next(batches)
    batches.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before


def test_no_batches_are_given_where_none_are_left(data):
    assert reads(data, 7, first=7) == []


def test_the_wait_for_data_is_measured(data):
    def slow(n):
        time.sleep(0.03)
        return np.arange(n)

    batches = loader(dataclasses.replace(data, n_threads=1, prefetch=1), slow).steps(0, 100)
    idle = [next(batches).waited_s for _ in range(10)]
    assert 0.1 < sum(idle) < 60
    busy = []
    for _ in range(5):
        time.sleep(0.1)  # as a step would take
        busy.append(next(batches).waited_s)
    assert min(busy) < 0.02
    batches.close()


def test_a_batch_costs_the_main_thread_under_a_millisecond(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4096, 2**20).astype(np.uint16)
    ids.tofile(tmp_path / "a.npy")
    paths = (str(tmp_path / "a.npy"),)
    data = FixedLength(paths=paths, seq_len=512, global_batch_size=2048, instance_filter=True)
    batches, spent = loader(data, vocab_size=4096).steps(0, 1000), []
    for _ in range(200):
        began = time.thread_time()
        next(batches)
        spent.append(time.thread_time() - began)
    batches.close()
    assert statistics.median(spent) < 0.5e-3
