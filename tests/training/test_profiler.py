"""Traces of steps: what is in them, whatever ends them, and names that a reader knows."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest
import runs

from olmo_jax import config
from olmo_jax.parallel import sharding
from olmo_jax.pods import compiled


@pytest.fixture(scope="module")
def traced(tokens, compiled, tmp_path_factory):
    """(folder of the traces, how each run of `trace_runs.py` ended)."""
    folder = tmp_path_factory.mktemp("traced")
    options = [f"data.paths={tokens}", f"compute.compilation_cache={compiled}",
               "checkpoint.step0=false", "log.tensorboard=false"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", runs.ROOT / "tests/trace_runs.py", folder, *options],
        env=os.environ | {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert not any(still for *_, still in ends.values())  # no trace outlives its run
    return folder, {name: runs.Result(*end) for name, (*end, _) in ends.items()}


def events(trace: pathlib.Path) -> list[dict]:
    """What happened in a trace."""
    (path,) = trace.glob("plugins/profile/*/*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps(trace: pathlib.Path) -> list[int]:
    """The steps of a trace, in their order."""
    found = [e for e in events(trace) if e.get("name") == "train"]
    return [int(e["args"]["step_num"]) for e in sorted(found, key=lambda e: e["ts"])]


@pytest.mark.slow
def test_a_trace_has_whole_steps_and_the_names_of_the_model(traced):
    folder, ends = traced
    trace, result = folder / "whole", ends["whole"]
    assert result.code == 0, result.err
    assert steps(trace) == [3, 4]
    executed = {e["args"]["run_id"]: e["args"]["hlo_module"] for e in events(trace)
                if "run_id" in e.get("args", {}) and "hlo_module" in e["args"]}  # fmt: skip
    assert list(executed.values()).count("jit_train_step") == 2  # neither cut off nor a third
    (path,) = trace.glob("plugins/profile/*/*.xplane.pb")
    held = path.read_bytes()
    for name in ("layers/attn/", "layers/mlp/", "attn_norm/", "embed/", "(loss)/", "optimizer/"):
        assert name.encode() in held, name
    lines = [line for line in result.out.splitlines() if line.startswith("profile: ")]
    assert len(set(lines)) == 1
    assert f"xprof server --logdir={folder / 'runs/one/profile'}" in lines[0]


@pytest.mark.slow
def test_a_signal_among_the_steps_ends_the_trace(traced):
    folder, ends = traced
    assert ends["cut by a signal"].code == 75
    assert steps(folder / "cut by a signal") == [2, 3]
    assert "profile: " in ends["cut by a signal"].out
    # Resumed among them, the rest is traced.
    assert ends["resumed"].code == 0
    assert steps(folder / "resumed") == [4, 5]
    assert "profile: no trace, step 12 is done" in ends["too late"].out
    assert not (folder / "too late").exists()


@pytest.mark.slow
def test_an_error_among_the_steps_ends_the_trace(traced):
    folder, ends = traced
    assert (ends["cut by an error"].code, ends["cut by an error"].errors) == (
        1, ["the disk is on fire"],
    )  # fmt: skip
    assert steps(folder / "cut by an error") == [2, 3, 4]


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ("[3,3]", "config.profile.steps: [3, 3) is empty"),
        ("[0,2]", "config.profile.steps[0]=0: need a number from 1 to 2147483647, or none"),
        ("[3,8]", "config.profile.steps=[3, 8]: the run ends at step 6"),
        ("3", "config.profile.steps: found '3', need a list of tuple[int, int]"),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(steps, error, bare, tmp_path):
    result = runs.run(*bare, f"profile.steps={steps}", "train.duration=6")
    assert (result.code, result.errors) == (2, [error])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [("tiny_olmo2", ("layers/attn/", "layers/mlp/")), ("tiny_olmoe", ("layers/moe/", "router/"))],
)
def test_the_compiler_is_told_the_names_of_the_parts(name, parts):
    c = config.load(str(runs.ROOT / f"configs/{name}.py"))
    mesh = sharding.make_mesh(c.mesh)
    text = compiled.lower(c, mesh).as_text(debug_info=True)
    norms = ("attn_norm/", "mlp_norm/", "final_norm/")
    for part in (*parts, *norms, "embed/", "(loss)/", "/optimizer/"):
        assert part in text, part
