"""A run that was stopped goes on as if it had not been, or says what is different."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections import Counter

import jax
import numpy as np
import pytest
import runs
import small_run
from test_writer import Tracker, scalars

from olmo_jax import files, plot, train
from olmo_jax.checkpoints import layout, storage
from olmo_jax.config.run import load
from olmo_jax.config.training import ScheduleConfig
from olmo_jax.curation import stdlib
from olmo_jax.data import loader
from olmo_jax.parallel import processes
from olmo_jax.records import jsonl
from olmo_jax.training import keeping, loop, pacing, schedules, start

pytestmark = pytest.mark.slow  # each is a run or two

# The guard's history is a part of the state, held-out losses are a part of the records.
RUN = "optim.name=skip_step_adamw eval.interval=5 eval.batch_rows=8 eval.max_rows=8".split()
BATCH = 8 * 64  # tokens

KILL_AT_13 = """
import json, os, pathlib, signal, sys
from olmo_jax.training import loop
from test_writer import Tracker
sys.modules["wandb"] = tracker = Tracker()
record = loop.Run.record
def killing(self, pending):
    record(self, pending)
    if pending is not None and pending[0] == 13:
        self.keeper.checkpointer.finish()
        folder = pathlib.Path(self.keeper.checkpointer.folder.parent)
        (folder / "tracker.json").write_text(json.dumps(tracker.history))
        os.kill(os.getpid(), signal.SIGKILL)
loop.Run.record = killing
"""
KILL_IN_SAVE_OF_10 = """
import os, signal, time
from olmo_jax.checkpoints import storage
write, count = storage.ArrayWriter.write, 0
def slow(self, *args):
    global count
    write(self, *args)
    if self.folder.name == "step10":
        time.sleep(0.1)
        count += 1
        if count == 10:
            os.kill(os.getpid(), signal.SIGKILL)
storage.ArrayWriter.write = slow
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory, compiled) -> list[str]:
    """What all runs of this file have in common; their folder is missing."""
    folder = tmp_path_factory.mktemp("data")
    tokens = runs.write_tokens(folder / "tokens.npy")
    heldout = runs.write_tokens(folder / "heldout.npy", 1000, seed=1)
    return [f"data.paths={tokens}", f"eval.paths={heldout}",
            f"compute.compilation_cache={compiled}", *RUN]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options) -> pathlib.Path:
    """The folder of a run that was never stopped: 20 steps, checkpoints at 0, 10 and 20."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run(*options, f"dir={folder}").code == 0
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, options) -> pathlib.Path:
    """The folder of a run that was killed after step 13."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = runs.flags(*options, f"dir={folder}", "log.wandb=true")
    with runs.processes(runs.start(*arguments, code=KILL_AT_13)) as (process,):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, errors
    return folder


@pytest.fixture
def half(killed, tmp_path) -> pathlib.Path:
    """The killed run, to go on with."""
    return pathlib.Path(shutil.copytree(killed, tmp_path / "half" / "run"))


def lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(folder: pathlib.Path, *, last: int = 20) -> dict[int, dict[str, float]]:
    """The records up to a step, without what depends on the clock."""

    def is_fact(name: str) -> bool:
        return name.startswith(("train/", "optim/", "eval/")) or name == "throughput/total tokens"

    return {step: {name: value for name, value in found.items() if is_fact(name)}
            for step, found in jsonl.read(folder).items() if step <= last}  # fmt: skip


def kept(folder: pathlib.Path) -> dict[str, bool]:
    """The checkpoints of a run, and whether each says that it is confirmed."""
    paths = (files.path(p) for p in (folder / "checkpoints").iterdir())
    return {path.name: layout.is_confirmed(path) for path in paths}


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a complete checkpoint by name."""
    tree: dict = {}
    for name, leaf in layout.tree_of(files.path(folder)).items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return storage.names(storage.restore(files.path(folder), tree))


def rate(step: int, lr: float) -> float:
    """Learning rate of the tiny config: two steps of warm-up, a cosine to a tenth at step 20."""
    if step < 2:
        return lr * step / 2
    return 0.1 * lr + 0.9 * lr * (1 + math.cos(math.pi * (step - 2) / 18)) / 2


# --- bit for bit ----------------------------------------------------------------------------------


def test_a_killed_run_goes_on_bit_for_bit_and_no_step_is_doubled(half, whole, options):  # P37
    assert max(jsonl.read(half)) == 13
    assert sorted(p.name for p in (half / "checkpoints").iterdir()) == ["step0", "step10"]
    result = runs.run(*options, f"dir={half}")
    assert (result.code, result.err) == (0, "")
    assert "resuming after step 10" in result.out
    assert "training steps 11 to 20" in result.out

    newest = "checkpoints/step20"
    stored = runs.arrays(whole / newest)
    assert len(stored) > 400
    assert runs.arrays(half / newest) == stored
    metas = [layout.read_meta(files.path(f / newest)) for f in (half, whole)]
    assert metas[0]["position"] == metas[1]["position"]

    assert values(half) == values(whole)
    assert sorted(values(half)) == [*range(21)]
    steps = [line["step"] for line in lines(half)]
    assert steps == sorted(steps)
    for metric in ("train/CE loss", "eval/lm/heldout/CE loss"):
        once = Counter(line["step"] for line in lines(half) if metric in line)
        assert set(once.values()) == {1}
        expected = [(step, v[metric]) for step, v in values(whole).items() if metric in v]
        assert scalars(half / "tensorboard", metric) == expected
    assert [s for s, _ in scalars(half / "tensorboard", "train/CE loss")] == [*range(1, 21)]


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path, whole, options, monkeypatch):
    folder, score = tmp_path / "run", loop.Run.evaluate

    def failing(self, state, at, max_rows):
        if at == 10:
            raise OSError("killed here")
        return score(self, state, at, max_rows)

    monkeypatch.setattr(loop.Run, "evaluate", failing)
    assert runs.run(*options, f"dir={folder}").errors == ["killed here; step 10 is saved"]
    monkeypatch.undo()
    assert runs.run(*options, f"dir={folder}").code == 0
    assert values(folder) == values(whole)
    for metric in ("train/CE loss", "eval/lm/heldout/CE loss"):
        expected = [(step, v[metric]) for step, v in values(whole).items() if metric in v]
        assert scalars(folder / "tensorboard", metric) == expected


def test_a_run_killed_within_a_save_goes_on_from_the_one_before(tmp_path, whole, options):  # P13
    folder, keep = tmp_path / "run", ["checkpoint.interval=5", "checkpoint.keep=1"]
    arguments = runs.flags(*options, *keep, f"dir={folder}")
    with runs.processes(runs.start(*arguments, code=KILL_IN_SAVE_OF_10)) as (process,):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, errors
    checkpoints = folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step10", "step5"]
    assert not layout.is_complete(files.path(checkpoints / "step10"))
    result = runs.run(*options, *keep, f"dir={folder}")
    assert result.code == 0
    assert "resuming after step 5" in result.out
    assert kept(folder) == {"step15": True, "step20": False}
    assert runs.arrays(checkpoints / "step20") == runs.arrays(whole / "checkpoints/step20")
    assert values(folder) == values(whole)


def test_a_run_goes_on_with_another_mesh(half, whole, options):
    result = runs.run(*options, f"dir={half}", "mesh.tensor=2")
    assert result.code == 0
    assert "changed since the checkpoint: config.mesh.tensor: 1 -> 2" in result.out
    for step, expected in values(whole).items():
        for name, value in values(half)[step].items():
            assert value == pytest.approx(expected[name], rel=2e-5), (step, name)
    ours, theirs = (stored(folder / "checkpoints/step20") for folder in (half, whole))
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_hard_stop_ends_early_without_changing_the_schedule(tmp_path, whole, options):
    folder = tmp_path / "run"
    result = runs.run(*options, f"dir={folder}", "train.hard_stop=7")
    assert result.code == 0
    assert "training steps 1 to 7" in result.out
    assert "step7" in os.listdir(folder / "checkpoints")
    stop = f"train.hard_stop={11 * BATCH}", "train.hard_stop_unit=tokens"
    assert "training steps 8 to 11" in runs.run(*options, f"dir={folder}", *stop).out
    result = runs.run(*options, f"dir={folder}")
    assert f"config.train.hard_stop: {11 * BATCH} -> None" in result.out
    assert runs.arrays(folder / "checkpoints/step20") == runs.arrays(whole / "checkpoints/step20")
    trained = {step: v["train/CE loss"] for step, v in values(whole).items() if step}
    assert {step: v["train/CE loss"] for step, v in values(folder).items() if step} == trained


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_one_step_and_the_run_goes_on(
    tmp_path, whole, options, monkeypatch, number
):
    folder, record = tmp_path / "run", loop.Run.record

    def signalling(self, pending):
        record(self, pending)
        if pending is not None and pending[0] == 12:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.Run, "record", signalling)
    result = runs.run(*options, f"dir={folder}")
    assert result.code == 75
    assert "stopped: saved step 13; the same command goes on from there" in result.out
    assert max(jsonl.read(folder)) == 13
    monkeypatch.undo()
    checkpoints = folder / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"step0", "step10", "step13"}
    if number == signal.SIGINT:
        return
    assert runs.run(*options, f"dir={folder}").code == 0
    # No loss after step 20 tells whether its parameters are good.
    assert {p.name for p in checkpoints.iterdir()} == {"step0", "step10", "step13", "step20"}
    assert runs.arrays(checkpoints / "step20") == runs.arrays(whole / "checkpoints/step20")
    assert values(folder) == values(whole)


def test_a_signal_at_start_saves_the_first_step(tmp_path, options, monkeypatch):
    begin = start.initial_state

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        return begin(*args)

    monkeypatch.setattr(start, "initial_state", signalled)
    result = runs.run(*options, f"dir={tmp_path}/run")
    assert result.code == 75
    assert "stopped: saved step 1;" in result.out


@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_save_is_waited_for(tmp_path, options, monkeypatch, stopped):  # P10
    write, record, last = storage.ArrayWriter.write, loop.Run.record, 5 if stopped else 7

    def slow(self, *args):
        if self.folder.name == f"step{last}":
            time.sleep(0.002)
        write(self, *args)

    def stopping(self, pending):
        record(self, pending)
        if stopped and pending is not None and pending[0] == 5:
            signal.raise_signal(signal.SIGTERM)

    final = {}
    save = keeping.Keeper.save

    def saving(self, state, at, *args):
        if at == last:
            final.update(storage.names({"params": jax.device_get(state.params)}))
        save(self, state, at, *args)

    monkeypatch.setattr(storage.ArrayWriter, "write", slow)
    monkeypatch.setattr(loop.Run, "record", stopping)
    monkeypatch.setattr(keeping.Keeper, "save", saving)
    result = runs.run(*options, f"dir={tmp_path}/run", "train.duration=7", "checkpoint.interval=5")
    assert result.code == (75 if stopped else 0)
    saved = stored(tmp_path / f"run/checkpoints/step{last}")
    assert {name for name in saved if name.startswith("params/")} == final.keys()
    for name, array in final.items():
        assert saved[name].tobytes() == array.tobytes(), name


# --- a changed config -----------------------------------------------------------------------------


def test_the_learning_rate_follows_the_config_and_the_dead_timeline_is_gone(
    half, killed, whole, options
):  # P07, P37
    result = runs.run(*options, f"dir={half}", "optim.lr=5e-4", "train.hard_stop=14")
    assert result.code == 0
    assert "changed since the checkpoint: config.optim.lr: 0.001 -> 0.0005" in result.out
    for step, found in values(half).items():
        if step:
            lr = found["optim/LR (group 0)"]
            assert lr == pytest.approx(rate(step, 1e-3 if step <= 10 else 5e-4), rel=1e-9, abs=0)
    assert all(v["optim/LR (group 0)"] == pytest.approx(rate(step, 1e-3), rel=1e-9, abs=0)
               for step, v in values(whole).items() if step)  # fmt: skip
    dead, new, straight = (values(folder) for folder in (killed, half, whole))
    for step in (11, 12, 13):
        assert dead[step] == straight[step]
        # The rate of step 11 shows in the loss of step 12.
        assert (new[step]["train/CE loss"] == dead[step]["train/CE loss"]) == (step == 11)
    expected = [(step, v["train/CE loss"]) for step, v in new.items() if step]
    assert scalars(half / "tensorboard", "train/CE loss") == expected


def test_a_tracker_gets_one_value_per_step_under_one_id(half, whole, options, monkeypatch):  # P37
    tracker = Tracker()
    history = json.loads((half / "tracker.json").read_text())
    tracker.history = {name: {int(s): row for s, row in rows.items()}
                       for name, rows in history.items()}  # fmt: skip
    (rows,) = tracker.history.values()
    assert max(rows) == 13
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert runs.run(*options, f"dir={half}", "log.wandb=true").code == 0
    ((name, rows),) = tracker.history.items()
    assert tracker.dropped == []
    assert tracker.inits[0]["resume_from"] == f"{name}?_step=10"
    losses = {row["step"]: row["train/CE loss"] for row in rows.values() if "train/CE loss" in row}
    assert losses == {step: v["train/CE loss"] for step, v in values(whole).items() if step}
    assert list(losses) == [*range(1, 21)]


@pytest.mark.parametrize(
    ("option", "old"),
    [
        ("model.rope_theta=10000.0", "500000.0"),
        ("model.norm_eps=1e-05", "1e-06"),
        ("model.qk_norm=none", "'full'"),
        ("model.clip_qkv=8.0", "None"),
    ],
)
def test_a_change_of_the_function_is_refused_unless_allowed(whole, options, option, old):
    before, key = runs.contents(whole), option.partition("=")[0]
    result = runs.run(*options, f"dir={whole}", option)
    assert result.code == 1
    (line,) = result.errors
    assert f"config.{key}=" in line
    assert f"but the checkpoint was trained with {old}" in line
    assert "config.checkpoint.allow_changes" in line
    result = runs.run(*options, f"dir={whole}", option, f"checkpoint.allow_changes={key}")
    assert result.code == 0
    assert f"changed since the checkpoint: config.{key}: {old} -> " in result.out
    assert runs.contents(whole) == before


def test_another_order_of_the_data_is_told(whole, options, tmp_path):
    tokens = pathlib.Path(options[0].partition("=")[2])
    longer = tmp_path / tokens.name
    longer.write_bytes(tokens.read_bytes() * 2)
    note = "; the data comes in another order from here on"
    out = runs.run(*options, f"dir={whole}", "data.seed=1", f"data.paths={longer}").out
    assert f"changed since the checkpoint: config.data.seed: 34521 -> 1{note}" in out
    assert f"config.data.paths: ['{tokens}'] -> ['{longer}']{note}" in out
    assert f"changed since the checkpoint: names, sizes or ids of the token files{note}" in out
    assert "token files" not in runs.run(*options, f"dir={whole}").out


# --- durations ------------------------------------------------------------------------------------


def test_a_run_that_is_done_says_so_and_writes_nothing(whole, options):
    before = runs.contents(whole)
    for more in ([], ["train.duration=15"], ["train.duration=2000", "train.duration_unit=tokens"]):
        result = runs.run(*options, *more, f"dir={whole}")
        assert result.code == 0
        assert "done already: step 20 of " in result.out
        assert "a larger train.duration goes on" in result.out
    assert runs.contents(whole) == before


def test_durations_in_tokens_and_epochs(tmp_path, options):
    tokens = runs.write_tokens(tmp_path / "few.npy", 60 * 64 + 5)  # 7 batches of 8 rows, 4 are left
    constant = ["optim.schedule.name=constant", "optim.schedule.warmup=0", "checkpoint.step0=false"]
    place = [*options, *constant, "eval.paths=()", f"data.paths={tokens}"]
    for duration, unit, last in ((2, "epochs", 14), (3 * BATCH + 1, "tokens", 4)):
        more = f"dir={tmp_path}/{unit}", f"train.duration={duration}", f"train.duration_unit={unit}"
        result = runs.run(*place, *more)
        assert result.code == 0
        assert f"training steps 1 to {last} on 60 rows" in result.out
        found = values(tmp_path / unit)
        assert [v["throughput/total tokens"] for v in found.values()] == [
            step * BATCH for step in range(1, last + 1)
        ]
        assert f"done already: step {last} of {last}" in runs.run(*place, *more).out


def test_skipped_steps_take_their_batch_and_train_nothing(tmp_path, whole, options):
    folder = tmp_path / "run"
    skips = "train.skip_steps=((3,5),)"
    result = runs.run(*options, f"dir={folder}", skips, "train.hard_stop=6")
    assert result.code == 0
    found = values(folder)
    assert [step for step, v in found.items() if step and "train/CE loss" not in v] == [3, 4]
    assert steps_with("batch skipped", result.out) == [3, 4]
    for step, v in found.items():
        if step:
            assert v["throughput/total tokens"] == step * BATCH
            assert v["optim/LR (group 0)"] == pytest.approx(rate(step, 1e-3), rel=1e-9)
    # Step 5 has the batch of step 5, but the parameters that step 3 would have had.
    assert found[2] == values(whole)[2]
    assert found[5]["train/CE loss"] != values(whole)[5]["train/CE loss"]
    at_end = stored(folder / "checkpoints/step6")
    assert (at_end["step"], at_end["opt_state/count"]) == (6, 4)


def steps_with(words: str, out: str) -> list[int]:
    """The steps whose console line has these words."""
    return [int(line.split()[1].split("/")[0]) for line in out.splitlines() if words in line]


def test_a_batch_size_schedule_scales_the_rate_by_the_root(tmp_path, options):
    place = [*options, "eval.paths=()", f"dir={tmp_path}/run", "checkpoint.step0=false",
             f"data.batch_sizes={BATCH},{2 * BATCH}", f"data.batch_starts=0,{4 * BATCH}",
             f"train.duration={10 * BATCH}", "train.duration_unit=tokens",
             "optim.schedule.unit=tokens", f"optim.schedule.warmup={2 * BATCH}"]  # fmt: skip
    result = runs.run(*place, "train.hard_stop=5")
    assert result.code == 0
    result = runs.run(*place)
    assert "training steps 6 to 7" in result.out
    found = values(tmp_path / "run")
    assert [v["train/global batch size"] for v in found.values()] == [BATCH] * 4 + [2 * BATCH] * 3
    tokens = [v["throughput/total tokens"] for v in found.values()]
    assert tokens == [BATCH * n for n in (1, 2, 3, 4, 6, 8, 10)]
    schedule = ScheduleConfig(name="cos_with_warmup", unit="tokens", warmup=2 * BATCH)
    base = load(str(runs.CONFIG)).optim
    for seen, v in zip(tokens, found.values(), strict=True):
        lr = schedules.learning_rate(
            type(base)(lr=base.lr, schedule=schedule), seen, 10 * BATCH
        )  # fmt: skip
        lr *= math.sqrt(v["train/global batch size"] / BATCH)
        assert v["optim/LR (group 0)"] == pytest.approx(lr, rel=1e-12)


# --- from another run -----------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_another(tmp_path, whole, options):  # P23
    at_end = values(whole)[20]["eval/lm/heldout/CE loss"]
    stored = runs.arrays(whole / "checkpoints/step20", ("params",))
    moments = runs.arrays(whole / "checkpoints/step20", ("opt_state",))
    fresh = runs.arrays(whole / "checkpoints/step0", ("opt_state",))
    for kept in (True, False):
        folder = tmp_path / f"kept-{kept}"
        result = runs.run(*options, f"dir={folder}", f"checkpoint.load_path={whole}",
                          f"checkpoint.load_optimizer={kept}", "eval.at_start=true",
                          "eval.max_rows=none", "train.hard_stop=2")  # fmt: skip
        assert result.code == 0
        state = "loaded" if kept else "new"
        assert (
            f"starting from {whole}/checkpoints/step20 (config.checkpoint.load_path" in result.out
        )
        assert f"parameters loaded, optimizer state {state}, step and data new" in result.out
        assert "training steps 1 to 2" in result.out
        found = values(folder)
        assert found[0]["eval/lm/heldout/CE loss"] == at_end
        assert found[1]["train/CE loss"] < values(whole)[1]["train/CE loss"] - 0.05  # same batch
        assert found[1]["throughput/total tokens"] == BATCH
        first = folder / "checkpoints/step0"
        assert runs.arrays(first, ("params",)) == stored
        assert runs.arrays(first, ("opt_state",)) == (moments if kept else fresh)


def test_a_run_starts_from_the_place_of_another_in_the_data(tmp_path, whole, options):
    on = pathlib.Path(shutil.copytree(whole, tmp_path / "on"))
    longer = ["train.duration=30", "train.hard_stop=22"]
    assert runs.run(*options, f"dir={on}", *longer).code == 0
    result = runs.run(*options, f"dir={tmp_path}/from", f"checkpoint.load_path={whole}",
                      "checkpoint.load_position=true", *longer)  # fmt: skip
    assert result.code == 0
    assert "optimizer state loaded, step and data loaded" in result.out
    assert "training steps 21 to 22" in result.out
    assert values(tmp_path / "from", last=30) == {
        step: v for step, v in values(on, last=30).items() if step > 20
    }
    places = [folder / "checkpoints/step22" for folder in (on, tmp_path / "from")]
    assert runs.arrays(places[0]) == runs.arrays(places[1])


def test_the_own_folder_wins_over_the_load_path(half, whole, options):  # P23
    result = runs.run(
        *options, f"dir={half}", f"checkpoint.load_path={whole}", "train.hard_stop=11"
    )
    assert result.code == 0
    assert "resuming after step 10: this run's own newest checkpoint" in result.out
    assert f"config.checkpoint.load_path={whole} is not used" in result.out
    assert values(whole)[11].items() <= values(half)[11].items()


# --- prepared data --------------------------------------------------------------------------------


def test_prepared_data_follow_what_they_are_made_of(tmp_path, compiled, monkeypatch):  # P24
    library = tmp_path / "library"
    library.mkdir()
    for i in range(60):
        body = "".join(f"    y = x * {j} + {i}\n" for j in range(20))
        (library / f"m{i}.py").write_text(f"def f{i}(x):\n{body}    return y\n")
    paths = sysconfig.get_paths() | {"stdlib": str(library)}
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: paths)
    tiny = [o for o in small_run.TINY if not o.startswith("compute.comp")]

    def prepared(name: str, folder: str, *more: str) -> tuple[str, float]:
        """What is said about the corpus, and the loss of the first batch."""
        result = runs.run(f"--config={runs.ROOT}/configs/quickstart.py", *runs.flags(*tiny),
                          f"compute.compilation_cache={compiled}", "train.summary=false",
                          "checkpoint.step0=false", "train.duration=1", f"dir={tmp_path / name}",
                          f"data.corpus_dir={tmp_path / folder}", "data.corpus_vocab_size=300",
                          "eval.at_finish=false", *more)  # fmt: skip
        assert (result.code, result.err) == (0, "")
        (line,) = [line for line in result.out.splitlines() if line.startswith("corpus: ")]
        return line, jsonl.read(tmp_path / name)[1]["train/CE loss"]

    first, loss = prepared("a", "shared")
    assert "built" in first
    again, same = prepared("b", "shared")
    assert again.endswith("is up to date and reused")
    assert same == loss
    changed = library / "m7.py"
    changed.write_text(changed.read_text().replace("y = x", "z = x"))  # as long as before
    content, new = prepared("d", "shared")
    assert reason(content) == "sources"
    assert new != loss
    assert new == prepared("e", "fresh")[1]
    vocab, other = prepared("c", "shared", "data.corpus_vocab_size=280")
    assert reason(vocab) == "vocab_size"
    assert other not in (loss, new)


def reason(line: str) -> str:
    """Why a corpus was built anew."""
    return line.split(": other ")[1].split(")")[0]


def test_the_options_of_the_run_are_those_of_its_newest_start(half, options):
    runs.run(*options, f"dir={half}", "optim.lr=5e-4", "train.hard_stop=11")
    assert json.loads((half / "config.json").read_text())["optim"]["lr"] == 5e-4
    flags, config = train.configure([f"--config={runs.CONFIG}", *runs.flags(*options)])
    assert flags.config == str(runs.CONFIG)
    assert config.optim.lr == 1e-3


# --- losses that are not finite any more ----------------------------------------------------------

BRIEF = ["eval.paths=()", "log.tensorboard=false"]


@pytest.fixture
def wrecked(whole, tmp_path, options, monkeypatch):
    """Goes on from step 20 with a rate that wrecks the parameters in step 25; gives the result."""
    folder = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))

    def go_on(*more: str, stop_after: int | None = None) -> runs.Result:
        record, rates = loop.Run.record, pacing.Pacing.rates

        def signalling(self, pending):
            record(self, pending)
            if pending is not None and pending[0] == stop_after:
                signal.raise_signal(signal.SIGTERM)

        def wrecking(self, at, *args):
            return (1e30, 1.0) if at == 25 else rates(self, at, *args)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "record", signalling)
            patch.setattr(pacing.Pacing, "rates", wrecking)
            return runs.run(*options, *BRIEF, f"dir={folder}", "train.duration=36", *more)

    return go_on


def finite_steps(folder: pathlib.Path) -> list[int]:
    """Steps after the 20th whose loss is finite; each has one record of it."""
    found = [(line["step"], line["train/CE loss"]) for line in lines(folder)
             if "train/CE loss" in line]  # fmt: skip
    assert len(dict(found)) == len(found)
    return [step for step, loss in found if step > 20 and loss is not None]


def test_a_run_that_ends_without_a_finite_loss_fails_and_keeps_what_is_healthy(wrecked, tmp_path):
    result = wrecked("checkpoint.interval=4", "checkpoint.keep=2", "train.duration=29")
    assert result.code == 1
    assert result.errors == [
        "step 29: the run ends here; its loss is not finite for 4 steps in a row; the last finite"
        " loss is that of step 25. None of them changed the parameters; step 24 is saved"
    ]
    postponed = "step 28: its checkpoint is postponed to the next step with a finite loss"
    assert result.out.count("postponed") == result.out.count(postponed) == 1
    assert kept(tmp_path / "run").keys() == {"step20", "step24"}


NEVER = "not finite for 3 steps in a row (config.train.max_nonfinite_steps)"


def test_a_resume_from_wrecked_parameters_falls_back_to_the_confirmed_ones(
    wrecked, tmp_path, options
):
    keep = ["checkpoint.interval=5", "checkpoint.keep=1", "train.max_nonfinite_steps=3"]
    result = wrecked(*keep, stop_after=26)
    assert (result.code, result.err) == (75, "")
    assert "step 27: the loss is not finite, so its checkpoint takes no other's place" in result.out
    assert "stopped: saved step 27" in result.out
    assert kept(tmp_path / "run") == {"step20": True, "step25": False, "step27": False}
    assert layout.kind(files.path(tmp_path / "run/checkpoints/step27")) == "ephemeral"
    result = runs.run(*options, *BRIEF, f"dir={tmp_path}/run", "train.duration=30", *keep)
    assert (result.code, result.err) == (0, "")
    assert (
        f"step 30: loss nan, grad norm nan; {NEVER}, and never since the start from step 27:"
        " falling back to step 20, the newest that a finite loss has confirmed; step27.nonfinite,"
        f" step25.nonfinite in {tmp_path}/run/checkpoints is what was set aside\n"
    ) in result.out
    assert [line.split(":")[0] for line in result.out.splitlines() if "resuming" in line] == [
        "resuming after step 27", "resuming after step 20"
    ]  # fmt: skip
    assert finite_steps(tmp_path / "run") == [*range(21, 31)]
    aside = {"step25.nonfinite": False, "step27.nonfinite": False}
    assert kept(tmp_path / "run") == aside | {"step25": True, "step30": False}


@pytest.mark.by_hand  # the same in other orders
@pytest.mark.parametrize("interval", [4, 5])
@pytest.mark.parametrize("stop_after", [None, 26])
def test_a_wrecked_run_goes_on_with_the_old_rate_and_ends(
    wrecked, tmp_path, options, interval, stop_after
):
    keep = [f"checkpoint.interval={interval}", "checkpoint.keep=2"]
    result = wrecked(*keep, stop_after=stop_after)
    assert result.code == (75 if stop_after else 1)
    newest = 27 if stop_after else 25 if interval == 5 else 24
    healthy = 24 if interval == 4 else 20
    assert {f"step{n}" for n in {20, healthy, newest}} <= kept(tmp_path / "run").keys()
    again = [*options, *BRIEF, f"dir={tmp_path}/run", *keep]
    if newest != healthy:
        result = wrecked(*keep)  # the wrong rate again: back once, and then no more
        assert result.code == 1
        assert f"falling back to step {healthy}," in result.out
        assert "the last finite loss is that of step 25." in result.errors[0]
    result = runs.run(*again, "train.duration=36")
    assert result.code == 0
    assert finite_steps(tmp_path / "run") == [*range(21, 37)]
    assert runs.run(*again, "train.duration=36").out.count("done already") == 1


# --- stopped elsewhere than between two steps -----------------------------------------------------


@pytest.mark.parametrize("at", [5, 20])
def test_a_signal_ends_an_evaluation_and_the_next_run_makes_it(
    tmp_path, whole, options, monkeypatch, at
):
    folder, score, asked = tmp_path / "run", loop.Run.evaluate, []

    def interrupted(self, state, step, max_rows):
        if step == at:
            request = self.preemption.requested
            self.preemption.requested = lambda: asked.append(step) or request()
            signal.raise_signal(signal.SIGTERM)
        return score(self, state, step, max_rows)

    monkeypatch.setattr(loop.Run, "evaluate", interrupted)
    result = runs.run(*options, f"dir={folder}")
    assert (result.code, result.err) == (75, "")
    assert f"stopped: saved step {at}; the same command goes on" in result.out
    assert asked == [at]  # before the first of its batches
    assert "eval/lm/heldout/CE loss" not in jsonl.read(folder)[at]
    monkeypatch.undo()
    again = runs.run(*options, f"dir={folder}")
    assert again.code == 0
    assert ("done already" in again.out) == (at == 20)
    assert values(folder) == values(whole)
    assert "done already" in (final := runs.run(*options, f"dir={folder}")).out
    assert "eval heldout" not in final.out


def test_a_token_file_that_shrinks_ends_the_run_which_keeps_what_it_trained(
    tmp_path, whole, options, monkeypatch
):
    folder, (paths, heldout) = tmp_path / "run", options[:2]
    tokens, held = (shutil.copy(o.partition("=")[2], tmp_path) for o in (paths, heldout))
    sizes = {path: os.path.getsize(path) for path in (tokens, held)}
    own = [
        *options,
        f"data.paths={tokens}",
        f"eval.paths={held}",
        "data.n_threads=1",
        "checkpoint.step0=false",
        "log.tensorboard=false",
        f"dir={folder}",
    ]
    read, score = loader.Loader.read, loop.Run.evaluate

    def shrinking(self, step):
        if step == 8:
            os.truncate(tokens, 100)
        return read(self, step)

    def shrinking_too(self, state, step, max_rows):
        if step == 15:
            os.truncate(held, 100)
        return score(self, state, step, max_rows)

    for target, name, change, path, step in (
        (loader.Loader, "read", shrinking, tokens, 7),
        (loop.Run, "evaluate", shrinking_too, held, 15),
    ):
        content = pathlib.Path(path).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(target, name, change)
            result = runs.run(*own)
        option = "config.data.paths" if path == tokens else "config.eval.paths"
        (line,) = result.errors
        assert result.code == 1
        assert line.startswith(
            f"{option}: {path} shrank while it was read: found 100 bytes, need {sizes[path]};"
            f" step {step} is saved"
        )
        assert max(jsonl.read(folder)) == step
        pathlib.Path(path).write_bytes(content)
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"step10", "step15"}
    found, expected = values(folder, last=15), values(whole, last=15)
    assert found[15].items() < expected[15].items()  # all but its evaluation
    assert {0: {}} | found == expected | {15: found[15]}


def test_records_whose_checkpoints_are_gone_are_kept_aside(half, options):
    shutil.rmtree(half / "checkpoints")
    old = (half / "metrics.jsonl").read_bytes()
    result = runs.run(*options, f"dir={half}", "train.duration=2")
    assert result.code == 0
    (aside,) = half.glob("records-*")
    assert f"no checkpoint in {half}, but records: kept as {aside.name}" in result.out
    assert (aside / "metrics.jsonl").read_bytes() == old
    assert list(aside.glob("tensorboard/events*"))
    assert max(jsonl.read(half)) == 2


def test_two_runs_do_not_write_into_one_folder(half, options, monkeypatch, capsys):
    monkeypatch.setattr(processes, "LOCK_WAIT_S", 0.3)
    before = runs.contents(half / "checkpoints")
    with processes.only_writer(half):
        result = runs.run(*options, f"dir={half}")
        for only_reads in (runs.run(*options, f"dir={half}", "--dry_run").code,
                           plot.main([str(half)])):  # fmt: skip
            assert only_reads == 0
    assert result.code == 1
    used = f"config.dir: {half} is in use by another run"
    used += f" (process {os.getpid()} on {socket.gethostname()}); "
    assert result.out == f"{used}waiting up to 0.3 s for its end\n"  # once, and nothing was read
    assert result.errors == [f"{used}wait for its end, stop it, or set another config.dir"]
    assert runs.contents(half / "checkpoints") == before
    assert runs.run(*options, f"dir={half}", "train.hard_stop=11").code == 0


def test_a_run_that_waited_goes_on_from_what_the_other_left(half, whole, options, monkeypatch):
    with contextlib.ExitStack() as first:
        first.enter_context(processes.only_writer(half))

        def end_first(_: float) -> None:
            shutil.copytree(whole, half, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(".lock"))  # fmt: skip
            first.close()

        monkeypatch.setattr(processes.time, "sleep", end_first)
        result = runs.run(*options, f"dir={half}")
    assert result.code == 0
    assert result.out.count("is in use by another run") == 1
    assert "done already: step 20 of 20" in result.out
    assert (half / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_an_interrupt_ends_the_wait_for_another_run_at_once(half, options, monkeypatch):
    monkeypatch.setattr(processes.time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    with processes.only_writer(half):
        result = runs.run(*options, f"dir={half}")
    assert result.code == 130
    assert result.errors == ["interrupted; the same command goes on from the newest checkpoint"]


def test_another_optimizer_state_is_refused_by_field(half, options):
    for change in ("optim.name=adamw", "optim.skip_window=64"):
        result = runs.run(*options, f"dir={half}", change)
        assert result.code == 1
        (line,) = result.errors
        assert line.startswith(f"config.{change.split('=')[0]}=")
        assert "but the checkpoint was trained with" in line
        assert (
            "with checkpoint.load_optimizer=False, in a new config.dir, starts with a new" in line
        )
    fresh = [f"dir={half}-new", f"checkpoint.load_path={half}", "optim.name=adamw"]
    result = runs.run(*options, *fresh, "checkpoint.load_optimizer=false", "train.hard_stop=1")
    assert result.code == 0


def test_a_position_behind_the_end_of_the_run_is_refused(tmp_path, whole, options):
    place = [f"dir={tmp_path}/run", f"checkpoint.load_path={whole}"]
    result = runs.run(*options, *place, "checkpoint.load_position=true", "train.duration=15")
    assert result.code == 2
    assert result.errors == [
        "config.train.duration=15 ends at step 15, but checkpoint.load_path with"
        " load_position=True starts after step 20"
    ]
    assert not (tmp_path / "run").exists()


def test_the_epoch_is_counted_as_the_order_counts_it(tmp_path, options):
    folder, tokens = tmp_path / "run", runs.write_tokens(tmp_path / "few.npy", 24 * 64)
    few = [*options, f"dir={folder}", "eval.paths=()", f"data.paths={tokens}"]  # 3 steps an epoch
    assert runs.run(*few, "data.order=legacy", "train.duration=4").code == 0
    at = layout.read_meta(files.path(folder / "checkpoints/step4"))["position"]
    assert at == {"epoch": 1, "row": 8, "tokens": 4 * BATCH}
    result = runs.run(*few, "data.order=core", "train.duration=5")
    assert "config.data.order: 'legacy' -> 'core'; the data comes in another order" in result.out
    at = layout.read_meta(files.path(folder / "checkpoints/step5"))["position"]
    assert at == {"epoch": 2, "row": 16, "tokens": 5 * BATCH}


def test_ranks_of_the_loss_are_said_and_kept(tmp_path, options):
    place = [*options, f"dir={tmp_path}/run", "train.loss_normalization=per_rank_tokens"]
    result = runs.run(*place, "train.hard_stop=1")
    assert result.code == 0
    assert "train.loss_ranks: 8, the data-parallel ways of this mesh" in result.out
    result = runs.run(*place, "train.hard_stop=2", "mesh.fsdp=4", "mesh.tensor=2")
    assert "changed since the checkpoint: config.train.loss_ranks: 8 -> 4" in result.out


def test_durations_of_loading_and_saving_have_their_names(half, options):
    assert runs.run(*options, f"dir={half}").code == 0
    found = jsonl.read(half)
    assert found[11]["checkpoint/load_duration_s"] > 0
    assert found[20]["checkpoint/save_async_duration_s"] > 0
    assert found[20]["throughput/in-loop eval batches"] == 2
    assert found[15]["throughput/in-loop eval batches"] == 1
