"""The protocol of a source carries batches of differing row length, through the loop too."""

import dataclasses

import numpy as np
import pytest
import runs

from olmo_jax.data.loader import Loader
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import Position, Rows, Take
from olmo_jax.training import loop, start

LENGTHS = (16, 32)  # of a batch of 128 tokens 8 rows and 4 rows, in turn
N_BATCHES = 10  # of an epoch


class TwoLengths:
    """A toy source: batches of short rows and of long rows in turn; `row` counts batches."""

    fingerprint = "two lengths"
    n_rows = N_BATCHES // 2 * (8 + 4)

    def start(self):
        return Position(0, 0, 0)

    def after(self, at, batch_tokens, n):
        epochs, row = divmod(at.row + n - 1, N_BATCHES)
        return Position(at.epoch + epochs, row + 1, at.tokens + n * batch_tokens) if n else at

    def take(self, at, batch_tokens):
        after = self.after(at, batch_tokens, 1)
        seq_len = LENGTHS[(after.row - 1) % 2]
        n = batch_tokens // seq_len
        return Take((after.row - 1) * 8 + np.arange(n), seq_len), after

    def left(self, at, batch_tokens, epochs):
        return max(0, (epochs - at.epoch) * N_BATCHES - at.row)

    def read(self, take):
        tokens = take.ids[:, None] + np.arange(take.seq_len)[None]
        starts = np.zeros(tokens.shape, bool)
        starts[:, take.seq_len // 2] = True
        return Rows(tokens.astype(np.int32), None, starts)

    def resume(self, position, data):
        return Position(**position)


def test_batches_of_two_lengths_come_in_turn_on_any_number_of_hosts():
    schedule = BatchSchedule(TwoLengths(), [(0, 128)])
    assert (schedule.last_step(3, "epochs"), schedule.last_step(1000, "tokens")) == (30, 8)
    whole = list(Loader(schedule).steps(0, 25))
    shapes = [read.batch["tokens"].shape for read in whole]
    assert shapes == [(8, 16), (4, 32)] * 12 + [(8, 16)]
    assert [read.n_rows for read in whole] == [8, 4] * 12 + [8]
    assert whole[-1].position == Position(2, 5, 25 * 128) == schedule.position(25)
    for read in whole[:2]:
        seq_len = read.batch["tokens"].shape[1]
        half = np.arange(seq_len // 2)
        np.testing.assert_array_equal(read.batch["positions"], [[*half, *half]] * read.n_rows)
        assert read.batch["loss_weights"].sum() == 128 - read.n_rows

    for hosts in (2, 4):
        for host in range(hosts):
            part = Loader(schedule, lambda n, h=host, k=hosts: np.arange(n)[h::k]).steps(0, 25)
            for read, all_rows in zip(part, whole, strict=True):
                assert (read.n_rows, read.position) == (all_rows.n_rows, all_rows.position)
                for name, array in read.batch.items():
                    np.testing.assert_array_equal(array, all_rows.batch[name][host::hosts])

    for stop in (1, 10, 13):
        resumed = BatchSchedule(TwoLengths(), [(0, 128)], whole[stop - 1].position, stop)
        rest = [read.batch["tokens"] for read in Loader(resumed).steps(stop, 25)]
        for found, expected in zip(rest, whole[stop:], strict=True):
            np.testing.assert_array_equal(found, expected.batch["tokens"])


@pytest.mark.slow
def test_the_loop_trains_on_two_lengths_and_resumes(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(start, "open_source", lambda data, vocab_size: TwoLengths())
    losses = []

    def record(self, pending, real=loop.Run.record):
        real(self, pending)
        if pending is not None:
            losses.append((pending.at, float(pending.report.loss), pending.tokens))

    monkeypatch.setattr(loop.Run, "record", record)
    options = ["data.paths=none.npy", "data.seq_len=32", "data.global_batch_size=128",
               "mesh.fsdp=4", "mesh.tensor=2", "train.duration=6", "checkpoint.interval=3",
               "optim.lr=0.05", "optim.schedule.warmup=0",
               f"compute.compilation_cache={compiled}"]  # fmt: skip
    whole = runs.run(*options, f"dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    for n in (8, 4):
        assert whole.out.count(f"compiling the step for batches of {n} rows") == 1
    expected, losses[:] = losses.copy(), []
    assert [(at, tokens) for at, _, tokens in expected] == [(i, i * 128) for i in range(1, 7)]
    assert abs(expected[0][1] - np.log(512)) < 0.2
    assert len({loss for _, loss, _ in expected}) == 6

    first = runs.run(*options, f"dir={tmp_path / 'half'}", "train.hard_stop=3")
    assert first.code == 0, first.err
    rest = runs.run(*options, f"dir={tmp_path / 'half'}")
    assert rest.code == 0, rest.err
    assert losses == expected


def test_positions_are_plain_integers():
    assert [f.type for f in dataclasses.fields(Position)] == [int, int, int]
