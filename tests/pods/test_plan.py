"""The pod planner: programs are counted right, formulas agree with them, the tool says so."""

import collections
import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from olmo_jax import config, plan
from olmo_jax.config import costs, parameters
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import validate
from olmo_jax.pods import analytic, compiled, gpus, hlo, kernels, report, search
from olmo_jax.pods.chips import Slice
from olmo_jax.pods.hlo import Collective
from olmo_jax.pods.plan import Plan

ROOT = pathlib.Path(__file__).parents[2]
NODES = gpus.Nodes.parse("h100:8x16")
SMALL = {
    "model.n_layers": "2", "model.d_model": "512", "model.n_heads": "4", "model.n_kv_heads": "4",
    "model.head_dim": "128", "model.d_ff": "1024", "model.vocab_size": "1024",
    "model.max_seq_len": "512", "data.seq_len": "512", "data.global_batch_size": "8192",
    "data.paths": "x.npy", "compute.dtype": "bfloat16",
}  # fmt: skip


def load(name, **options):
    """A config of configs/, with `part__option=value`."""
    given = {key.replace("__", "."): str(value) for key, value in options.items()}
    return config.load(str(ROOT / f"configs/{name}.py"), given)


# --- programs -------------------------------------------------------------------------------------


def fusion(name, operand, cycles, calls, shape="f32[8,8]{1,0}"):
    cost = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"  %{name} = {shape} fusion(%{operand}), kind=kLoop, calls=%{calls}, {cost}"


LOOP = "\n".join([
    "HloModule jit_step",
    "%added (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    "  ROOT %add = f32[8,8]{1,0} add(%p, %p)",
    "}",
    "%squared (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    "  ROOT %dot = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    "}",
    "%one (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    fusion("a", "p", 100, "added"),
    "}",
    "%two (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    fusion("b", "p", 1000, "added"),
    "}",
    "%body (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    "  %at = s32[] constant(0)",
    fusion("product", "p", 7, "squared"),
    fusion("no_model", "p", 2**60, "added"),
    "  ROOT %either = f32[8,8]{1,0} conditional(%at, %p, %p), branch_computations={%one, %two}",
    "}",
    "%condition (p: f32[8,8]) -> pred[] {",
    "  %n = s32[] constant(5)",
    "}",
    "ENTRY %main (p: f32[8,8]) -> f32[8,8] {",
    "  %p = f32[8,8]{1,0} parameter(0)",
    fusion("start", "p", 3, "added"),
    "  ROOT %loop = f32[8,8]{1,0} while(%start), condition=%condition, body=%body",
    "}",
])  # fmt: skip


def test_bodies_of_loops_count_as_often_as_they_run_and_branches_by_weight():
    found = hlo.totals(LOOP, lambda n: [0.25, 0.75])
    assert found.cycles() == 3 + 5 * (7 + 0.25 * 100 + 0.75 * 1000)
    assert found.cycles(has_products=True) == 5 * 7
    assert found.flops == 5 * 2 * 8**3
    assert hlo.totals(LOOP).cycles(has_products=False) == 3 + 5 * 100  # the first is taken


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.totals("HloModule nothing")


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", ()),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", (0, 1)),
    ],
)
def test_groups_of_devices_are_read_in_each_way_of_writing_them(written, devices):
    assert hlo.group(f"%x = f32[8] all-gather(%p), {written}, dimensions={{0}}") == devices


def collectives(*lines):
    """Of a program with these lines, whose only argument is %p, f32[8]."""
    head = ["ENTRY %main (p: f32[8]) -> f32[8] {", "  %p = f32[8]{0} parameter(0)"]
    return hlo.totals("\n".join([*head, *(f"  {x}" for x in lines), "}"])).collectives


def test_bytes_of_collectives_are_those_of_the_whole_array():
    found = collectives(
        "%a = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}",
        "%b = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}",
        "%c = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}",
        "%d = f32[8]{0} all-reduce-start(%p), replica_groups={{0,1,2,3}}",
        "%e = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%p),"
        " source_target_pairs={{0,1},{1,0}}",
    )
    four = (0, 1, 2, 3)
    assert found == {
        Collective("all-gather", 128, four): 2,
        Collective("reduce-scatter", 32, four): 1,
        Collective("all-reduce", 32, four): 1,
        Collective("collective-permute", 36, (0, 1)): 1,  # with its 4 bytes of context
    }


def test_rows_travel_to_experts_and_not_the_room_that_these_have():
    found = collectives(
        "%room = f32[64]{0} constant({...})",
        "%out = f32[64]{0} ragged-all-to-all(%p, %room), replica_groups={{0,1,2,3}}",
        "%back = f32[8]{0} ragged-all-to-all(%out, %p), replica_groups={{0,1,2,3}}",
    )
    assert found == {Collective("ragged-all-to-all", 32, (0, 1, 2, 3)): 2}


@pytest.mark.parametrize(
    ("ways", "router", "buffer", "room"),
    [
        (1, "token_choice", None, 1.0),
        (4, "token_choice", None, 4.0),
        (32, "token_choice", None, 8.0),  # two experts of a device, of the eight of a token
        (4, "token_choice", 1.5, 1.5),
        (4, "token_choice", 9.0, 4.0),  # more cannot come
        (4, "expert_choice", None, 1.0),
    ],
)
def test_room_for_rows_of_experts_is_what_can_come(ways, router, buffer, room):
    model = config.ModelConfig(n_experts=64, n_experts_per_token=8, router=router)
    run = config.Config(model=model, compute=config.ComputeConfig(expert_buffer=buffer))
    assert (
        analytic._room(
            analytic.Work.of(run.model, run.compute, run.mesh, run.data), {"expert": ways}
        )
        == room
    )


def test_a_collective_on_another_core_is_found():
    text = "\n".join([
        "%called (q: f32[8]) -> f32[2] {",
        "  %q = f32[8]{0} parameter(0)",
        "  ROOT %r = f32[2]{0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, dimensions={0}",
        '}, execution_thread="sparsecore"',
        "ENTRY %main (p: f32[8]) -> f32[2] {",
        "  %p = f32[8]{0} parameter(0)",
        "  %start = ((f32[8]{0}), f32[2]{0}) call-start(%p), async_execution_thread="
        '"sparsecore", to_apply=%called',
        "  ROOT %done = f32[2]{0} call-done(%start)",
        "}",
    ])  # fmt: skip
    assert hlo.totals(text).collectives == {Collective("reduce-scatter", 32, (0, 1, 2, 3)): 1}


def test_a_reduction_that_keeps_a_part_is_a_reduce_scatter():
    text = "\n".join([
        "%all-reduce-scatter.1 (q: f32[8]) -> f32[2] {",
        "  %q = f32[8]{0} parameter(0)",
        "  %all = f32[8]{0} all-reduce(%q), replica_groups={{0,1,2,3}}",
        "  ROOT %part = f32[2]{0} dynamic-slice(%all), dynamic_slice_sizes={2}",
        "}",
        "ENTRY %main (p: f32[8]) -> f32[2] {",
        "  %p = f32[8]{0} parameter(0)",
        "  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
        "}",
    ])  # fmt: skip
    assert hlo.totals(text).collectives == {Collective("reduce-scatter", 32, (0, 1, 2, 3)): 1}


@pytest.mark.parametrize(
    ("line", "left", "right"),
    [
        ("f32[4,8,32] dot(%l, %r), lhs_batch_dims={0}, rhs_batch_dims={0}", "4,8,16", "4,16,32"),
        (
            "f32[4,8,32] convolution(%l, %r), window={size=4 stride=3 lhs_dilate=4},"
            " dim_labels=0fb_0io->0bf",
            "4,16,8",
            "4,16,32",
        ),
        ("f32[32,32] dot(%l, %r), lhs_contracting_dims={1}", "32,16", "16,32"),
    ],
)
def test_products_beside_each_other_are_counted_once_each(line, left, right):
    text = "\n".join([
        "ENTRY %main (l: f32[], r: f32[]) -> f32[] {",
        f"  %l = f32[{left}] parameter(0)",
        f"  %r = f32[{right}] parameter(1)",
        f"  ROOT %x = {line}",
        "}",
    ])  # fmt: skip
    assert hlo.totals(text).flops == pytest.approx(4 * 2 * 8 * 16 * 32)


def test_kernels_are_named_and_products_of_experts_counted():
    text = "\n".join([
        "ENTRY %main (p: bf16[64,8]) -> bf16[64,16] {",
        "  %p = bf16[64,8]{1,0} parameter(0)",
        "  %w = bf16[4,8,16]{2,1,0} parameter(1)",
        "  %n = s32[4]{0} parameter(2)",
        "  %ragged-dot-none.3 = bf16[64,16]{1,0} custom-call(%n, %p, %w),"
        ' custom_call_target="tpu_custom_call"',
        "  ROOT %own = bf16[64,16]{1,0} custom-call(%ragged-dot-none.3),"
        ' custom_call_target="tpu_custom_call"',
        "}",
    ])  # fmt: skip
    assert hlo.totals(text).kernels == {
        hlo.CustomCall("ragged-dot-none", 16 + 1024 + 1024 + 2048, 2 * 64 * 8 * 16): 1,
        hlo.CustomCall("own", 4096, 0.0): 1,
    }


# Seconds of all operations and of products; GB gathered and reduced. From the totals of another
# program over the same text (shared/spec/kernels.md, 6).
MAXTEXT = {
    "default_v5p_4x4x4": (12.528, 10.815, 37.8, 15.4),
    "tuned_v5p_4x4x8": (4.972, 3.860, None, None),
}


@pytest.mark.parametrize("name", MAXTEXT)
def test_totals_of_programs_of_maxtext_are_those_of_another_counter(name, shared):
    path = shared / f"baselines/maxtext_0.2.5_olmo3_7b_{name}.hlo.txt.gz"
    found, (every, products, gathered, reduced) = (
        hlo.totals(gzip.decompress(path.read_bytes()).decode()),
        MAXTEXT[name],
    )
    assert found.cycles() / 1.75e9 == pytest.approx(every, rel=2e-4)
    assert found.cycles(has_products=True) / 1.75e9 == pytest.approx(products, rel=2e-4)
    n_bytes = collections.Counter()
    for collective, times in found.collectives.items():
        n_bytes[collective.kind] += times * collective.n_bytes / 1e9
    if gathered:
        assert n_bytes["all-gather"] == pytest.approx(gathered, abs=0.05)
        assert n_bytes["all-reduce"] == pytest.approx(reduced, abs=0.05)


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmo2_7b", "olmo3_32b", "olmo1_1b", "olmoe_1b_7b"])
def test_without_recomputation_what_is_done_is_what_is_useful(name):
    c = load(name, compute__remat="none", compute__accumulate=1)
    plan = analytic.predict(c, NODES)
    m, share = c.model, analytic.START["GPU"]
    forward_and_backward = plan.seconds["attention"] * NODES.chip.peak
    # 2.5 products backwards for each forward: two more than are useful are half a forward pass.
    per_forward = 1 / share.forward + 2.5 / share.backward
    useful = plan.done + 3 * forward_and_backward / per_forward
    norms = 6 * sum(n for path, n in _sizes(m).items() if "norm" in path or "router" in path)
    assert useful == pytest.approx(plan.flops, rel=1e-3 + norms / costs.flops_per_token(m, 4096))


def _sizes(model):
    return {path: math.prod(row.shape) for path, row in parameters.table(model).items()}


def test_each_remat_policy_does_less_and_keeps_more_than_the_next():
    c = load("olmo3_7b")
    plans = [
        analytic.predict(with_(c, compute={"remat": remat}), NODES)
        for remat in ("qkv_mlp", "qkv", "attention", "full")
    ]
    work = [plan.seconds["products"] + plan.seconds["attention"] for plan in plans]
    kept = [plan.activations for plan in plans]
    assert work == sorted(work)
    assert kept == sorted(kept, reverse=True)
    assert len({*work}) == len({*kept}) == 4


def with_(c, **parts):
    return dataclasses.replace(
        c, **{name: dataclasses.replace(getattr(c, name), **part) for name, part in parts.items()}
    )


def test_within_a_node_the_link_counts_and_between_nodes_the_network_of_all_its_devices():
    c = with_(load("olmo3_7b"), mesh={"data": 16, "fsdp": 4, "tensor": 2})
    rates, gpu = NODES.rates(c.mesh), NODES.chip
    assert rates["tensor"] == rates["fsdp"] == gpu.link
    assert rates["data"] == gpu.network
    whole = with_(c, mesh={"data": 1, "fsdp": 128, "tensor": 1})
    assert NODES.rates(whole.mesh)["fsdp"] == 8 * gpu.network


def test_a_group_on_a_torus_has_the_links_of_the_axes_that_it_spans():
    where = Slice.parse("v5p:4x4x8")
    link = where.chip.link
    line = [(i, 0, 0) for i in range(4)]
    assert where.exchange(line) == 2 * link  # a ring
    assert where.exchange(line[:2]) == link  # a part of it
    assert where.exchange([(i, j, 0) for i in range(4) for j in range(4)]) == 4 * link
    assert Slice.parse("v5e:4x4").exchange([(i, 0, 0) for i in range(4)]) == 45e9  # no wrap


def test_corrections_make_the_prediction_what_the_program_showed():
    c = load("olmo3_7b")
    predicted = analytic.predict(c, NODES)
    real = dataclasses.replace(
        predicted,
        seconds={kind: 1.5 * s for kind, s in predicted.seconds.items()} | {"kernels": 0.5},
        memory=predicted.memory | {"temporary": predicted.memory["temporary"] * 1.2},
    )
    fixed = analytic.predict(c, NODES, analytic.corrected({}, predicted, real))
    assert sum(fixed.seconds.values()) == pytest.approx(sum(real.seconds.values()))
    assert fixed.memory["temporary"] == pytest.approx(real.memory["temporary"])


@pytest.mark.parametrize("n_documents", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_row_of_any_length_takes_what_its_padded_blocks_take(way, n_documents):
    def counts(seq):
        return kernels.counts(kernels.Case("v5p", seq, 8, 8, 128, 100, n_documents), way)

    assert counts(64).steps == 1
    if not n_documents:
        assert counts(1000) == counts(1024)
    assert counts(5000).steps >= counts(4096).steps > 1


# --- search ---------------------------------------------------------------------------------------


def test_candidates_cover_the_devices_and_divide_the_batch():
    c, found = load("olmoe_1b_7b"), list(search.candidates(load("olmoe_1b_7b"), NODES))
    assert len({search.overrides(x.mesh, x.compute) for x in found}) == len(found) > 100
    assert {x.mesh.expert for x in found} >= {1, 2, 64}
    for x in found:
        mesh = x.mesh
        assert mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor == 128
        ways = mesh.data * mesh.fsdp * mesh.expert * x.compute.accumulate
        assert c.data.global_batch_size // c.data.seq_len % ways == 0


def test_long_rows_may_be_split_and_short_ones_are_not():
    contexts = {
        name: {x.mesh.context for x in search.candidates(load(name), NODES)}
        for name in ("olmo3_7b", "olmo3_7b_longcontext")
    }
    assert contexts["olmo3_7b"] == {1}
    assert contexts["olmo3_7b_longcontext"] >= {2, 8}


def test_what_does_not_fit_is_not_ranked():
    ranked = search.rank(load("olmo3_32b"), gpus.Nodes.parse("a100:8x16"))
    assert ranked
    assert all(x.plan.fits for x in ranked)
    assert not search.rank(load("olmo3_32b"), gpus.Nodes.parse("a100:8x1"))


def test_a_search_learns_from_what_it_compiles():
    """A pretended compiler, for which plans that keep much do not fit, and others are as said."""
    c, tried = load("olmo3_7b"), []

    def compile_(config):
        tried.append(search.overrides(config.mesh, config.compute))
        plan = analytic.predict(config, NODES)
        if config.compute.remat in ("none", "qkv_mlp"):
            return 1.3 * plan.available
        return plan

    compiled, ranked = search.search(c, NODES, compile_, 3)
    assert len(tried) == len({*tried}) == 3
    assert not {x.overrides for x in ranked} & {*tried[:1]}
    times = [search.expected(x.plan) for x in compiled]
    assert times == sorted(times)
    search.search(c, NODES, compile_, 1)
    assert len(tried) == 4


def test_of_a_config_that_fits_nowhere_nothing_is_found():
    few = gpus.Nodes.parse("a100:8x1")
    assert search.search(load("olmo3_32b"), few, lambda c: 0.0, 1) == ([], [])


def test_a_config_that_has_no_mesh_says_what_is_wrong():
    c = with_(load("olmo3_7b"), data={"global_batch_size": 7 * 8192})
    with pytest.raises(ConfigError, match="7 rows of seq_len=8192, not divisible"):
        search.rank(c, NODES)


# --- what is kept on disk -------------------------------------------------------------------------


def test_a_kept_program_is_of_all_that_reaches_it_and_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_versions", lambda: ["1"])
    store, where, c = compiled.PlanStore(tmp_path), Slice.parse("v5p:2x2x1"), load("olmo3_7b")
    base = store._path(c, where)
    assert store._path(with_(c, log={"interval": 77}, optim={"lr": 9e-9}), where) == base
    others = [
        store._path(with_(c, compute={"remat": "none"}), where),
        store._path(with_(c, data={"global_batch_size": 8192 * 8}), where),
        store._path(with_(c, model={"n_layers": 4}), where),
        store._path(with_(c, train={"z_loss": None}), where),
        store._path(c, Slice.parse("v5p:2x2x2")),
    ]
    monkeypatch.setattr(compiled, "_versions", lambda: ["2"])
    assert len({base, *others, store._path(c, where)}) == 7


def test_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    store, where, c = compiled.PlanStore(tmp_path), Slice.parse("v5p:2x2x1"), load("olmo3_7b")
    monkeypatch.setattr(compiled, "_versions", lambda: ["1"])
    whole = compiled.Program("HloModule x", {"temp": 1.0}, None, 2.0)
    content = gzip.compress(json.dumps(dataclasses.asdict(whole)).encode())
    path = store._path(c, where)
    damages = (b"", content[:-9], b"HloModule", gzip.compress(b"[1]"), gzip.compress(b'{"text": '),
               gzip.compress(b"[" * 100_000))  # fmt: skip
    for damage in damages:
        path.write_bytes(damage)
        assert store.kept(c, where) is None, damage
    path.write_bytes(content)
    assert store.kept(c, where) == whole

    case = kernels.Case("v5p", 8192, 32, 8, 128)
    monkeypatch.setattr(kernels, "seconds", lambda case: (0.25, 0.5))
    assert store.attention(case) == (0.25, 0.5)
    (path,) = tmp_path.glob("attention-*")
    for damage in (b"", b"[0.25", b"[0.25]", b"\xff"):
        path.write_bytes(damage)
        assert store.attention(case) == (0.25, 0.5), damage
    monkeypatch.setattr(kernels, "seconds", lambda case: 1 / 0)
    assert store.attention(case) == (0.25, 0.5)


def test_sources_of_a_step_are_all_that_it_imports():
    code = "import sys, olmo_jax.training.step, olmo_jax.kernels.pallas_tpu; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    modules = [x.split(".")[1:] for x in done.stdout.split() if x.startswith("olmo_jax.")]
    files = {"/".join(path) + ".py" for path in modules} & {*map(str, sources_of_the_package())}
    unknown = {
        f for f in files if f not in compiled.SOURCES and f.split("/")[0] not in compiled.SOURCES
    }
    # Options and counts, without an effect on the program beside what it is asked for.
    beside = (
        "costs data options parameters presets renamed run schedule_problems text training typed"
    )
    assert unknown == {"files.py", *(f"config/{name}.py" for name in [*beside.split(), "typed"])}
    with pytest.raises(FileNotFoundError):
        compiled._sources(("step.py",))


def sources_of_the_package():
    folder = ROOT / "olmo_jax"
    return [path.relative_to(folder) for path in folder.rglob("*.py")]


# --- the command line -----------------------------------------------------------------------------


def plan_there(*arguments):
    """The command in a process of its own."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    variables.pop("XLA_FLAGS", None)  # those of the tests are for a CPU
    command = [sys.executable, "-m", "olmo_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


@pytest.fixture
def plan_here(monkeypatch, capsys):
    """The command in this process: formulas and messages need no other."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(*arguments):
        code = plan.main(list(arguments))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run


OLMO_3 = ["--config=configs/olmo3_7b.py"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--topology=h100:8x16"], 2, "--config"),
        (["--config=configs/olmo3_7b.py", "--topology=h100:8x1", "--fast"], 2, "--fast"),
        (["--config=configs/none.py", "--topology=h100:8x16"], 2, "no such file"),
        ([*OLMO_3, "--topology=v9:4x4"], 2, "v9:4x4"),
        ([*OLMO_3, "--topology=h100:8"], 2, "h100:8x16"),
        ([*OLMO_3, "--topology=h100:8x00"], 2, "h100:8x16"),
        ([*OLMO_3, "--topology=h100:8x99999999999"], 2, "h100:8x16"),
        ([*OLMO_3, f"--topology=v5p:4x{'4' * 5000}"], 2, "v5p:4x4x8"),
        ([*OLMO_3, "--topology=h100:8x1", "--compiles=-1"], 2, "--compiles=-1: need"),
        ([*OLMO_3, "--topology=h100:8x1", "--price=-1"], 2, "--price"),
        ([*OLMO_3, "--topology=h100:8x1", "--price=nan"], 2, "--price"),
        ([*OLMO_3, "--topology=h100:8x16", "--config.mesh.fsdp=3"], 2, "needs 3 devices"),
        (
            [*OLMO_3, "--topology=h100:8x16", "--search", "--config.data.batch_sizes=8192,8192"],
            2,
            "config.data.batch_starts: need one start per batch size",
        ),
        (
            [*OLMO_3, "--topology=h100:8x16", "--search", "--config.data.seq_len=0"],
            2,
            "config.data.seq_len=0: need a number from 2 to",
        ),
        ([*OLMO_3, "--topology=h100:8x16", "--config.compute.accumulate=3"], 2, "not divisible"),
        (
            [*OLMO_3, "--topology=h100:8x16", "--search", "--config.mesh.fsdp=8"],
            2,
            "--search finds config.mesh.fsdp: leave it out",
        ),
        (
            [*OLMO_3, "--topology=h100:8x16", "--search", "--config.data.global_batch_size=65536"],
            2,
            "65536 tokens is 8 rows of seq_len=8192, not divisible by mesh.data x fsdp x expert",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, code, says, plan_here):
    done = plan_here(*arguments)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[-1]
    assert not done.stdout


def test_a_plan_for_gpus_says_that_it_is_a_formula(plan_here):
    arguments = ["--config=configs/olmo3_7b.py", "--topology=h100:8x16", "--search", "--price=2"]
    done = plan_there(*arguments)  # as a user starts it
    assert done.returncode == 0, done.stderr
    assert "nothing was compiled and nothing ran" in done.stdout
    pasted = done.stdout.splitlines()[-1].split()
    again = plan_here("--config=configs/olmo3_7b.py", "--topology=h100:8x16", *pasted)
    first = [line for line in done.stdout.splitlines() if line.startswith(("step", "MFU"))]
    assert again.returncode == 0
    assert [x for x in again.stdout.splitlines() if x.startswith(("step", "MFU"))] == first


@pytest.mark.parametrize("more", [[], ["--search"]])
def test_a_plan_that_does_not_fit_says_what_it_needs_and_no_speed(more, plan_here):
    done = plan_here("--config=configs/olmo3_32b.py", "--topology=h100:8x1", *more)
    assert (done.returncode, done.stderr) == (1, "")
    assert "does not fit" in done.stdout
    assert "GiB" in done.stdout
    assert "tokens/s" not in done.stdout


def test_a_growing_batch_is_planned_at_its_largest(plan_here):
    place = [*OLMO_3, "--topology=h100:8x16", "--config.compute.accumulate=1"]
    grows = ["--config.data.batch_sizes=1048576,8388608", "--config.data.batch_starts=0,1000000000"]
    first = plan_here(*place, *grows)
    assert first.returncode == 0, first.stderr
    assert "8,388,608 tokens (the largest of config.data.batch_sizes)" in first.stdout
    largest = plan_here(*place, "--config.data.global_batch_size=8388608")
    of = lambda text: [x for x in text.splitlines() if x.startswith(("step", "MFU", "FLOPs"))]  # noqa: E731
    assert of(first.stdout) == of(largest.stdout)


def budget(config):
    return report.token_budget(config.train, config.data)


def test_the_run_is_as_long_as_the_config_says():
    assert budget(load("olmo3_7b")) == 597_046 * 512 * 8192
    assert budget(load("olmo3_7b_midtrain")) == 100_000_000_000
    assert budget(load("olmo2_7b")) is None  # one epoch


# --- the recommended plans ------------------------------------------------------------------------

PLANS = (ROOT / "docs/plans.md").read_text()


def test_headers_of_configs_and_the_table_say_the_same():
    rows = [line.split(" | ") for line in PLANS.splitlines() if line.startswith("| olmo")]
    found = set()
    for names, slice_name, mesh, compute, *_, how in rows:
        for name in names.removeprefix("| ").split(", "):
            found.add(name)
            text = (ROOT / f"configs/{name}.py").read_text()
            plan = re.search(r"^Plan:(.*?)^Expect:", text, re.M | re.S)[1]
            options = re.findall(r"--config\.([\w.]+)=(\S+)", plan)
            c = load(name, **{key.replace(".", "__"): value for key, value in options})
            assert f"on {slice_name}; {'compiled' if 'compiled' in how else 'by formula'}: " in plan
            validate(c, report.parse(slice_name).n_devices)
            axes = dataclasses.asdict(c.mesh).items()
            assert mesh == " x ".join(f"{axis} {n}" for axis, n in axes if n > 1)
            assert compute == f"{c.compute.remat}, {c.compute.accumulate}"
    known = {path.stem for path in (ROOT / "configs").glob("olmo*.py")}
    ladder = {name for name in known if re.fullmatch(r"olmo3_1b|olmo[23]_(\d+m|3b)", name)}
    assert found == known - ladder


# --- with the TPU compiler ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(libtpu, tmp_path_factory):
    """(what the tool printed for a small model on four chips, its options)."""
    options = [f"--config.{name}={value}" for name, value in SMALL.items()]
    options += ["--config=configs/tiny_olmo2.py", "--topology=v5e:2x2"]
    options += [f"--cache={tmp_path_factory.mktemp('plans')}"]
    return plan_there(*options), options


@pytest.mark.tpu
@pytest.mark.slow
def test_a_small_config_is_planned_and_kept(small):
    first, options = small
    assert first.returncode == 0, first.stderr
    assert "compiling" in first.stderr
    assert "Failed to find host bounds" not in first.stderr
    again = plan_there(*options)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert "nothing ran on such devices" in first.stdout
    assert {"attention", "collectives", "products"} <= {
        line.split()[0] for line in first.stdout.splitlines() if line
    }


@pytest.mark.tpu
@pytest.mark.slow
def test_the_formula_counts_the_products_of_the_program(small):
    _, options = small
    folder = next(x for x in options if x.startswith("--cache=")).removeprefix("--cache=")
    # With the mesh written out as the tool does, so that its program is found.
    c = config.load(str(ROOT / "configs/tiny_olmo2.py"), SMALL | {"mesh.fsdp": "4"})
    where = Slice.parse("v5e:2x2")
    plan = report.compiler(where, compiled.PlanStore(pathlib.Path(folder)))(c)
    assert isinstance(plan, Plan)
    predicted = analytic.predict(c, where)
    assert predicted.done == pytest.approx(plan.done, rel=0.02)
    assert predicted.memory["parameters"] == plan.memory["parameters"]


@pytest.mark.tpu
@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_it_needs(small):
    more = ["--config.data.global_batch_size=16777216", "--config.compute.loss_chunk=none"]
    done = plan_there(*small[1], *more)
    assert done.returncode == 1
    assert done.stdout.startswith("does not fit: needs ")
    assert "a device has 15.75 GiB" in done.stdout


@pytest.mark.tpu
@pytest.mark.by_hand
def test_olmo_3_7b_is_planned_for_a_pod(libtpu, tmp_path):
    mesh = ["--config.mesh.data=4", "--config.mesh.fsdp=32"]
    done = plan_there(
        "--config=configs/olmo3_7b.py", "--topology=v5p:4x4x8", f"--cache={tmp_path}", *mesh
    )
    assert done.returncode == 0, done.stderr
    mfu = next(line for line in done.stdout.splitlines() if line.startswith("MFU"))
    assert 0.5 < float(mfu.split()[1].removesuffix("%")) / 100 < 0.8
