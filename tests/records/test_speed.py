"""Times that a user waits for, in CPU-seconds: other programs on the machine do not count."""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import made
import numpy as np
import pytest

from olmo_jax import config
from olmo_jax.config.data import FixedLength
from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig
from olmo_jax.config.run import Config
from olmo_jax.parallel import sharding
from olmo_jax.parallel.processes import Preemption
from olmo_jax.training import loop, start

ROOT = pathlib.Path(__file__).parents[2]
PATHS = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}


def python(*arguments):
    """CPU-seconds, exit code and output of a fresh Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=PATHS, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return spent, done.returncode, done.stdout + done.stderr


def test_importing_the_package_is_quick_and_imports_no_jax():
    code = (
        "import sys, time; t = time.process_time(); import olmo_jax;"
        " print(time.process_time() - t, 'jax' in sys.modules)"
    )
    _, _, out = python("-c", code)
    seconds, has_jax = out.split()
    assert float(seconds) < 0.3
    assert has_jax == "False"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "--config=FILE"),
        (["--config=configs/quickstart.py", "--config.optim.lrr=1"], 2, "did you mean lr?"),
        (["--config=configs/olmo2_32b.py", "--config.model.n_heads=7", "--dry_run"], 2, "n_heads"),
    ],
)
def test_help_and_config_errors_come_within_two_seconds(arguments, code, says):
    seconds, returned, out = python("-m", "olmo_jax.train", *arguments)
    assert (returned, says in out) == (code, True), out
    assert seconds < 2.0


def step_of(n_layers, d_ff):
    """A training step of a small model, its mesh and shapes of its arguments."""
    model = ModelConfig(
        vocab_size=128, d_model=32, n_layers=n_layers, n_heads=2, n_kv_heads=2, head_dim=16,
        d_ff=d_ff, max_seq_len=64,
    )  # fmt: skip
    c = Config(
        model=model,
        compute=ComputeConfig(dtype="float32"),
        data=FixedLength(seq_len=64, global_batch_size=2 * 64),
        mesh=MeshConfig(fsdp=1),
    )
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    rows = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32}
    batch = {name: jax.ShapeDtypeStruct((2, 64), dtype) for name, dtype in rows.items()}
    scalar = jax.ShapeDtypeStruct((), np.float32)
    arguments = made.state_shapes(c, mesh), batch, scalar, scalar
    return made.make_update(c, mesh).function, mesh, arguments


def seconds_to_compile(n_layers, d_ff):
    update, mesh, arguments = step_of(n_layers, d_ff)
    start = time.process_time()
    with jax.set_mesh(mesh):
        update.lower(*arguments).compile()
    return time.process_time() - start


@pytest.mark.slow
def test_64_layers_compile_within_1_5_times_of_4():
    # Widths that differ: another test may have switched the compilation cache on.
    few, many = ([seconds_to_compile(n, d_ff) for d_ff in (64, 72)] for n in (4, 64))
    assert min(many) < 1.5 * min(few)


@pytest.mark.slow
def test_the_step_is_compiled_once_per_batch_shape(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 512, 40_000).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.npy")
    c = config.load(str(ROOT / "configs/tiny_olmo2.py"))
    seq = c.data.seq_len
    c = dataclasses.replace(
        c,
        dir=str(tmp_path / "run"),
        train=dataclasses.replace(c.train, duration=8),
        compute=dataclasses.replace(c.compute, compilation_cache=None),
        data=dataclasses.replace(
            c.data,
            paths=(str(tmp_path / "tokens.npy"),),
            global_batch_size=8 * seq,
            batch_sizes=(8 * seq, 16 * seq),
            batch_starts=(0, 4 * 8 * seq),
        ),
    )
    steps = []

    def kept(*args):
        steps.append(make_update(*args))
        return steps[-1]

    make_update = loop.step.make_update
    monkeypatch.setattr(loop.step, "make_update", kept)
    with Preemption() as preemption:
        assert start.train(c, preemption, lambda config, mesh: []).code == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    sizes = {r["train/global batch size"] for r in records if "train/global batch size" in r}
    assert sizes == {8 * seq, 16 * seq}
    assert [update.function._cache_size() for update in steps] == [2]
