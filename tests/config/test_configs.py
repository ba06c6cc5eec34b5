"""Every config file builds and validates, says what it is, and has the numbers of its run."""

import ast
import math
import pathlib
import re
import shlex

import pytest

from olmo_jax import config, presets, train
from olmo_jax.config import costs
from olmo_jax.config.run import validate
from olmo_jax.config.schedule_problems import optimizer_problems
from olmo_jax.training import schedules

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
LADDER = [name for name in FILES if re.fullmatch(r"olmo3_1b|olmo[23]_(\d+m|3b)", name)]
TINY = [name for name in FILES if name.startswith("tiny_")]
QUICK = [name for name in FILES if name.startswith("quickstart")]
OFFICIAL = [name for name in FILES if name not in {*LADDER, *TINY, *QUICK}]

T = 10**12
B = 10**9
# peak LR, schedule, its unit, warm-up, t_max, alpha_f; batch (rows x tokens), duration, hard stop.
SCHEDULES = {
    "olmo1_1b": (4e-4, "cos", "steps", 2000, None, 0.1, 2048, 2048, (739_328, "steps"), None),
    "olmo1_7b": (3e-4, "linear", "steps", 5000, None, 0.1, 2048, 2048, (2 * T, "tokens"), None),
    "olmo1_7b_0424": (
        3e-4, "cos", "tokens", 10_485_760_000, 3 * T, 0.1, 1024, 4096, (2, "epochs"), None,
    ),
    "olmo1_7b_0724": (
        3e-4, "cos", "tokens", 10_485_760_000, 3 * T, 0.1, 1024, 4096, (2, "epochs"), None,
    ),
    "olmoe_1b_7b": (
        4e-4, "cos", "tokens", 10_485_760_000, 5 * T, 0.1, 1024, 4096, (5100 * B, "tokens"), None,
    ),
    "olmoe_1b_7b_anneal": (
        4e-5, "linear", "steps", 0, None, 0.0, 1024, 4096, (100 * B, "tokens"), None,
    ),
    "olmo2_1b": (
        4e-4, "cos", "tokens", 8_388_608_000, 5 * T, 0.1, 512, 4096, (4 * T, "tokens"), None,
    ),
    "olmo2_7b": (
        3e-4, "cos", "tokens", 8_388_608_000, 5 * T, 0.1, 1024, 4096, (1, "epochs"), None,
    ),
    "olmo2_13b": (
        9e-4, "cos", "tokens", 8_388_608_000, 5 * T, 0.1, 2048, 4096, (5 * T, "tokens"), None,
    ),
    "olmo2_32b": (
        6e-4, "cos", "steps", 2000, None, 0.1, 2048, 4096, (6500 * B, "tokens"), (721_901, "steps"),
    ),
    "olmo2_1b_stage2": (
        7.4487e-5, "linear", "steps", 0, None, 0.0, 512, 4096, (50 * B, "tokens"), None,
    ),
    "olmo2_7b_stage2": (
        6.1499e-5, "linear", "steps", 0, None, 0.0, 1024, 4096, (50 * B, "tokens"), None,
    ),
    "olmo2_13b_stage2": (
        9e-5, "linear", "steps", 0, None, 0.0, 2048, 4096, (100 * B, "tokens"), None,
    ),
    "olmo2_32b_stage2": (
        6.6232e-5, "linear", "steps", 0, None, 0.0, 2048, 4096, (100 * B, "tokens"), None,
    ),
    "olmo3_7b": (
        3e-4, "cos", "steps", 2000, None, 0.1, 512, 8192, (5 * T, "tokens"), (597_046, "steps"),
    ),
    "olmo3_7b_part2": (
        3e-4, "half_cos", "steps", 597_046, None, 0.1, 512, 8192, (7 * T, "tokens"), (1, "epochs"),
    ),
    "olmo3_7b_midtrain": (
        2.0712352850360292e-4, "linear", "steps", 0, None, 0.0, 256, 8192, (100 * B, "tokens"),
        None,
    ),
    "olmo3_7b_longcontext": (
        2.0712352850360292e-4, "linear", "steps", 200, None, 0.0, 64, 65_536, (50 * B, "tokens"),
        None,
    ),
    "olmo3_32b": (
        6e-4, "cos", "steps", 2000, None, 0.1, 1024, 8192, (1, "epochs"), (656_000, "steps"),
    ),
    "olmo3_32b_midtrain": (
        2.071235285e-4, "linear", "steps", 0, None, 0.0, 512, 8192, (100 * B, "tokens"), None,
    ),
    "olmo3_32b_longcontext": (
        2.071235285e-4, "linear", "steps", 200, None, 0.0, 128, 65_536, (100 * B, "tokens"), None,
    ),
}  # fmt: skip

# model, optimizer, eps, exempt from decay, z-loss, loss divisor, its ranks; order, seed, filter.
LEGACY1 = ("adamw", 1e-5, ("embed",), None, "global_tokens", None, "legacy", 6198, False)
LEGACY17 = ("adamw", 1e-5, (), None, "global_tokens", None, "legacy", 6198, False)
LEGACYE = ("adamw", 1e-8, (), None, "global_tokens", None, "legacy", 6198, False)
LEGACY2 = ("adamw", 1e-8, ("embed",), 1e-4, "legacy_positions", None, "legacy", 6198, True)
CORE = ("skip_step_adamw", 1e-8, ("embed",), 1e-5, "per_rank_tokens")
RECIPES = {
    "olmo1_1b": ("olmo1_1B", *LEGACY1),
    "olmo1_7b": ("olmo1_7B", *LEGACY1),
    "olmo1_7b_0424": ("olmo1_7B_0424", *LEGACY17),
    "olmo1_7b_0724": ("olmo1_7B_0724", *LEGACY17),
    "olmoe_1b_7b": ("olmoe_1B_7B", *LEGACYE),
    "olmoe_1b_7b_anneal": ("olmoe_1B_7B", *LEGACYE[:7], 42, False),
    "olmo2_1b": ("olmo2_1B_v2", *LEGACY2),
    "olmo2_7b": ("olmo2_7B", *LEGACY2),
    "olmo2_13b": ("olmo2_13B", *LEGACY2),
    "olmo2_32b": ("olmo2_32B", *CORE, None, "core", 34_521, False),
    "olmo2_1b_stage2": ("olmo2_1B_v2", *LEGACY2[:7], 42, True),
    "olmo2_7b_stage2": ("olmo2_7B", *LEGACY2[:7], 42, True),
    "olmo2_13b_stage2": ("olmo2_13B", *LEGACY2[:7], 1110, True),
    "olmo2_32b_stage2": ("olmo2_32B", *CORE, None, "core", 1110, False),
    "olmo3_7b": ("olmo3_7B", *CORE, None, "core", 34_521, False),
    "olmo3_7b_part2": ("olmo3_7B", *CORE, None, "core", 34_521, False),
    "olmo3_7b_midtrain": ("olmo3_7B", *CORE, None, "core", 1337, False),
    "olmo3_7b_longcontext": ("olmo3_7B_long", *CORE, 32, "core", 34_521, False),
    "olmo3_32b": ("olmo3_32B", *CORE, 1024, "core", 34_521, True),
    "olmo3_32b_midtrain": ("olmo3_32B", *CORE, 512, "core", 42_069, True),
    "olmo3_32b_longcontext": ("olmo3_32B_long", *CORE, 128, "core", 34_521, True),
}

CONTINUES = {
    "olmoe_1b_7b_anneal": "olmoe_1b_7b",
    "olmo2_1b_stage2": "olmo2_1b",
    "olmo2_7b_stage2": "olmo2_7b",
    "olmo2_13b_stage2": "olmo2_13b",
    "olmo2_32b_stage2": "olmo2_32b",
    "olmo3_7b_part2": "olmo3_7b",
    "olmo3_7b_midtrain": "olmo3_7b_part2",
    "olmo3_7b_longcontext": "olmo3_7b_midtrain",
    "olmo3_32b_midtrain": "olmo3_32b",
    "olmo3_32b_longcontext": "olmo3_32b_midtrain",
}


def load(name: str, overrides: dict[str, str] | None = None) -> config.Config:
    return config.load(str(FILES[name]), overrides)


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(FILES[name].read_text())) or ""


def devices(name: str) -> int:
    """The devices that the docstring asks for."""
    found = re.search(r"(\d+) (?:chips|devices?)\b", docstring(name))
    return int(found[1]) if found else 1


def split(arguments: list[str]) -> dict[str, str]:
    """{"data.root": "x"} of ["--config.data.root=x"]."""
    pairs = (a.removeprefix("--config.").split("=", 1) for a in arguments)
    return dict(pairs)


def n_steps(cfg: config.Config) -> int:
    """Steps of the whole schedule of a run whose duration is not in epochs."""
    assert cfg.train.duration_unit != "epochs"
    if cfg.train.duration_unit == "steps":
        return cfg.train.duration
    return math.ceil(cfg.train.duration / cfg.data.global_batch_size)


def rate(cfg: config.Config, step: int) -> float:
    """The learning rate at a step."""
    s = cfg.optim.schedule
    batch = cfg.data.global_batch_size
    t_max = s.t_max or n_steps(cfg) * (batch if s.unit == "tokens" else 1)
    return schedules.learning_rate(cfg.optim, step * (batch if s.unit == "tokens" else 1), t_max)


# --- every file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_config_is_valid_on_its_own_mesh(name):
    cfg = load(name)
    validate(cfg, devices(name))
    assert cfg.name == name
    if cfg.train.duration_unit != "epochs":
        s = cfg.optim.schedule
        total = n_steps(cfg) * (cfg.data.global_batch_size if s.unit == "tokens" else 1)
        assert optimizer_problems(cfg.optim, total) == []


@pytest.mark.parametrize("name", FILES)
def test_docstring_says_how_to_run_what_it_needs_and_where_it_comes_from(name):
    text = docstring(name)
    for heading in ("Run:", "Needs:", "Expect:", "Source:"):
        assert re.search(rf"^{heading} ", text, re.M), heading
    command = shlex.split(re.search(r"^Run:.*?(python .*)", text, re.M)[1])
    assert command[:4] == ["python", "-m", "olmo_jax.train", f"--config=configs/{name}.py"]
    validate(load(name, split(command[4:])), devices(name))


@pytest.mark.parametrize("name", [*OFFICIAL, *LADDER])
def test_every_override_in_a_docstring_works(name):
    arguments = shlex.split(" ".join(re.findall(r"--config\.\S+=\S+", docstring(name))))
    changed = load(name, split(arguments))
    validate(changed, devices(name))
    assert changed != load(name)


@pytest.mark.parametrize("name", [*OFFICIAL, *LADDER])
def test_docstring_has_the_size_of_the_state(name):
    said = re.search(r"([\d.]+) GB of fp32\s+parameters and moments", docstring(name))
    n = costs.n_params(load(name).model).total
    assert said[1] == f"{12 * n / 1e9:.1f}"


# --- official runs --------------------------------------------------------------------------------


def test_every_official_run_is_in_the_tables():
    assert set(OFFICIAL) == set(SCHEDULES) == set(RECIPES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_official_one(name):
    cfg = load(name)
    lr, kind, unit, warmup, t_max, alpha_f, rows, seq_len, duration, hard_stop = SCHEDULES[name]
    o, s, t = cfg.optim, cfg.optim.schedule, cfg.train
    assert o.lr == lr
    assert (s.name, s.unit, s.warmup) == (f"{kind}_with_warmup", unit, warmup)
    assert (s.t_max, s.alpha_f) == (t_max, alpha_f)
    is_older = name.startswith("olmo1") or name == "olmoe_1b_7b"
    assert s.warmup_min_lr == pytest.approx(0.1 * lr if is_older else 0.0)
    assert (cfg.data.global_batch_size, cfg.data.seq_len) == (rows * seq_len, seq_len)
    assert (t.duration, t.duration_unit) == duration
    assert ((t.hard_stop, t.hard_stop_unit) if t.hard_stop else None) == hard_stop


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_official_one(name):
    cfg = load(name)
    preset, optimizer, eps, no_decay, z_loss, divisor, ranks, order, seed, is_filtered = RECIPES[
        name
    ]
    o, d, t = cfg.optim, cfg.data, cfg.train
    assert cfg.model == config.ModelConfig(**presets.MODELS[preset])
    assert (o.name, o.eps, o.no_decay) == (optimizer, eps, no_decay)
    assert (o.beta1, o.beta2, o.weight_decay, o.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert o.freeze_adam_step == name.startswith("olmo2_32b")
    assert (t.z_loss, t.loss_normalization, t.loss_ranks) == (z_loss, divisor, ranks)
    assert (d.order, d.seed, d.instance_filter) == (order, seed, is_filtered)
    assert d.max_target_seq_len == (8192 if name == "olmo2_32b" else None)
    is_long = name.endswith("_longcontext")
    assert d.document_mask == ("eos" if is_long else "none")
    assert d.source_permutation_seed == (123 if is_long else None)
    assert cfg.mesh.context == (8 if is_long else 1)
    is_neox = name.startswith(("olmo1", "olmoe"))
    experts = (0.01, 0.001, "olmoe") if name.startswith("olmoe") else (None, None, "olmoe")
    assert (t.load_balancing_loss, t.router_z_loss, t.router_loss_form) == experts
    assert (d.dtype, d.eos_id) == (("uint16", 50_279) if is_neox else ("uint32", 100_257))
    assert d.root == ""


def test_clipping_is_relaxed_at_first_in_olmo1_7b_and_0424():
    relaxed = {name: (load(name).optim.clip_warmup, load(name).optim.clip_warmup_factor)
               for name in OFFICIAL if load(name).optim.clip_warmup}  # fmt: skip
    assert relaxed == {
        "olmo1_7b": (1000, 10.0),
        "olmo1_7b_0424": (2_097_152_000, 5.0),
        "olmo1_7b_0724": (2_097_152_000, 5.0),
    }


def test_later_stages_start_from_the_stage_before():
    for name in OFFICIAL:
        k, before = load(name).checkpoint, CONTINUES.get(name)
        if before is None:
            assert k.load_path is None
            continue
        assert k.load_path in (f"runs/{before}", f"runs/{before}/checkpoints/step596047")
        assert k.load_optimizer
        assert k.load_position == (name == "olmo3_7b_part2")
        old, new = (config.to_dict(load(n).model) for n in (before, name))
        changed = {f"model.{key}" for key in new if new[key] != old[key]}
        assert set(k.allow_changes) == changed, name
    assert load("olmo3_7b").checkpoint.fixed_steps == (596_047,)


def test_step_counts_are_those_of_the_official_runs():
    assert n_steps(load("olmo2_1b")) + 10 == 1_907_359  # the legacy trainer ran 10 steps too many
    assert n_steps(load("olmo2_13b")) + 10 == 596_057
    assert n_steps(load("olmoe_1b_7b")) == 1_215_935
    assert n_steps(load("olmoe_1b_7b_anneal")) == 23_842
    assert n_steps(load("olmo2_1b_stage2")) + 10 == 23_852
    assert n_steps(load("olmo2_7b_stage2")) + 10 == 11_931
    assert n_steps(load("olmo2_13b_stage2")) + 10 == 11_931
    longer = {"train.duration": "300000000000"}
    assert n_steps(load("olmo2_13b_stage2", longer)) + 10 == 35_773
    assert n_steps(load("olmo2_32b_stage2")) == 11_921
    assert n_steps(load("olmo2_32b_stage2", longer)) == 35_763
    assert n_steps(load("olmo3_7b_midtrain")) == 47_684
    assert n_steps(load("olmo3_7b_longcontext")) == 11_921
    assert n_steps(load("olmo3_32b_midtrain")) == 23_842
    assert n_steps(load("olmo3_32b_longcontext")) == 11_921


@pytest.mark.parametrize(
    ("name", "step", "expected", "tolerance"),
    [
        ("olmo2_1b", 1_907_359, 7.44873e-5, 1e-4),
        ("olmo2_7b", 928_646, 6.1351e-5, 3e-3),  # its stage 2 has the rate of 650 steps before
        ("olmo2_13b", 596_057, 9.0e-5, 1e-4),
        ("olmo2_32b", 721_901, 6.62e-5, 1e-4),
    ],
)
def test_stage_1_ends_at_the_rate_where_stage_2_starts(name, step, expected, tolerance):
    at_end = rate(load(name), step)
    assert at_end == pytest.approx(expected, rel=1e-5 if name != "olmo2_32b" else 1e-3)
    second = load(f"{name}_stage2")
    assert second.optim.lr == pytest.approx(at_end, rel=tolerance)
    assert rate(second, n_steps(second)) == 0.0


def test_olmo3_7b_keeps_its_rate_over_the_two_parts():
    first, second = load("olmo3_7b"), load("olmo3_7b_part2")
    assert rate(first, 596_047) == pytest.approx(1.654e-4, abs=5e-8)
    assert rate(second, 596_047) == pytest.approx(1.647e-4, abs=5e-8)
    assert rate(first, 597_046) == pytest.approx(1.65e-4, rel=1e-5)
    assert rate(second, 597_046) == pytest.approx(1.65e-4, rel=1e-9)
    assert rate(second, 1_413_814) == pytest.approx(3.93e-5, abs=5e-8)
    as_reported = load("olmo3_7b_part2", {"optim.schedule.t_max": "1413814"})
    assert rate(as_reported, 1_413_814) == pytest.approx(3e-5, rel=1e-9)


# --- ladder and tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LADDER)
def test_ladder_rung_has_the_recipe_of_its_size(name):
    cfg = load(name)
    preset = re.sub(r"[mb]$", lambda unit: unit[0].upper(), name)
    assert cfg.model == config.ModelConfig(**presets.MODELS[preset])
    n, batch = costs.n_params(cfg.model).non_embedding, cfg.data.global_batch_size
    aim = 2048 * 160 * (n / 108e6) ** (2 / 3)
    assert batch == pytest.approx(aim, rel=0.25)
    expected = config.default()
    expected.update(presets.CORE_RUN)
    expected.update(presets.ladder(n, batch))
    whole = config.from_dict(expected)
    assert (cfg.optim, cfg.checkpoint) == (whole.optim, whole.checkpoint)
    assert cfg.train == whole.train
    assert cfg.data.seq_len == (4096 if name.startswith("olmo2") else 8192)


@pytest.mark.parametrize("name", TINY)
def test_tiny_config_is_small_and_fits_every_test_mesh(name):
    cfg = load(name)
    assert costs.n_params(cfg.model).total < 300_000
    assert (cfg.train.duration, cfg.checkpoint.interval) == (20, 10)
    assert (cfg.data.seq_len, cfg.data.global_batch_size) == (64, 8 * 64)
    assert (cfg.compute.dtype, cfg.data.corpus) == ("float32", None)
    assert cfg.model.n_layers == (4 if name == "tiny_olmo3" else 2)
    for mesh in ("fsdp=8", "data=2 fsdp=4", "tensor=2 fsdp=4", "context=4 fsdp=2"):
        shape = dict(pair.split("=") for pair in mesh.split())
        validate(load(name, {f"mesh.{axis}": n for axis, n in shape.items()}), 8)


# --- dry runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_every_config_passes_its_dry_run(path, capsys):
    assert train.main([f"--config={path}", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert f"parameters        {costs.n_params(config.load(str(path)).model).total:,}" in out
    for word in ("FLOPs per token", "mesh", "state per device", "no weight decay, "):
        assert word in out


@pytest.mark.parametrize("text", ["a.npy,b/*.npy", "[a.npy, b/*.npy]", "('a.npy', 'b/*.npy')"])
def test_a_list_on_the_command_line_needs_no_quotes(text):
    assert load("tiny_olmo2", {"data.paths": text}).data.paths == ("a.npy", "b/*.npy")
    assert load("tiny_olmo2", {"data.paths": "a.npy"}).data.paths == ("a.npy",)
