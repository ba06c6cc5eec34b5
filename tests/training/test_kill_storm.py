"""A run that is killed again and again, at any moment, ends as if nobody had touched it."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time
from collections import Counter

import pytest
import runs
from test_resume import lines, values
from test_writer import scalars

from olmo_jax.checkpoints import layout
from olmo_jax.files import path

SEED, N_KILLS = 16, 40
STEPS = 300  # more than forty lives of a few steps come to
SIGNALS = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT]
# The guard's history, evaluations, and saves of every kind, each second step.
RUN = f"""
optim.name=skip_step_adamw eval.interval=4 eval.batch_rows=8 eval.max_rows=8
checkpoint.interval=6 checkpoint.keep=2 checkpoint.ephemeral_interval=2
checkpoint.fixed_steps=9,100 train.duration={STEPS}
""".split()
STARTING = "devices: ", "resuming after step", "training steps", "compiling the step"


def wait_for_a_moment(life: subprocess.Popen, folder: pathlib.Path, rng: random.Random) -> str:
    """Read along until something happens, and a little longer; says what it was."""
    kind = rng.choice(("start", "step", "step", "save", "save"))
    if kind == "start":
        kind = rng.choice(STARTING)
        read_until(life, kind)
    elif kind == "step":
        n_steps = rng.randint(1, 6)
        for _ in range(n_steps):
            read_until(life, "step ")
        kind = f"{n_steps} steps"
    else:
        read_until(life, "training steps")
        before, n_new = files(folder), rng.randint(1, 80)  # a save has more than 30
        while len(files(folder) - before) < n_new and life.poll() is None:
            time.sleep(0.002)
        kind = f"{n_new} files of saves"
    time.sleep(rng.choice((0, 0.003, 0.03)) * rng.random())
    return kind


def read_until(life: subprocess.Popen, words: str) -> None:
    for line in life.stdout:
        if line.startswith(words):
            return


def files(folder: pathlib.Path) -> set[str]:
    """All below `checkpoints`, while they come and go."""
    found = os.walk(folder / "checkpoints")
    return {f"{parent}/{name}" for parent, _, names in found for name in names}


def check_end(life: subprocess.Popen, number: int, how: str) -> None:
    out, errors = life.communicate(timeout=120)
    assert life.returncode == (-number if number == signal.SIGKILL else 75), how + out + errors
    assert "Traceback" not in errors, how + errors


def live_and_die(arguments: list[str], folder: pathlib.Path) -> None:
    """Start the run and end it, so often; one that is told to save and stop is not waited for."""
    rng, stopping = random.Random(SEED), None
    with contextlib.ExitStack() as stack:
        for i in range(N_KILLS):
            life = runs.start(*arguments, n_devices=1)
            stack.enter_context(runs.processes(life))
            moment, number = wait_for_a_moment(life, folder, rng), rng.choice(SIGNALS)
            life.send_signal(number)
            how = f"{i}: {signal.Signals(number).name} after {moment}\n"
            print(how, end="")
            if stopping is not None:
                check_end(*stopping)
            stopping = life, number, how
            if number == signal.SIGKILL:
                check_end(*stopping)
                stopping = None
        if stopping is not None:
            check_end(*stopping)


def run_whole(*arguments: str) -> None:
    with runs.processes(runs.start(*arguments, n_devices=1)) as (run,):
        out, errors = run.communicate(timeout=900)
        assert (run.returncode, errors) == (0, ""), out


def names(folder: pathlib.Path) -> set[str]:
    """Every file but events, of which each start has one."""
    return {name for name in runs.contents(folder) if not name.startswith("tensorboard/")}


@pytest.mark.by_hand  # forty starts
def test_a_run_killed_forty_times_is_that_of_nobody_killed(tmp_path, compiled):
    tokens = runs.write_tokens(tmp_path / "tokens.npy")
    heldout = runs.write_tokens(tmp_path / "heldout.npy", 1000, seed=1)
    place = [f"data.paths={tokens}", f"eval.paths={heldout}"]
    options = runs.flags(*place, f"compute.compilation_cache={compiled}", *RUN)
    whole, storm = tmp_path / "whole", tmp_path / "storm"
    run_whole(*options, f"--config.dir={whole}")
    live_and_die([*options, f"--config.dir={storm}"], storm)
    newest = max(int(path.name[4:]) for path in (storm / "checkpoints").iterdir())
    assert newest < STEPS
    run_whole(*options, f"--config.dir={storm}")

    expected = values(whole, last=STEPS)
    assert values(storm, last=STEPS) == expected
    for metric in ("train/CE loss", "eval/lm/heldout/CE loss"):
        assert set(Counter(x["step"] for x in lines(storm) if metric in x).values()) == {1}
        curve = [(step, v[metric]) for step, v in expected.items() if metric in v]
        drawn = scalars(storm / "tensorboard", metric)
        # Between a record and its point on the curve a kill may fall; the state is the record.
        assert drawn == (curve if "train" in metric else [x for x in curve if x in drawn])
    last = f"checkpoints/step{STEPS}"
    assert runs.arrays(storm / last) == runs.arrays(whole / last)
    metas = [layout.read_meta(path(folder / last)) for folder in (storm, whole)]
    assert metas[0]["position"] == metas[1]["position"]
    assert names(storm) == names(whole)  # nothing is left over
