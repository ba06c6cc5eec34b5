"""Trees that went through plain Orbax come back: each of its writers, and runs from there."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

from olmo_jax.checkpoints import conversion, storage
from olmo_jax.checkpoints.formats import orbax
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.weights import NoOptimizerError
from olmo_jax.records import jsonl

pytestmark = pytest.mark.slow  # Orbax takes seconds to import, and there are some short runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiled) -> tuple[pathlib.Path, list[str]]:
    """The folder of a run of four steps with a checkpoint in the middle, and its options."""
    base = tmp_path_factory.mktemp("orbax")
    options = [f"data.paths={runs.write_tokens(base / 'tokens.npy')}", "checkpoint.interval=2",
               "optim.name=skip_step_adamw", "optim.schedule.warmup=0", "train.duration=4",
               "log.tensorboard=false", f"compute.compilation_cache={compiled}"]  # fmt: skip
    assert runs.run(*options, f"dir={base / 'run'}").code == 0
    return base / "run", options


def saved(folder: pathlib.Path) -> dict:
    """A checkpoint of ours as plain Orbax restores it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


WRITERS = {
    "standard": lambda: ocp.StandardCheckpointer(),
    "tree": lambda: ocp.PyTreeCheckpointer(),
    "zarr": lambda: ocp.PyTreeCheckpointer(use_ocdbt=False),
    "zarr3": lambda: ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True),
}


@pytest.mark.parametrize("name", [*WRITERS, "manager"])
def test_what_each_of_orbax_writers_wrote_comes_back(run, tmp_path, name):
    ours = run[0] / "checkpoints" / "step2"
    tree = saved(ours)
    if name == "manager":
        with ocp.CheckpointManager(tmp_path / "there") as manager:
            manager.save(2, args=ocp.args.StandardSave(tree))
        folder = tmp_path / "there" / "2"
    else:
        with WRITERS[name]() as writer:
            writer.save(folder := tmp_path / "there", tree)
    shutil.copy(ours / "meta.json", folder / "meta.json")
    weights = open_weights(str(folder), optimizer=True)
    want = storage.names(tree)
    assert weights.leaves.keys() == want.keys()
    assert {"params/embed", "opt_state/mu/embed", "opt_state/count", "step"} <= want.keys()
    for leaf, value in want.items():
        assert weights.leaves[leaf].dtype == value.dtype
        np.testing.assert_array_equal(weights.read(leaf), value)
    part = (slice(1, 2), slice(3, 9))
    np.testing.assert_array_equal(
        weights.read("params/layers/mlp/w_up", part), want["params/layers/mlp/w_up"][part]
    )
    native = open_weights(str(ours), optimizer=True)
    assert (weights.model, weights.meta) == (native.model, native.meta)
    assert weights.line.startswith(f"Orbax checkpoint, {len(want)} arrays")


def test_parameters_alone_take_the_model_of_the_run_they_lie_in(run, tmp_path):
    ours = run[0] / "checkpoints" / "step4"
    for level, tree in enumerate((saved(ours)["params"], {"params": saved(ours)["params"]})):
        folder = tmp_path / str(level) / "checkpoints" / "mine"
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder, tree)
        with pytest.raises(ValueError, match="does not say what model it is; put the config"):
            open_weights(str(folder))
        shutil.copy(run[0] / "config.json", tmp_path / str(level) / "config.json")
        weights = open_weights(str(folder))
        assert weights.model == open_weights(str(run[0])).model
        conversion.check(str(folder), str(ours), say=lambda line: None)
        with pytest.raises(NoOptimizerError, match="has no optimizer state"):
            open_weights(str(folder), optimizer=True)


def test_another_tree_or_a_damaged_one_is_refused_by_name(run, tmp_path):
    tree = saved(run[0] / "checkpoints" / "step4")["params"]
    tree["layers"]["mlp"]["kernel"] = tree["layers"]["mlp"].pop("w_up")
    folder = tmp_path / "run" / "theirs"
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, tree)
    shutil.copy(run[0] / "config.json", tmp_path / "run" / "config.json")
    with pytest.raises(ValueError, match=r"params/layers/mlp/w_up .* it is not there"):
        open_weights(str(folder))
    (folder / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=f"^{folder}: Orbax cannot read "):
        open_weights(str(folder))
    assert not orbax.recognises(str(tmp_path))
    assert not orbax.recognises("https://example.org/step100")


def test_a_run_goes_on_from_what_orbax_wrote_as_from_ours(run, tmp_path):
    folder, options = run
    there = tmp_path / "there"
    with ocp.StandardCheckpointer() as writer:
        writer.save(there, saved(folder / "checkpoints" / "step2"))
    shutil.copy(folder / "checkpoints" / "step2" / "meta.json", there)
    result = runs.run(*options, f"dir={tmp_path / 'on'}", f"checkpoint.load_path={there}",
                      "checkpoint.load_position=true")  # fmt: skip
    assert result.code == 0, result.err
    assert f"starting from {there} (Orbax checkpoint, " in result.out
    assert "parameters loaded, optimizer state loaded, step and data loaded" in result.out
    found, want = (jsonl.read(each) for each in (tmp_path / "on", folder))
    assert {step: found[step]["train/CE loss"] for step in (3, 4)} == {
        step: want[step]["train/CE loss"] for step in (3, 4)
    }
    last = "checkpoints/step4"
    assert runs.arrays(tmp_path / "on" / last) == runs.arrays(folder / last)
    other = json.loads((there / "meta.json").read_text())
    del other["position"]
    (there / "meta.json").write_text(json.dumps(other))
    result = runs.run(*options, f"dir={tmp_path / 'no'}", f"checkpoint.load_path={there}",
                      "checkpoint.load_position=true")  # fmt: skip
    assert result.errors == [
        f"{there} has no step and place in the data; to start at the beginning:"
        " config.checkpoint.load_position=False"
    ]


def test_a_relative_path_is_taken(run, tmp_path, monkeypatch):
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "there", saved(run[0] / "checkpoints" / "step2"))
    shutil.copy(run[0] / "config.json", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    weights = open_weights("there")
    assert weights.read("params/final_norm").shape == (weights.model.d_model,)


def test_leaves_that_are_none_of_a_model_are_refused(run, tmp_path):
    tree, wrong = saved(run[0] / "checkpoints" / "step2"), {}
    integers = lambda t: jax.tree.map(lambda x: np.asarray(x, np.int32), t)  # noqa: E731
    wrong["integers"] = {"params": integers(tree["params"])}
    wrong["complex"] = {"params": {**tree["params"], "embed": tree["params"]["embed"] * (1 + 0j)}}
    wrong["word"] = {"params": tree["params"], "name": "x"}
    wrong["slash"] = {"params": {**tree["params"], "a/b": tree["params"]["embed"]}}
    wrong["twice"] = {"params": {**tree["params"], "params": {"embed": tree["params"]["embed"]}}}
    for name, value in wrong.items():
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(tmp_path / name, value)
        shutil.copy(run[0] / "config.json", tmp_path / name)
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: .*"):
            open_weights(str(tmp_path / name))
    moments = {**tree["opt_state"], "mu": integers(tree["opt_state"]["mu"])}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "moments", {**tree, "opt_state": moments})
    shutil.copy(run[0] / "config.json", tmp_path / "moments")
    result = runs.run(*run[1], f"dir={tmp_path / 'run'}",
                      f"checkpoint.load_path={tmp_path / 'moments'}")  # fmt: skip
    assert result.code == 1
    assert "opt_state/mu/embed is int32, need float32" in result.errors[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("config", 5), ("token_ids", 3), ("step", -3), ("step", True), ("step", 2**40),
     ("position", {"epoch": -1, "row": -1, "tokens": -1})],
)  # fmt: skip
def test_what_is_said_beside_a_tree_is_checked_before_anything_is_written(
    run, tmp_path, key, value
):
    folder, options = run
    there = tmp_path / "there"
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(there, saved(folder / "checkpoints" / "step2"))
    said = json.loads((folder / "checkpoints" / "step2" / "meta.json").read_text())
    (there / "meta.json").write_text(json.dumps(said | {key: value}))
    result = runs.run(*options, f"dir={tmp_path / 'run'}", f"checkpoint.load_path={there}",
                      "checkpoint.load_position=true")  # fmt: skip
    assert result.code == 1
    assert len(result.errors) == 1
    assert not (tmp_path / "run" / "config.json").exists()
