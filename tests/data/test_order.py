import dataclasses
import hashlib
import itertools
import json
import types

import numpy as np
import pytest

from olmo_jax.config.data import FixedLength, batch_stages
from olmo_jax.data import order
from olmo_jax.data.fixed_length import FixedLengthSource
from olmo_jax.data.order import core_order, epoch_order, legacy_order
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import NoPlaceError, Position
from olmo_jax.data.token_files import TokenFiles


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/data_order.json").read_text())


def config(rows, **options):
    """Batches of so many rows of one token."""
    return FixedLength(**{"seq_len": 1, "global_batch_size": rows, **options})


def schedule(data, n_rows, start=None, first=0):
    """The batches of a file with so many rows, which is not there."""
    lengths = np.array([n_rows * data.seq_len])
    files = types.SimpleNamespace(lengths=lengths, paths=["a.npy"], dtype=np.dtype("u1"))
    return BatchSchedule(FixedLengthSource(files, data, 256), batch_stages(data), start, first)


def batch(o, i):
    """Rows of batch `i` from the start, and the position after it."""
    (ids, _), position = o.take(o.first + 1 + i)
    return ids, position


def take(o, n):
    return [batch(o, i)[0].tolist() for i in range(n)]


def is_permutation(ids, n):
    seen = np.zeros(n, bool)
    seen[ids] = True
    return len(ids) == n and seen.all()


# --- one epoch ------------------------------------------------------------------------------------


def test_the_generator_is_the_documented_one(golden):
    for case in golden["rng_pcg64"]:
        seed = case["seed"]
        words = np.random.SeedSequence(seed).generate_state(4, np.uint64)
        assert [str(w) for w in words] == case["seed_sequence_uint64x4"]
        draws = np.random.PCG64(seed).random_raw(4)
        assert [str(w) for w in draws] == case["first4_next64"]
        halves = [half for w in draws.tolist() for half in (w & 0xFFFFFFFF, w >> 32)]
        assert halves == case["first8_next32"]
        assert core_order(20, seed, 0).tolist() == case["shuffle_arange_20"]


def check_indices(found, case):
    assert found.dtype == np.uint32
    assert found[:16].tolist() == case["first16"]
    assert found[-4:].tolist() == case["last4"]
    digest = hashlib.sha256(found.astype("<u4").tobytes()).hexdigest()
    assert digest == case["sha256_uint32_le"]


def test_the_legacy_order_is_that_of_olmo(golden):
    for case in golden["legacy_global_indices"]:
        order = legacy_order(case["dataset_len"], case["seed"], case["epoch"])
        n, ranks = len(order), case["world_size"]  # a rest is dropped, or filled from the start
        size = n // ranks * ranks if case["drop_last"] else -(-n // ranks) * ranks
        assert size == case["total_size"]
        found = np.resize(order, size)
        check_indices(found, case)


def test_the_core_order_is_that_of_olmo_core(golden):
    for case in golden["core_fsl_global_indices"]:
        found = core_order(case["dataset_len"], case["seed"], case["epoch"], case["chunk_size"])
        assert len(found) == case["file_len"]
        check_indices(found, case)


@pytest.mark.parametrize("n", [1, 65_535, 65_536, 65_537, 20_000_000])
def test_every_order_holds_each_row_once(n):  # P21
    assert is_permutation(core_order(n, seed=3, epoch=1), n)


def test_a_chunked_order_holds_each_row_of_whole_chunks_once():
    assert is_permutation(core_order(65_539, 3, 1, chunk=4), 65_536)


def test_row_numbers_are_wide_enough():
    assert order._index_dtype(2**32) is np.uint32  # the largest is 2^32 - 1
    assert order._index_dtype(2**32 + 1) is np.uint64


def test_an_epoch_of_20_million_rows_is_made_once(monkeypatch):
    made = []
    real = order.core_order
    monkeypatch.setattr(order, "core_order", lambda *args: made.append(args) or real(*args))
    o = schedule(config(1000, seed=77), 20_000_000)
    for i in (0, 19_999, 7):
        assert len(batch(o, i)[0]) == 1000
    assert len(take(schedule(config(50, seed=77), 20_000_000), 1)[0]) == 50
    assert made == [(20_000_000, 77, 1, 1)]
    assert not epoch_order("core", 20_000_000, 77, 1).flags.writeable
    order._kept.cache_clear()  # 80 MB


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "core"])
def test_batches_and_shares_of_ranks_are_those_of_olmo(golden, kind):
    for case in golden[f"{kind}_batches" if kind == "legacy" else "core_fsl_batches"]:
        size = case["global_batch" if kind == "legacy" else "instances_per_global_batch"]
        start = Position(case["epoch"], case.get("start_index", 0), 0)
        o = schedule(config(size, order=kind, seed=case["seed"]), case["dataset_len"], start)
        ranks = case["batches_by_rank"]
        for rank, batches in enumerate(ranks):
            found = [batch[rank :: len(ranks)] for batch in take(o, len(batches))]
            assert found == batches


def test_a_batch_size_schedule_covers_the_rows_as_olmo_core_does(golden):
    case = golden["core_batch_size_change"]
    sizes = {"batch_sizes": (4, 8, 4), "batch_starts": (0, 16, 32)}
    o = schedule(config(1, seed=case["seed"], **sizes), case["dataset_len"])
    assert take(o, len(case["seq"])) == [ids for _, _, ids in case["seq"]]


def test_shorter_rows_keep_the_order_of_the_tokens(golden, tmp_path):
    case, toy = golden["core_seq_len_warmup"], golden["core_fsl_toy"]["files"]
    for name, ids in toy.items():
        np.array(ids, np.uint16).tofile(tmp_path / name)
    files = TokenFiles([str(tmp_path / name) for name in toy], np.dtype("<u2"))
    streams, starts = {}, {}
    for text, expected in case["by_sequence_length"].items():
        data = FixedLength(
            seq_len=int(text),
            global_batch_size=8,
            seed=case["seed"],
            max_target_seq_len=case["max_target_sequence_length"],
        )
        source = FixedLengthSource(files, data, 200)
        assert source.n_rows == expected["len"]
        o = BatchSchedule(source, batch_stages(data))
        found = [source.read(o.take(step)[0]).tokens for step in (1, 2, 3)]
        assert [batch.tolist() for batch in found] == expected["batches"]
        streams[data.seq_len] = np.concatenate(found).reshape(-1)
        starts[data.seq_len] = o.position(2)
    assert data.seq_len == 8
    stopped, options = dataclasses.asdict(starts[2]), {"seq_len": 2, "order": "core"}
    assert source.resume(stopped, options) == starts[8] == Position(1, 2, 16)
    of_legacy = {**options, "order": "legacy"}
    assert source.resume(stopped, of_legacy) == Position(2, 2, 16)  # which counts from 0
    with pytest.raises(ValueError, match=r"config\.data\.seq_len=8: .*3 rows of 4 tokens"):
        source.resume({"epoch": 1, "row": 3, "tokens": 12}, {"seq_len": 4, "order": "core"})
    for wrong in ({"batch": 3}, {**stopped, "row": "3"}):
        with pytest.raises(NoPlaceError):
            source.resume(wrong, options)


def test_hosts_and_a_resume_with_others_read_the_same_rows():
    n, size = 1003, 16
    whole = take(schedule(config(size), n), 62)
    for hosts in (1, 2, 4, 8):
        share = size // hosts
        for i in (0, 17, 61):
            parts = []
            for host in range(hosts):  # each in its own process, from its own arithmetic
                rows, _ = batch(schedule(config(size), n), i)
                parts += rows[host * share : (host + 1) * share].tolist()
            assert parts == whole[i]
    # In the middle of the epoch: eight hosts and another batch size go on where one stopped.
    stop = schedule(config(size), n).position(20)
    assert stop == Position(1, 320, 320)
    resumed = schedule(config(24), n, stop, 20)
    rest = [row for ids in take(resumed, 28) for row in ids]
    assert rest == [row for ids in whole for row in ids][320 : 320 + 28 * 24]
    epoch = core_order(n, config(size).seed, 1).tolist()
    assert [r for ids in whole[:20] for r in ids] + rest == epoch[: 320 + 28 * 24]


def simulate(data, n_rows, position, n_batches):
    """Batches step by step, as a trainer would count them."""
    stages = list(zip(data.batch_starts, data.batch_sizes, strict=True))
    for _ in range(n_batches):
        size = [size for start, size in stages if start <= position.tokens][-1]
        rows = size // data.seq_len
        if position.row + rows > n_rows:
            position = Position(position.epoch + 1, 0, position.tokens)
        order_of = core_order if data.order == "core" else legacy_order
        ids = order_of(n_rows, data.seed, position.epoch)
        ids = ids[position.row : position.row + rows]
        position = Position(position.epoch, position.row + rows, position.tokens + size)
        yield ids.tolist(), position


def test_arithmetic_equals_counting_step_by_step():
    rng = np.random.default_rng(0)
    for trial in range(40):
        seq_len, n_rows = int(rng.integers(1, 5)), int(rng.integers(8, 40))
        n_stages = int(rng.integers(1, 5))
        sizes = tuple(int(s) * seq_len for s in rng.integers(1, 9, n_stages))
        starts = (0, *np.cumsum(rng.integers(1, 150, n_stages - 1)).tolist())
        data = FixedLength(
            seq_len=seq_len,
            batch_sizes=sizes,
            batch_starts=starts,
            order=("core", "legacy")[trial % 2],
            seed=trial,
        )
        begin = schedule(data, n_rows).start
        if trial % 3 == 0:
            begin = Position(begin.epoch + 1, int(rng.integers(0, n_rows)), 37)
        o = schedule(data, n_rows, begin, 5)
        expected = list(simulate(data, n_rows, begin, 400))
        found = [batch(o, i) for i in range(400)]
        assert [(ids.tolist(), position) for ids, position in found] == expected
        positions = [begin, *(position for _, position in expected)]
        assert [o.position(5 + i) for i in range(401)] == positions
        # The end of a run: the first step after which its tokens, or epochs, are complete.
        for tokens in (1, 40, 200, 333):
            steps = next(i for i, p in enumerate(positions) if p.tokens >= tokens)
            assert o.last_step(tokens, "tokens") == 5 + steps
        first = order.FIRST_EPOCH[data.order]
        for epochs in range(1, positions[-1].epoch - first):
            steps = sum(p.epoch < first + epochs for _, p in expected)
            assert o.last_step(epochs, "epochs") == 5 + steps


def test_durations_are_those_of_olmo_core():
    o = schedule(config(16, seq_len=4), 103)  # batches of 4 rows
    assert o.last_step(7, "steps") == 7
    assert o.last_step(160, "tokens") == 10
    assert o.last_step(161, "tokens") == 11
    assert o.last_step(1, "epochs") == 25
    assert o.last_step(2, "epochs") == 50
    assert schedule(config(4, order="legacy"), 103).last_step(2, "epochs") == 50
    late = schedule(config(16, seq_len=4), 103, Position(1, 40, 160), 10)
    assert late.last_step(7, "steps") == 7
    assert late.last_step(160, "tokens") == 10
    assert late.last_step(2, "epochs") == 50
    assert late.last_step(5_000_000_000_000, "tokens") == 312_500_000_000


def test_the_rest_of_an_epoch_is_dropped_and_the_next_is_shuffled_anew():
    o = schedule(config(8, seed=6198), 50)
    batches = take(o, 18)
    assert [batch(o, i)[1].epoch for i in (5, 6, 17)] == [1, 2, 3]
    epochs = [list(itertools.chain(*batches[i : i + 6])) for i in (0, 6, 12)]
    assert all(len(set(rows)) == 48 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_too_few_rows_for_a_batch_are_told_in_numbers():
    message = (
        r"config\.data\.global_batch_size=4096 tokens needs 8 rows of seq_len=512, found 7 in"
        r" config\.data\.paths"
    )
    data = FixedLength(seq_len=512, global_batch_size=4096)
    with pytest.raises(ValueError, match=message):
        schedule(data, 7)
    grows = dataclasses.replace(data, batch_sizes=(512, 4096), batch_starts=(0, 10**9))
    with pytest.raises(ValueError, match=message):
        schedule(grows, 7)


def test_a_position_past_the_data_is_refused():
    with pytest.raises(ValueError, match=r"config\.data\.paths: .*row 51 of the epoch, found 50"):
        schedule(config(8), 50, Position(1, 51, 51))
