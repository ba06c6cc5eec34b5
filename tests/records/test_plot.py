"""The picture of runs: what it shows, and what the command says when it cannot draw."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from olmo_jax import plot as command_line
from olmo_jax.records import plot

ROOT = pathlib.Path(__file__).parents[2]


def record(step, tokens_per_step=100, shift=0.0, **more):
    return {
        "step": step,
        "tokens": step * tokens_per_step,
        "train/CE loss": 5.0 - 0.01 * step + shift,
        "optim/LR (group 0)": 1e-3,
        "optim/total grad norm": 1.0 + step % 3,
        **({"throughput/device/TPS": 1000.0} if step > 1 else {}),
        **more,
    }


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def figure(monkeypatch):
    """The figure behind the picture that was drawn last."""
    from matplotlib.figure import Figure

    saved = {}
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.update(last=self), save(self, *a, **k))[1]
    )
    return lambda: saved["last"]


def curves(axes):
    """The lines of a panel that have points, by label: x and y."""
    return {
        line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist())
        for line in axes.lines
        if len(line.get_xdata())
    }


def command(*args, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-m", "olmo_jax.plot", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_draws_several_runs_into_one_picture(tmp_path):
    runs = [write(tmp_path / name, map(record, range(1, 30))) for name in "ab"]
    out = tmp_path / "both.png"
    # As a cell of a notebook hands it on, whose backend is not installed here.
    done = command(*runs, f"--out={out}", MPLBACKEND="of-a-notebook")
    assert (done.returncode, done.stdout) == (0, f"wrote {out}\n"), done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_settings_of_the_user_do_not_reach_the_picture(tmp_path, figure):
    import matplotlib

    run = write(tmp_path / "run", [record(1)])
    with matplotlib.rc_context({"axes.facecolor": "red"}):
        plot.draw([run], tmp_path / "x.png")
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    assert figure().axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (lambda f: None, [], "metrics.jsonl: no such file"),
        (lambda f: write(f, []), [], "no training step yet"),
        (lambda f: write(f, [record(1)]), ["--out=x.abc"], "'abc' is not supported"),
        (lambda f: write(f, [record(1)]), ["--out=/no/such/folder/x.png"], "No such file"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, make, args, message, capsys):
    make(tmp_path / "run")
    assert command_line.main([str(tmp_path / "run"), *args]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_panels_show_loss_rate_norm_and_speed_over_tokens_or_steps(tmp_path, figure):
    held_out = {"step": 4, "tokens": 400, "eval/lm/valid/CE loss": 4.5}
    run = write(tmp_path / "run", [*map(record, range(1, 6)), held_out])
    plot.draw([run], tmp_path / "x.png")
    loss, lr, norm, speed = figure().axes
    assert [axes.get_title(loc="left") for axes in (lr, norm)] == ["learning rate", "gradient norm"]
    tokens = [100, 200, 300, 400, 500]
    assert curves(loss) == {
        "run": (tokens, [record(s)["train/CE loss"] for s in range(1, 6)]),
        "held out: valid": ([400], [4.5]),
    }
    assert curves(lr)["run"] == (tokens, [1e-3] * 5)
    assert curves(norm)["run"] == (tokens, [2.0, 3.0, 1.0, 2.0, 3.0])
    assert curves(speed)["run"] == (tokens[1:], [1000.0] * 4)
    plot.draw([run], tmp_path / "x.png", x="steps")
    assert curves(figure().axes[1])["run"][0] == [1, 2, 3, 4, 5]
    assert figure().axes[0].get_xlabel() == "steps"


def test_a_resumed_run_shows_no_zigzag(tmp_path, figure):
    # Killed after 13, resumed from 10: also where nothing has removed the dead timeline.
    dead, resumed = range(1, 14), range(11, 21)
    rows = [*map(record, dead), *(record(step, shift=1.0) for step in resumed)]
    plot.draw([write(tmp_path / "run", rows)], tmp_path / "x.png")
    at, loss = curves(figure().axes[0])["run"]
    assert at == [100 * step for step in range(1, 21)]
    assert loss == [
        record(s, shift=1.0 if s > 10 else 0.0)["train/CE loss"] for s in range(1, 21)
    ]  # fmt: skip


def test_runs_are_named_as_short_as_tells_them_apart(tmp_path, figure):
    runs = [write(tmp_path / name, [record(1), record(2)]) for name in ("a/x", "b/x", "c/y")]
    plot.draw(runs, tmp_path / "x.png")
    (legend,) = figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/x", "b/x", "c/y"]
    assert list(curves(figure().axes[0])) == ["a/x", "b/x", "c/y"]
    with pytest.raises(ValueError, match="twice"):
        plot.draw([runs[0], runs[0]], tmp_path / "x.png")


def test_many_steps_are_drawn_as_means_over_their_range(tmp_path, figure):
    n = 10 * plot.MAX_POINTS
    run = write(tmp_path / "run", map(record, range(1, n + 1)))
    plot.draw([run], tmp_path / "x.png", x="steps")
    norm = figure().axes[2]
    at, values = curves(norm)["run"]
    exact = [record(s)["optim/total grad norm"] for s in range(1, n + 1)]
    assert len(at) == plot.MAX_POINTS
    assert at == np.mean(np.arange(1, n + 1).reshape(-1, 10), 1).tolist()
    np.testing.assert_allclose(values, np.mean(np.reshape(exact, (-1, 10)), 1))
    (band,) = norm.collections
    assert band.get_datalim(norm.transData).intervaly.tolist() == [1.0, 3.0]


def test_runs_with_experts_get_their_loads_and_the_busiest_one(tmp_path, figure):
    def row(step, load):
        layers = {
            f"train/block {i:02}/load imbalance": max(of_layer) for i, of_layer in enumerate(load)
        }
        return record(step, **layers, **{"train/expert load": load})

    rows = [row(1, [[0.0, 2.0], [1.0, 1.0]]), row(2, [[1.0, 1.0], [0.5, 1.5]])]
    runs = [write(tmp_path / "moe", rows), write(tmp_path / "dense", [record(1), record(2)])]
    plot.draw(runs, tmp_path / "x.png", x="steps")
    panels = {axes.get_title(loc="left"): axes for axes in figure().axes}
    assert len(panels) == 7  # five of curves, a map, and its bar without a title
    assert curves(panels["busiest expert, times the mean"])["moe"] == ([1, 2], [2.0, 1.5])
    (image,) = panels["load of each expert: moe"].images
    np.testing.assert_allclose(image.get_array(), [[0.5, 1.5], [0.75, 1.25]])
    assert image.norm(1.0) == 0.5  # white


@pytest.mark.parametrize(("load", "ticks"), [([[1.0]], "2.0"), ([[0.0, 0.0, 3.27]], "3.3")])
def test_maps_of_few_experts_and_of_large_loads_have_ticks_that_stand_apart(
    tmp_path, figure, load, ticks
):
    layers = {"train/block 00/load imbalance": max(load[0]), "train/expert load": load}
    plot.draw([write(tmp_path / "moe", [record(1, **layers)])], tmp_path / "x.png")
    (axes,) = (axes for axes in figure().axes if axes.get_title(loc="left").startswith("load of"))
    assert axes.get_xticks().tolist() == list(range(len(load[0])))
    assert axes.get_yticks().tolist() == [0]
    bar = next(axes for axes in figure().axes if axes.get_label() == "<colorbar>")
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.0", "1.0", ticks]
    assert bar.get_yticks().max() <= bar.get_ylim()[1]


def test_a_run_that_went_wrong_is_drawn_as_far_as_it_goes(tmp_path, figure):
    rows = [record(1), record(2) | {"train/CE loss": None, "optim/total grad norm": None}]
    plot.draw([write(tmp_path / "run", rows)], tmp_path / "x.png")
    assert curves(figure().axes[0])["run"][0] == [100]
    nothing = [{"step": 1, "tokens": 1, "train/CE loss": None}]
    plot.draw([write(tmp_path / "nothing", nothing)], tmp_path / "x.png")
    assert [text.get_text() for text in figure().axes[0].texts] == ["nothing recorded"]
