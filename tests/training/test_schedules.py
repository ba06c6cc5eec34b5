"""Learning rates against OLMo-core's and OLMo's own values, and what a config may ask for."""

import dataclasses
import json
import math

import pytest

from olmo_jax.config import typed
from olmo_jax.config.schedule_problems import optimizer_problems
from olmo_jax.config.training import OptimConfig, ScheduleConfig, StageConfig
from olmo_jax.training import schedules


def schedule(name, **options):
    return ScheduleConfig(**{"name": name, "warmup": 10} | options)


CORE = {
    "cos_with_warmup": schedule("cos_with_warmup"),
    "linear_with_warmup": schedule("linear_with_warmup"),
    "half_cos": schedule("half_cos_with_warmup"),
    "inv_sqrt": schedule("inv_sqrt_with_warmup"),
    "wsd": schedule("wsd", decay=20),
    "wsd_frac": schedule("wsd", decay_fraction=0.1),
    "constant_with_warmup": schedule("constant_with_warmup"),
    "cos_lin_decay": schedule("cos_with_warmup_and_linear_decay", decay=20),
    "power": schedule("power_lr", decay=20),
    "wsds": schedule("wsds", period_lengths=(50, 50), decay=10),
    "exponential": schedule("exponential", warmup=0),
    "cos_tmax": schedule("cos_with_warmup", t_max=200),
    "sequential": schedule(
        "sequential",
        stages=(StageConfig(40, "linear_with_warmup", alpha_f=0.5), StageConfig(0, "constant")),
    ),
    "composable": schedule(
        "composable",
        warmup=0,
        stages=(StageConfig(10, "linear", 1.0), StageConfig(60, "cosine", 0.3)),
        final_decay_start=80,
        final_decay=20,
    ),
}
LEGACY = {
    "cosine_with_warmup(min_lr default)": schedule("cos_with_warmup", warmup_min_lr=3e-5),
    "cosine_with_warmup(min_lr=0)": schedule("cos_with_warmup"),
    "linear": schedule("linear_with_warmup"),
    "linear_t_warmup0_alpha0": schedule("linear_with_warmup", warmup=0, alpha_f=0.0),
    "cosine_linear_envelope": schedule("legacy_cos_linear"),
    "inverse_sqrt": schedule("legacy_inv_sqrt"),
}
CONSTANT = ScheduleConfig("constant")
TURN_NEGATIVE = ("wsd", "wsd_frac", "cos_lin_decay", "power")  # in OLMo-core, past t_max


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "train_math.json").read_text())


def rates(s, times, t_max=100, lr=3e-4):
    return [schedules.learning_rate(OptimConfig(lr=lr, schedule=s), t, t_max) for t in times]


@pytest.mark.parametrize("name", CORE)
def test_schedules_equal_olmo_core(golden, name):
    want = golden["schedules_core"]
    assert set(CORE) == set(want["values"])
    assert rates(CORE[name], want["steps"]) == pytest.approx(want["values"][name], rel=1e-12)


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_schedules_equal_olmo(golden, name):
    want = golden["schedules_legacy"]
    assert set(LEGACY) == set(want["values"])
    assert rates(LEGACY[name], want["steps"]) == pytest.approx(want["values"][name], rel=1e-12)


def test_past_their_end_schedules_go_on_as_in_olmo_core_but_never_below_their_final_value(golden):
    want = golden["schedules_core"]["beyond_t_max"]
    for name, values in want["values"].items():
        if name in TURN_NEGATIVE:
            assert min(values) < 0
            values = [0.0] * len(values)
        assert rates(CORE[name], want["steps"]) == pytest.approx(values, rel=1e-12), name


@pytest.mark.parametrize("name", [*CORE, *LEGACY])
def test_no_schedule_is_ever_negative(name):
    s = dataclasses.replace((CORE | LEGACY)[name], decay_min_lr=1e-9)
    assert min(rates(s, range(500))) >= 0


def test_the_final_value_is_decay_min_lr():
    for name in ("wsd", "power", "cos_lin_decay", "wsds"):
        s = dataclasses.replace(CORE[name], decay_min_lr=1e-5)
        assert rates(s, [100, 101, 10_000]) == [1e-5] * 3, name


def test_a_decay_of_nothing_said_is_a_tenth():
    for name in ("wsd", "power_lr", "cos_with_warmup_and_linear_decay"):
        times = range(101)
        assert rates(schedule(name), times) == rates(schedule(name, decay=10), times)


def test_warmup_may_be_a_fraction_of_the_schedule():
    s = schedule("cos_with_warmup", warmup=0, warmup_fraction=0.1)
    assert rates(s, range(101)) == rates(CORE["cos_with_warmup"], range(101))
    s = schedule("wsds", warmup=0, warmup_fraction=0.2, period_lengths=(50, 50), decay=10)
    assert rates(s, range(101)) == rates(CORE["wsds"], range(101))


def test_a_cosine_longer_than_the_run_is_cut_by_a_line_at_the_end_of_the_run():
    s = schedule("cos_with_warmup_and_linear_decay", t_max=200, decay=20)
    cosine = rates(CORE["cos_tmax"], range(81))
    assert rates(s, range(81)) == cosine
    assert rates(s, [90, 100]) == pytest.approx([cosine[80] / 2, 0.0])


def test_periods_have_their_own_peaks():
    s = schedule("wsds", period_lengths=(50, 50), period_peaks=(1.0, 0.5), decay=10)
    assert rates(s, [30, 50, 51, 90, 95]) == pytest.approx([3e-4, 0, 1.5e-4, 1.5e-4, 7.5e-5])


def test_a_sequence_can_end_with_a_decay_from_wherever_it_is():
    s = dataclasses.replace(
        CORE["sequential"], final_decay_start=30, final_decay=10, final_decay_lr=1e-5
    )
    high = rates(CORE["sequential"], [30])[0]
    want = [high, (high + 1e-5) / 2, 1e-5, 1e-5]
    assert rates(s, [30, 35, 40, 100]) == pytest.approx(want)


def test_each_schedule_of_a_sequence_begins_where_the_last_one_ended():
    parts = (StageConfig(40, "linear_with_warmup", alpha_f=0.5), StageConfig(0, "wsd"))
    s = schedule("sequential", stages=parts, decay=30)
    assert rates(s, [40, 41, 70, 85, 100]) == pytest.approx([1.5e-4, 1.5e-4, 1.5e-4, 7.5e-5, 0])


def test_official_hand_over_points_follow_from_the_formula():
    """OLMo 2's stage 2 starts where stage 1 was, in tokens; 13B only with a peak of 9e-4."""
    for peak, step, batch, want in (
        (4e-4, 1_907_359, 2_097_152, 7.44873e-5),
        (3e-4, 928_646, 4_194_304, 6.1351e-5),
        (9e-4, 596_057, 8_388_608, 9.0e-5),
    ):
        s = schedule("cos_with_warmup", unit="tokens", warmup=8_388_608_000, t_max=5 * 10**12)
        rate = rates(s, [step * batch], t_max=6e12, lr=peak)[0]
        assert rate == pytest.approx(want, rel=1e-5)


def test_the_peak_comes_from_the_config_at_every_step():
    """allenai/OLMo-core PR#27: a restart took the peak from the checkpoint."""
    old, new = (rates(schedule("cos_with_warmup", warmup=4), [11], 20, lr) for lr in (1e-3, 5e-4))
    want = 5e-5 + (5e-4 - 5e-5) * (1 + math.cos(math.pi * 7 / 16)) / 2
    assert new == pytest.approx([want], abs=1e-12)
    assert new == pytest.approx([old[0] / 2], rel=1e-12)


def test_clipping_is_relaxed_while_it_warms_up():
    cfg = OptimConfig(max_grad_norm=1.0, clip_warmup=1000, clip_warmup_factor=10.0)
    assert [schedules.clip_norm(cfg, t) for t in (1, 1000, 1001)] == [10.0, 10.0, 1.0]
    assert schedules.clip_norm(OptimConfig(max_grad_norm=None), 1) == math.inf


def test_a_larger_batch_scales_the_rate_by_its_square_root():
    assert schedules.batch_lr_scale(2**20, 2**22) == 2.0
    assert schedules.batch_lr_scale(2**20, 2**20) == 1.0


def problems(cfg):
    """What is wrong for a run of 100 steps: with options of their own, then with relations."""
    cfg, lines = typed.checked(cfg, "config.optim")
    return [*lines.values(), *optimizer_problems(cfg, 100)]


@pytest.mark.parametrize("name", [*CORE, *LEGACY])
def test_good_schedules_have_no_problems(name):
    assert problems(OptimConfig(schedule=(CORE | LEGACY)[name])) == []


@pytest.mark.parametrize(
    ("s", "line"),
    [
        (schedule("cos_with_warmup", warmup=200), "warmup=200: longer than the schedule, 100"),
        (schedule("cos_with_warmup", warmup=-1), "warmup=-1: need a number from 0"),
        (schedule("cos_with_warmup", warmup_fraction=0.1), "warmup=10 and warmup_fraction=0.1"),
        (schedule("wsd", warmup=0, warmup_fraction=2.0), "warmup_fraction=2.0: need a number"),
        (schedule("cos_with_warmup", warmup_min_lr=1.0), "warmup_min_lr=1.0: need a number in"),
        (schedule("cos_with_warmup", alpha_f=-0.1), "alpha_f=-0.1: need a number from 0.0"),
        (schedule("cos_with_warmup", t_max=0), "t_max=0: need a number from 1"),
        (schedule("cos_with_warmup", decay=9), "decay=9: cos_with_warmup does not read it"),
        (schedule("constant"), "warmup: constant has none; use constant_with_warmup"),
        (schedule("wsd", decay=95), "decay=95: with warmup=10 longer than the run, 100"),
        (schedule("wsd", decay=0), "decay=0: need a number from 1"),
        (schedule("wsd", decay=5, decay_fraction=0.1), "decay=5 and decay_fraction=0.1: set one"),
        (schedule("wsd", decay_min_lr=-1.0), "decay_min_lr=-1.0: need a number from 0.0"),
        (schedule("power_lr", warmup=0), "warmup=0: power_lr needs at least 1"),
        (schedule("legacy_inv_sqrt", warmup=0), "warmup=0: legacy_inv_sqrt needs at least 1"),
        (schedule("exponential", warmup=0, lr_min=0.0), "lr_min=0.0: need a number from 1e-37"),
        (schedule("wsds"), "period_lengths=(): wsds needs the length of every period"),
        (
            schedule("wsds", period_lengths=(15, 50), decay=10),
            "period_lengths[0]=15: need 1 to 15 steps for warmup=10 and decay=10 together",
        ),
        (
            schedule("wsds", period_lengths=(50, 50), period_peaks=(1.0,)),
            "period_peaks=(1.0,): need 2 or none",
        ),
        (schedule("composable", warmup=0), "stages: composable needs at least one"),
        (
            schedule("composable", warmup=0, stages=(StageConfig(5, "wsd"),)),
            "stages[0].shape=wsd: need one of linear, cosine",
        ),
        (
            schedule("sequential", stages=(StageConfig(5, "linear"),)),
            "stages[0].shape=linear: need one of constant, constant_with_warmup",
        ),
        (
            schedule("sequential", stages=(StageConfig(100, "wsd"), StageConfig(0, "wsd"))),
            "stages[0].duration=100: need 1 to 99 steps, for the next stage to begin before",
        ),
        (
            schedule("sequential", stages=(StageConfig(50, "wsd"), StageConfig(0, "power_lr"))),
            "stages[1]: warmup=0: power_lr needs at least 1",
        ),
        (
            dataclasses.replace(CORE["composable"], final_decay=0),
            "final_decay=0 from final_decay_start=80: need at least 1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.name,
)
def test_a_bad_schedule_is_named(s, line):
    (found,) = problems(OptimConfig(schedule=s))
    assert found.startswith(f"config.optim.schedule.{line}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("clip_warmup", -1),
        ("clip_warmup_factor", 0.0),
        ("skip_sigma", 0.0),
        ("skip_window", 5),
    ],
)
def test_a_bad_optimizer_option_is_named(option, value):
    cfg = OptimConfig(schedule=CONSTANT, **{option: value})
    (found,) = problems(cfg)
    assert found.startswith(f"config.optim.{option}={value}: need")


def test_all_problems_are_reported_at_once():
    cfg = OptimConfig(beta1=2.0, schedule=schedule("wsd", warmup=-1, decay=0, t_max=0))
    assert len(problems(cfg)) == 4
