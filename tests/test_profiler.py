"""Traces of steps: what is in them, whatever ends them, and names that a reader knows."""

import gzip
import json
import pathlib

import jax
import pytest
import runs

from olmo_jax import config, loop, processes, sharding
from olmo_jax.plan import program


def events(run: pathlib.Path) -> list[dict]:
    """What happened in the one trace of a run."""
    (path,) = run.glob("profile/plugins/profile/*/*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps(run: pathlib.Path) -> list[int]:
    """The steps of the trace, in their order."""
    found = [e for e in events(run) if e.get("name") == "train"]
    return [int(e["args"]["step_num"]) for e in sorted(found, key=lambda e: e["ts"])]


def is_tracing() -> bool:
    """Whether a trace is still being written, which is ended."""
    try:
        jax.profiler.stop_trace()
    except RuntimeError:
        return False
    return True


def test_a_trace_has_whole_steps_and_the_names_of_the_model(bare, tmp_path):
    result = runs.run(*bare, "profile.steps=[3,5]", "train.duration=6")
    assert result.code == 0, result.err
    assert steps(tmp_path / "run") == [3, 4]
    executed = {e["args"]["run_id"]: e["args"]["hlo_module"] for e in events(tmp_path / "run")
                if "run_id" in e.get("args", {}) and "hlo_module" in e["args"]}  # fmt: skip
    assert list(executed.values()).count("jit_train_step") == 2  # neither cut off nor a third
    (path,) = (tmp_path / "run").glob("profile/plugins/profile/*/*.xplane.pb")
    held = path.read_bytes()
    for name in ("layers/attn/", "layers/mlp/", "attn_norm/", "embed/", "(loss)/", "optimizer/"):
        assert name.encode() in held, name
    lines = [line for line in result.out.splitlines() if line.startswith("profile: ")]
    assert len(set(lines)) == 1
    assert f"xprof server --logdir={tmp_path / 'run' / 'profile'}" in lines[0]


def test_a_signal_among_the_steps_ends_the_trace(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(processes.Preemption, "_asked", 0, raising=False)

    def requested(self) -> bool:
        self._asked += 1
        return self._asked == 3

    monkeypatch.setattr(processes.Preemption, "requested", requested)
    result = runs.run(*bare, "profile.steps=2,9", "train.duration=12")
    assert (result.code, is_tracing()) == (75, False)
    assert steps(tmp_path / "run") == [2, 3]
    assert "profile: " in result.out
    # Resumed among them, the rest is traced.
    monkeypatch.undo()
    again = tmp_path / "run/profile"
    again.rename(tmp_path / "first")
    assert runs.run(*bare, "profile.steps=2,6", "train.duration=12").code == 0
    assert steps(tmp_path / "run") == [4, 5]
    again.rename(tmp_path / "second")
    result = runs.run(*bare, "profile.steps=2,6", "train.duration=14")
    assert "profile: no trace, step 12 is done" in result.out
    assert not again.exists()


def test_an_error_among_the_steps_ends_the_trace(bare, tmp_path, monkeypatch):
    record = loop.Run.record

    def fails(self, pending):
        if pending and pending[0] == 3:
            raise ValueError("the disk is on fire")
        record(self, pending)

    monkeypatch.setattr(loop.Run, "record", fails)
    result = runs.run(*bare, "profile.steps=2,9", "train.duration=12")
    assert (result.code, is_tracing()) == (1, False)
    assert result.errors == ["the disk is on fire"]
    assert steps(tmp_path / "run") == [2, 3, 4]


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ("[3,3]", "config.profile.steps: [3, 3) is empty; steps start at 1"),
        ("[0,2]", "config.profile.steps: [0, 2) is empty; steps start at 1"),
        ("[3,8]", "config.profile.steps=[3, 8]: the run ends at step 6"),
        ("3", "config.profile.steps: found 3, need a list of tuple[int, int]"),
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
    text = program.lower(c, mesh).as_text(debug_info=True)
    norms = ("attn_norm/", "mlp_norm/", "final_norm/")
    for part in (*parts, *norms, "embed/", "(loss)/", "/optimizer/"):
        assert part in text, part
