"""What a run saves, keeps, resumes from and refuses."""

import dataclasses
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
import runs
from small_state import abstract, bits, state

from olmo_jax import files
from olmo_jax.checkpoints import checkpointer, layout, storage
from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.config.run import Config, from_dict
from olmo_jax.config.text import to_dict
from olmo_jax.data.source import Position
from olmo_jax.training import start
from olmo_jax.training.origin import find_origin

ROOT = pathlib.Path(__file__).parents[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    step: jax.Array
    params: dict
    opt_state: dict


def train_state(step: int) -> TrainState:
    return TrainState(**(state() | {"step": jnp.int32(step)}))


def config(folder, **options) -> Config:
    return from_dict({"dir": str(folder), "checkpoint": options})


def meta_of(cfg, position, at):
    data = types.SimpleNamespace(fingerprint="abc")
    return start.checkpoint_meta(cfg, data, position, at)


def of(cfg: Config):
    """What a Checkpointer takes of a config."""
    return cfg.checkpoint, cfg.run_dir


def run_to(folder, n_steps: int, **options) -> Checkpointer:
    """Save as a run of `n_steps`, whose losses are all finite, would."""
    cfg = config(folder, **options)
    checkpointer = Checkpointer(cfg.checkpoint, cfg.run_dir)
    for step in range(n_steps + 1):
        checkpointer.finite_step = step or None
        kind = checkpointer.due(step)
        if kind:
            meta = meta_of(cfg, Position(1, step, 0), step) | {"step": step}
            checkpointer.save(step, train_state(step), meta, kind)
    checkpointer.finish()
    return checkpointer


def on_disk(folder) -> dict[int, str]:
    return checkpointer.steps(files.path(folder) / "checkpoints")


# --- when and what is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [True, False])
def test_permanent_ephemeral_and_fixed_steps(tmp_path, async_save):
    run = run_to(
        tmp_path, 11, interval=4, ephemeral_interval=2, fixed_steps=(5,), async_save=async_save
    )
    kept = {0: "permanent", 4: "permanent", 5: "fixed", 8: "permanent", 10: "ephemeral"}
    assert on_disk(tmp_path) == kept == run.kinds
    assert run.latest() == 10
    assert Checkpointer(*of(config(tmp_path))).kinds == kept
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(f"step{n}" for n in kept)


def test_keep_counts_permanent_ones_and_spares_fixed_and_confirmed_ones(tmp_path):
    run_to(tmp_path, 12, interval=4, keep=1, fixed_steps=(6,))
    assert on_disk(tmp_path) == {6: "fixed", 8: "permanent", 12: "permanent"}
    assert run_to(tmp_path / "b", 9, interval=4, step0=False).kinds == {
        4: "permanent",
        8: "permanent",
    }


def test_a_complete_step_is_never_saved_again_but_may_become_permanent(tmp_path):
    run = run_to(tmp_path, 2, interval=4, ephemeral_interval=2)
    assert on_disk(tmp_path) == {0: "permanent", 2: "ephemeral"}
    assert not run.save(2, train_state(99), {}, "ephemeral")
    assert not run.save(2, train_state(99), {}, "permanent")
    assert on_disk(tmp_path) == {0: "permanent", 2: "permanent"}
    assert layout.read_meta(run.folder_of(2))["position"]["row"] == 2
    back = storage.restore(run.folder_of(2), abstract(train_state(2)))
    assert bits(back) == bits(train_state(2))


def test_the_old_one_is_deleted_only_when_the_new_one_is_complete_and_confirmed(
    tmp_path, monkeypatch
):
    events = []
    write, mark, remove = storage.ArrayWriter.commit, layout.mark, layout.remove

    def told(word, call):
        def tell(at, *args, **keywords):
            call(at, *args, **keywords)
            events.append(f"{word} {getattr(at, 'folder', at).name}")

        return tell

    monkeypatch.setattr(storage.ArrayWriter, "commit", told("commit", write))
    monkeypatch.setattr(layout, "mark", told("confirm", mark))
    monkeypatch.setattr(layout, "remove", told("remove", remove))
    run_to(tmp_path, 12, interval=4, keep=1, step0=False)
    assert events == [
        "commit step4", "confirm step4", "commit step8", "confirm step8", "remove step4",
        "commit step12",
    ]  # fmt: skip


def test_a_step_without_a_finite_loss_confirms_nothing_and_what_came_before_is_known(tmp_path):
    run_to(tmp_path, 8, interval=4, keep=1)
    run = Checkpointer(*of(config(tmp_path, keep=1)))
    assert (run.kinds, run.confirmed()) == ({4: "permanent", 8: "permanent"}, 4)
    for step in (9, 10):  # signals
        run.save(step, train_state(step), {}, "ephemeral")
        run.finish()
        assert run.confirmed() == 4
        run = Checkpointer(*of(config(tmp_path, keep=1)))
    assert on_disk(tmp_path) == {4: "permanent", 8: "permanent", 9: "ephemeral", 10: "ephemeral"}
    run.finite_step = 11
    assert run.confirmed() == 10
    run.save(11, train_state(11), {}, "permanent")
    run.finish()
    assert on_disk(tmp_path) == run.kinds == {10: "ephemeral", 11: "permanent"}
    assert Checkpointer(*of(config(tmp_path))).confirmed() == 10


def test_a_fall_back_renames_what_no_finite_loss_has_confirmed_once(tmp_path):
    run_to(tmp_path, 8, interval=4)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "step8", checkpoints / "step8.nonfinite")  # of a time before
    run = Checkpointer(*of(config(tmp_path)))
    run.save(9, train_state(9), {"step": 9})
    assert run.fall_back() == ["step9.nonfinite", "step8.nonfinite2"]
    assert (run.latest(), run.confirmed()) == (4, 4)
    assert on_disk(tmp_path) == run.kinds == {0: "permanent", 4: "permanent"}
    assert layout.read_meta(files.path(checkpoints / "step8.nonfinite2"))["position"]
    assert run.fall_back() == Checkpointer(*of(config(tmp_path))).fall_back() == []
    layout.mark(run.folder_of(0), confirmed=False)  # as older versions left all of them
    layout.mark(run.folder_of(4), confirmed=False)
    assert Checkpointer(*of(config(tmp_path))).fall_back() == []


def test_what_is_postponed_is_due_until_it_is_saved(tmp_path):
    run = Checkpointer(*of(config(tmp_path, interval=4, ephemeral_interval=1, fixed_steps=(5,))))
    assert [run.due(step) for step in (3, 4)] == ["ephemeral", "permanent"]
    assert run.postpone("permanent")
    assert [run.due(step) for step in (5, 6)] == ["fixed", "permanent"]
    assert not run.postpone("permanent")
    run.save(6, train_state(6), {}, "permanent")
    run.finish()
    assert run.due(7) == "ephemeral"


def test_the_files_of_a_checkpoint_say_all_that_a_run_needs(tmp_path):
    cfg = config(tmp_path)
    meta = meta_of(cfg, Position(1, 3, 12), 7)
    run = Checkpointer(cfg.checkpoint, cfg.run_dir)
    run.save(3, train_state(3), meta, files={"tokenizer.json": b'{"version": "1.0"}'})
    run.finish()
    found = layout.read_meta(run.folder_of(3))
    assert found["position"] == {"epoch": 1, "row": 3, "tokens": 12}
    assert found["metrics_position"] == 7
    assert found["fingerprint"] == "abc"
    assert found["config"] == to_dict(cfg)
    assert found["model"] == to_dict(cfg.model)
    assert found["versions"]["jax"] == jax.__version__
    assert (run.folder_of(3) / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'


def test_a_damaged_marker_of_an_old_checkpoint_does_not_stop_a_run(tmp_path):
    run_to(tmp_path, 12, interval=4)
    (tmp_path / "checkpoints/step4" / layout.MARKER).write_text("{")
    run = Checkpointer(*of(config(tmp_path, interval=4, keep=1)))
    assert run.kinds == {0: "permanent", 4: "damaged", 8: "permanent", 12: "permanent"}
    run.finite_step = 16
    run.save(16, train_state(16), {}, "permanent")
    run.finish()
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left == ["step12", "step16", "step4"]  # kept, to look at
    (tmp_path / "checkpoints/step16" / layout.MARKER).write_text("{")
    with pytest.raises(ValueError, match=r"step16/commit_success.txt is damaged"):
        Checkpointer(*of(config(tmp_path)))


def test_a_missing_file_of_a_checkpoint_is_named(tmp_path):
    run_to(tmp_path, 4, interval=4)
    (tmp_path / "checkpoints/step4/_METADATA").unlink()
    with pytest.raises(ValueError, match=r"step4/_METADATA is missing: the checkpoint is damaged"):
        layout.tree_of(files.path(tmp_path / "checkpoints/step4"))


def test_only_plain_step_numbers_are_checkpoints(tmp_path):
    run_to(tmp_path, 4, interval=4)
    (tmp_path / "checkpoints/step4").rename(tmp_path / "checkpoints/step004")
    assert list(on_disk(tmp_path)) == [0]


def test_what_an_interrupted_save_left_is_removed_and_said(tmp_path, capsys):
    run_to(tmp_path, 4, interval=4)
    (tmp_path / "checkpoints/step3").mkdir()
    run_to(tmp_path, 8, interval=4)
    torn = tmp_path / "checkpoints/step3"
    assert f"removing {torn}: its save, or its deletion, was interrupted" in capsys.readouterr().out
    assert not torn.exists()


def test_what_others_put_there_is_left_alone_or_refuses_the_run(tmp_path):
    run_to(tmp_path, 8, interval=4)
    checkpoints, mine = tmp_path / "checkpoints", tmp_path / "mine"
    mine.mkdir()
    for step in (3, 8):
        (checkpoints / f"step{step + 2}" / "model_and_optim").mkdir(parents=True)
    (checkpoints / "step6").write_text("a file")
    (checkpoints / "step7").symlink_to(mine)
    run = Checkpointer(*of(config(tmp_path)))
    with pytest.raises(ValueError) as caught:
        run.refuse_foreign(run.latest())
    assert str(caught.value) == (
        f"config.dir: {checkpoints}/step10 is not written by olmo_jax and has the name of a"
        " checkpoint of this run; move it away, or set another config.dir"
    )
    with pytest.raises(ValueError, match=r"checkpoints/step5 \(and 3 more\) is not written by"):
        run.refuse_foreign(4)
    run.save(10, train_state(10), {})
    with pytest.raises(OSError, match="step10 is there already and is not overwritten"):
        run.finish()
    shutil.rmtree(checkpoints / "step10")
    run.refuse_foreign(8)
    run_to(tmp_path, 12, interval=4, keep=1)
    assert list(on_disk(tmp_path)) == [8, 12]
    assert (checkpoints / "step5" / "model_and_optim").is_dir()
    assert (checkpoints / "step6").read_text() == "a file"
    assert os.readlink(checkpoints / "step7") == str(mine)


def test_a_checkpoint_behind_a_link_is_used_and_never_deleted(tmp_path):
    run_to(tmp_path / "old", 4, interval=4, step0=False)
    before = runs.contents(tmp_path / "old")
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    (tmp_path / "new/checkpoints/step4").symlink_to(tmp_path / "old/checkpoints/step4")
    assert source_of(tmp_path / "new").place.name == "step4"
    run = run_to(tmp_path / "new", 16, interval=4, keep=1)
    assert run.kinds == {4: "linked", 12: "permanent", 16: "permanent"} == on_disk(tmp_path / "new")
    assert runs.contents(tmp_path / "old") == before


# --- failing saves --------------------------------------------------------------------------------


def fail_at(monkeypatch, step: int, delay: float = 0.0) -> None:
    write = storage.ArrayWriter.write

    def failing(self, *args):
        if self.folder.name == f"step{step}":
            time.sleep(delay)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *args)

    monkeypatch.setattr(storage.ArrayWriter, "write", failing)


def test_a_failed_background_save_ends_the_run_at_the_next_save(tmp_path, monkeypatch):
    fail_at(monkeypatch, 10)
    with pytest.raises(OSError) as caught:
        run_to(tmp_path, 60, interval=5, step0=False)
    path = tmp_path / "checkpoints" / "step10"
    assert str(caught.value) == (
        f"checkpoint {path} was not saved: [Errno 28] No space left on device"
    )
    assert on_disk(tmp_path) == {5: "permanent"}
    assert not path.exists()


def test_a_failed_last_save_is_an_error_of_the_run(tmp_path, monkeypatch):
    fail_at(monkeypatch, 5, delay=0.1)
    with pytest.raises(OSError, match="step5 was not saved"):
        run_to(tmp_path, 7, interval=5, step0=False)
    assert on_disk(tmp_path) == {}


def test_a_failed_save_deletes_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 8)
        with pytest.raises(OSError, match="step8 was not saved"):
            run_to(tmp_path, 8, interval=4, keep=1, step0=False)
    assert on_disk(tmp_path) == {4: "permanent"}
    run = Checkpointer(*of(config(tmp_path, keep=1)))
    assert run.latest() == 4
    back = storage.restore(run.folder_of(4), abstract(train_state(4)))
    assert bits(back) == bits(train_state(4))
    assert run.save(8, train_state(8), {})
    run.finish()
    assert on_disk(tmp_path) == {4: "permanent", 8: "permanent"}


def test_finish_waits_for_the_last_save(tmp_path, monkeypatch):
    go, write = threading.Event(), storage.ArrayWriter.write
    monkeypatch.setattr(
        storage.ArrayWriter, "write", lambda self, *args: (go.wait(5), write(self, *args))
    )
    run = Checkpointer(*of(config(tmp_path)))
    start = time.perf_counter()
    run.save(7, train_state(7), {})
    assert time.perf_counter() - start < 2
    assert not layout.is_complete(run.folder_of(7))
    threading.Timer(0.2, go.set).start()
    run.finish()
    assert layout.is_complete(run.folder_of(7))


KILLED = """
import sys
from test_checkpointer import *
write = storage.ArrayWriter.write
def slow(self, *args):
    write(self, *args)
    if self.folder.name == "step8":
        print("writing", flush=True)
        time.sleep(0.05)
storage.ArrayWriter.write = slow
run_to(sys.argv[1], 8, interval=4, keep=1, step0=False)
"""


def test_kill_during_a_save_resumes_from_the_one_before_and_its_rest_is_cleared(tmp_path):
    environment = os.environ | {"PYTHONPATH": runs.PATHS}
    command = [sys.executable, "-c", KILLED, tmp_path]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(9):
            assert process.stdout.readline()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "step8").exists()
    cfg = config(tmp_path, keep=1)
    run = Checkpointer(cfg.checkpoint, cfg.run_dir)
    source = find_origin(cfg.checkpoint, cfg.model, run)
    assert (run.latest(), source.place.name) == (4, "step4")
    assert bits(source.load(abstract(train_state(4)))) == bits(train_state(4))
    run.save(8, train_state(8), {})
    run.finish()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step4", "step8"]
    assert on_disk(tmp_path) == {4: "permanent", 8: "permanent"}


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path, monkeypatch, caplog):
    def failing(folder):
        raise PermissionError("not yours")

    monkeypatch.setattr(layout, "remove", failing)
    run_to(tmp_path, 12, interval=4, keep=1, step0=False)
    assert on_disk(tmp_path) == {4: "permanent", 8: "permanent", 12: "permanent"}
    assert "could not delete" in caplog.text
    assert "step4: not yours" in caplog.text


# --- where a run starts ---------------------------------------------------------------------------


def test_a_copy_under_the_name_of_another_step_is_refused(tmp_path):
    run_to(tmp_path, 8, interval=4, keep=1)
    copy = tmp_path / "checkpoints" / "step1000"
    shutil.copytree(tmp_path / "checkpoints" / "step4", copy)
    with pytest.raises(
        ValueError, match=rf"^config\.dir: {copy} is the checkpoint of step 4 under"
    ):
        Checkpointer(*of(config(tmp_path)))


def source_of(folder, **options):
    cfg = config(folder, **options)
    return find_origin(cfg.checkpoint, cfg.model, Checkpointer(cfg.checkpoint, cfg.run_dir))


def test_a_fresh_run_starts_from_nothing_and_its_own_checkpoint_is_resumed(tmp_path):
    assert source_of(tmp_path) is None
    run_to(tmp_path, 8, interval=4)
    source = source_of(tmp_path)
    assert source.is_resume
    assert source.parts == ("step", "params", "opt_state")
    assert source.line == (
        f"resuming after step 8: this run's own newest checkpoint is {tmp_path}/checkpoints/step8"
    )
    assert source.meta["position"]["row"] == 8
    assert bits(source.load(abstract(train_state(8)))) == bits(train_state(8))


def test_the_own_run_wins_over_load_path_and_says_so(tmp_path):
    run_to(tmp_path / "base", 4, interval=4)
    run_to(tmp_path / "own", 2, interval=2)
    source = source_of(tmp_path / "own", load_path=str(tmp_path / "base"))
    assert source.place == files.path(tmp_path / "own" / "checkpoints" / "step2")
    assert source.is_resume
    assert f"config.checkpoint.load_path={tmp_path}/base is not used" in source.line


@pytest.mark.parametrize("name", ["base", "base/checkpoints", "base/checkpoints/step8"])
def test_load_path_may_be_a_run_or_a_checkpoint(tmp_path, name):
    run_to(tmp_path / "base", 8, interval=4)
    source = source_of(tmp_path / "own", load_path=str(tmp_path / name))
    assert source.place.name == "step8"
    assert not source.is_resume
    assert source.parts == ("params", "opt_state")
    assert source.line == (
        f"starting from {tmp_path}/base/checkpoints/step8 (config.checkpoint.load_path; this run"
        " has no checkpoint yet): parameters loaded, optimizer state loaded, step and data new"
    )
    loaded = source.load(abstract(train_state(0)))
    assert bits(loaded["params"]) == bits(train_state(0).params)


def test_the_newest_complete_one_is_taken_and_parts_are_chosen(tmp_path):
    run_to(tmp_path / "base", 8, interval=4)
    (tmp_path / "base" / "checkpoints" / "step8" / layout.MARKER).unlink()
    options = {"load_optimizer": False, "load_position": True}
    source = source_of(tmp_path / "own", load_path=str(tmp_path / "base"), **options)
    assert source.place.name == "step4"
    loaded = source.load(abstract(train_state(0)))
    assert set(loaded) == {"params", "step"}
    assert int(loaded["step"]) == 4


def test_an_empty_mistyped_or_torn_load_path_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn" / "checkpoints" / "step3").mkdir(parents=True)
    for name in ("both/checkpoints/step3", "both/checkpoints/step4/model_and_optim",
                 "core/step5/model_and_optim", "core/step6/model_and_optim"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
    for path, message in (
        (tmp_path / "empty", "no complete checkpoint in .*empty; it is an empty folder$"),
        (tmp_path / "mistyped", "mistyped does not exist"),
        (tmp_path / "torn", "no complete checkpoint in .*torn; step3 is incomplete"),
        (tmp_path / "both", "; step3 is incomplete; step4 is not written by olmo_jax$"),
        (
            tmp_path / "core",
            "; it is a folder of checkpoints; step6 is a part of .* OLMo-core; name ",
        ),
        ("", "is empty"),
    ):
        with pytest.raises(ValueError, match=rf"^config.checkpoint.load_path.*{message}"):
            source_of(tmp_path / "own", load_path=str(path))


def test_weights_alone_are_refused_with_the_option_that_takes_them(tmp_path):
    tree = {"params": train_state(0).params}
    leaves = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in storage.names(tree).items()}
    writer = storage.ArrayWriter(files.path(tmp_path / "weights"), leaves)
    for name, x in storage.names(tree).items():
        writer.write(name, (0,) * x.ndim, jax.device_get(x))
    writer.commit({"model": {}})
    path = str(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"missing leaf opt_state/.*load_optimizer=False"):
        source_of(tmp_path / "own", load_path=path).load(abstract(train_state(0)))
    source = source_of(tmp_path / "own", load_path=path, load_optimizer=False)
    assert bits(source.load(abstract(train_state(0)))) == bits(tree)


def test_a_new_optimizer_state_is_not_advised_where_parameters_are_missing(tmp_path):
    state = train_state(0)
    tree = {"params": dict(list(state.params.items())[1:])}
    leaves = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in storage.names(tree).items()}
    writer = storage.ArrayWriter(files.path(tmp_path / "weights"), leaves)
    for name, x in storage.names(tree).items():
        writer.write(name, (0,) * x.ndim, jax.device_get(x))
    writer.commit({"model": {}})
    with pytest.raises(ValueError, match="missing leaf params/") as error:
        source_of(tmp_path / "own", load_path=str(tmp_path / "weights")).load(abstract(state))
    assert "load_optimizer" not in str(error.value)
