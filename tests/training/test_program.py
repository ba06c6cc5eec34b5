"""What a run says about its compiled step, that it compiles it once, and what it waits for."""

import json
import logging
import re
from typing import Any

import compile_step
import jax
import made
import numpy as np
import pytest
import runs
from jax._src import array
from jax.experimental.compilation_cache import compilation_cache

from olmo_jax import config
from olmo_jax.config import costs
from olmo_jax.config.model import ComputeConfig, mesh_shape
from olmo_jax.parallel import sharding
from olmo_jax.pods import hlo
from olmo_jax.pods.compiled import lower
from olmo_jax.training import pacing, program


@pytest.fixture
def no_cache():
    """No compilation cache before the test, and that of before after it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_step_is_compiled_once_and_described_before_it_runs(bare, tmp_path, no_cache, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        mesh = "mesh.fsdp=4", "mesh.data=2", "compute.compilation_cache=none"
        result = runs.run(*bare, "train.duration=3", *mesh)
    assert result.code == 0, result.err
    start = "Finished XLA compilation of jit(train_step)"
    assert len([message for message in caplog.messages if message.startswith(start)]) == 1
    said = result.out[: result.out.index("step 1/3")]
    assert re.search(r"compiling the step for batches of 8 rows\ncompiled in [\d.]+ s\n", said)
    assert re.search(r"memory per device: [\d.]+ MiB: parameters [\d.]+, optimizer [\d.]+, ", said)
    assert re.search(r"collectives, .*: \d+ all-gather, \d+ all-reduce", said)
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    c = config.load(str(runs.CONFIG))
    useful = costs.flops_per_token(c.model, 64) * 512 / 8
    assert (first["step"], first["compile/FLOPs per device"]) == (1, useful)
    assert f"{useful:.3g} by formula" in said


@pytest.mark.slow
def test_the_second_start_finds_its_program_in_the_default_cache(
    bare, tmp_path, no_cache, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(program, "KEPT_FROM_S", 0.0)  # a fast machine compiles it in less
    options = [*bare[:-1], "train.duration=3", "optim.beta1=0.89"]  # nobody else's program
    for hits in (0, 1):
        result = runs.run(*options, f"dir={tmp_path / str(hits)}")
        assert result.out.count("(found in the compilation cache)") == hits
        assert f"compilation cache: {tmp_path}/.cache/olmo_jax/xla\n" in result.out
    assert "memory per device" in result.out


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b""], ids=["torn", "empty"]
)
def test_a_torn_entry_of_the_compilation_cache_is_made_anew(no_cache, tmp_path, capsys, damage):
    program.keep_compiled(str(tmp_path))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def call() -> str:  # what is said; a warning would be an error
        assert jax.jit(lambda x: x * 3 + 1)(2) == 7
        return capsys.readouterr().out

    try:
        call()
        (entry,) = tmp_path.glob("jit__lambda-*-cache")
        entry.write_bytes(damage(entry.read_bytes()))
        said = rf"compute\.compilation_cache: removed {entry.name}, which is damaged \(.+\)\n"
        assert re.fullmatch(said, call())
        with program._cache_hits() as hits:
            assert call() == ""
        assert hits
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.mark.parametrize(
    ("flag", "error"),
    [
        ("xla_no_such=1", "this compiler has no flag xla_no_such; xla_no_such=none leaves it out"),
        ("xla_cpu_enable_fast_math=maybe", "xla_cpu_enable_fast_math=maybe: need a value of type"),
        ("--xla_a=1", "found '--xla_a=1', need NAME=VALUE as in xla_some_flag=true"),
    ],
)
def test_a_flag_that_the_compiler_refuses_is_named_before_anything_is_written(
    flag, error, bare, tmp_path
):
    result = runs.run(*bare, f"compute.xla_flags={flag}", "train.duration=3")
    assert result.code == 2
    (line,) = result.errors
    assert line.startswith(f"config.compute.xla_flags: {error}")
    assert not (tmp_path / "run").exists()


def test_flags_are_printed_and_reach_the_compiler(bare):
    flags = "xla_cpu_enable_fast_math=true,xla_no_such=none"
    result = runs.run(*bare, f"compute.xla_flags={flags}", "train.duration=3")
    assert "XLA flag: xla_cpu_enable_fast_math=True (config.compute.xla_flags)\n" in result.out
    assert result.code == 0  # the other test shows that they are looked at


@pytest.fixture(scope="module")
def compiled_step() -> tuple[config.Config, jax.sharding.Mesh, Any]:
    """A step on a mesh of all eight devices."""
    words = {"mesh.fsdp": "4", "mesh.data": "2"}
    c = config.load(str(runs.CONFIG), words)
    mesh = sharding.make_mesh(c.mesh)
    return c, mesh, lower(c, mesh).compile()


@pytest.mark.slow
def test_memory_is_that_of_the_formula_and_of_the_compiler(compiled_step):
    c, mesh, compiled = compiled_step
    rows = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "seq")))
    batch = {name: jax.ShapeDtypeStruct((8, 64), "int32", sharding=rows) for name in "abc"}
    found = program.memory_of(compiled, (made.state_shapes(c, mesh), batch, 0.0, 0.0))
    formula = costs.state_bytes(c.model, mesh_shape(c.mesh, 8))
    assert found["parameters"] == formula.params
    assert found["optimizer"] - formula.moments == 4  # the count
    assert found["batch"] == 3 * 64 * 4
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert sum(found[name] for name in ("parameters", "optimizer", "batch")) == arguments - 12
    assert found["total"] > arguments + found["temporary"]


def test_memory_is_told_beside_what_the_device_has():
    sizes = {"parameters": 3 << 29, "temporary": 7 << 30, "total": 17 << 29}
    assert program.memory_words(sizes, 90 << 30) == "8.5 GiB of 90: parameters 1.5, temporary 7"
    small = {name: size >> 10 for name, size in sizes.items()}
    assert program.memory_words(small, None) == "8.5 MiB: parameters 1.5, temporary 7"


def test_collectives_are_counted_as_a_second_way_counts_them(compiled_step):
    text = compiled_step[2].as_text()
    kinds = [operation for operation, _, _ in compile_step.collectives(text)]
    assert program.collectives(text) == {kind: kinds.count(kind) for kind in kinds}
    assert set(kinds) == {"all-gather", "all-reduce", "reduce-scatter"}


# --- what the host waits for ----------------------------------------------------------------------


class Spy:
    """A part of a step's report that tells when the host reads it."""

    def __init__(self, value: jax.Array, on_read):
        self.value, self.on_read = value, on_read

    def __array__(self, *_, **__) -> np.ndarray:
        self.on_read()
        return np.asarray(self.value.addressable_data(0))  # goes past what `timeline` watches

    def __float__(self) -> float:
        return float(self.__array__())

    def block_until_ready(self):
        self.on_read()
        return self


@pytest.fixture
def timeline(monkeypatch) -> list[tuple[str, int]]:
    """Fills with ("begun", step) when a step is given to the devices, and ("read", step) when
    the host asks for what it made: a metric, or anything of the state ("read", 0).
    """  # fmt: skip
    seen: list[tuple[str, int]] = []
    call = program.CompiledUpdate.__call__

    def spied(self, at, *arguments):
        state, report = call(self, at, *arguments)
        seen.append(("begun", at))
        return state, jax.tree.map(lambda x: Spy(x, lambda: seen.append(("read", at))), report)

    def reads(name: str) -> None:
        old = getattr(array.ArrayImpl, name)
        read = old.fget if isinstance(old, property) else old

        def new(self):
            if seen:
                seen.append(("read", 0))
            return read(self)

        monkeypatch.setattr(array.ArrayImpl, name, property(new) if old is not read else new)

    monkeypatch.setattr(program.CompiledUpdate, "__call__", spied)
    reads("_value")
    reads("block_until_ready")
    return seen


def waits(timeline: list[tuple[str, int]], last: int) -> list[int]:
    """The steps during which the devices had nothing more to do when the host read something."""
    begun, found = 0, []
    for what, at in timeline:
        if what == "begun":
            begun = at
        elif begun < last and (at == 0 or at >= begun):
            found.append(begun)
    return sorted(set(found))


def test_the_host_reads_a_step_when_the_next_one_is_with_the_devices(bare, timeline):
    result = runs.run(*bare, "train.duration=9", "checkpoint.interval=6", "eval.at_finish=false")
    assert result.code == 0, result.err
    order = list(dict.fromkeys(timeline))
    assert order[:4] == [("begun", 1), ("begun", 2), ("read", 1), ("begun", 3)]
    assert waits(timeline, last=9) == [6]  # the checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("what", ["state", "metric"])
def test_a_read_too_early_would_be_seen(what, bare, timeline, monkeypatch):
    advance = pacing.Pacing.rates
    call, results = program.CompiledUpdate.__call__, []

    def kept(self, at, *arguments):
        results.append(call(self, at, *arguments))
        return results[-1]

    def reads(self, at, *arguments):
        if at == 5:
            state, report = results[-1]
            float(state.step if what == "state" else report.loss)
        return advance(self, at, *arguments)

    monkeypatch.setattr(program.CompiledUpdate, "__call__", kept)
    monkeypatch.setattr(pacing.Pacing, "rates", reads)
    assert runs.run(*bare, "train.duration=7", "checkpoint.interval=20").code == 0
    assert waits(timeline, last=7) == [4]


# --- in which the gradients are reduced -----------------------------------------------------------


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(("grad_dtype", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_of_matrices_are_reduced_in_the_dtype_of_the_config(grad_dtype, short):
    # XLA on a CPU would make every bfloat16 sum a float32 one.
    words = {"mesh.fsdp": "4", "mesh.data": "2", "compute.dtype": "bfloat16",
             "data.seq_len": "128", "model.max_seq_len": "128",
             "compute.grad_dtype": grad_dtype}  # fmt: skip
    c = config.load(str(runs.CONFIG), words | {"data.global_batch_size": "1024"})
    mesh = sharding.make_mesh(c.mesh, compile_step.devices("v5p:2x2x2"))
    text = lower(c, mesh).compile().as_text()
    assert ComputeConfig().grad_dtype == "float32"
    shapes = [
        shape
        for operation, found, _ in compile_step.collectives(text)
        if operation in ("all-reduce", "reduce-scatter")
        for shape in re.findall(r"(b?f\d+)\[([\d,]+)\]", found)
    ]
    # The MLP's [64, 128] and its transpose, whole or a quarter.
    mlp = {dtype for dtype, shape in shapes if shape.endswith(("64,128", "128,64", "16,128"))}
    assert mlp == {short}


@pytest.mark.slow
def test_replicas_add_up_their_gradients_once_in_a_step_of_micro_batches():
    words = {"mesh.data": "8", "compute.accumulate": "4", "data.global_batch_size": "2048"}
    c = config.load(str(runs.CONFIG), words)
    text = lower(c, sharding.make_mesh(c.mesh)).compile().as_text()
    found = hlo.totals(text).collectives.items()
    assert {k.kind for k, _ in found} == {"all-reduce"}
    n_params = costs.n_params(c.model).total
    assert sum(k.n_bytes * n for k, n in found) == pytest.approx(4 * n_params, rel=0.001)
