"""What is wrong with an optimizer and its schedule, for a run of some length."""

import math

from olmo_jax.config.options import LARGEST
from olmo_jax.config.training import (
    OptimConfig,
    ScheduleConfig,
    decay_length,
    stage_of,
    warmup_length,
)
from olmo_jax.files import brief

DECAYING = ("wsd", "power_lr", "cos_with_warmup_and_linear_decay")  # end with a line of `decay`
STAGED = ("composable", "sequential")
UNWARMED = ("constant", "composable", "exponential")  # read no warmup
NEED_WARMUP = ("power_lr", "inv_sqrt_with_warmup", "legacy_inv_sqrt")  # divide by it
SEQUENCE = (
    "constant", "constant_with_warmup", "wsd", "power_lr", "linear_with_warmup",
    "inv_sqrt_with_warmup", "cos_with_warmup", "half_cos_with_warmup",
    "cos_with_warmup_and_linear_decay", "legacy_inv_sqrt", "legacy_cos_linear",
)  # fmt: skip  # may be stages of a sequential schedule


def optimizer_problems(cfg: OptimConfig, t_max: float) -> list[str]:
    """What is wrong with the optimizer's options for a run until `t_max`, one line each."""
    return [f"config.optim.{line}" for line in _optimizer(cfg) + _schedule(cfg, t_max)]


def _optimizer(cfg: OptimConfig) -> list[str]:
    found: list[str] = []
    if cfg.clip_warmup > 0 and cfg.max_grad_norm is None:
        found.append(f"clip_warmup={cfg.clip_warmup}: max_grad_norm=none clips nothing")
    if cfg.name in ("adamw", "skip_step_adamw"):
        found += [f"options.{name}: {cfg.name} has none" for name, _ in cfg.options]
    if cfg.name == "skip_step_adamw" and cfg.skip_window < 6:
        # The guard starts at half a window, and a standard deviation needs two earlier steps.
        found.append(f"skip_window={cfg.skip_window}: need at least 6 steps")
    return found


def _schedule(cfg: OptimConfig, t_max: float) -> list[str]:
    s = cfg.schedule
    problems = _unused(s)
    for name in ("warmup", "decay"):
        units, fraction = getattr(s, name), getattr(s, f"{name}_fraction")
        if units and fraction is not None:
            problems.append(f"{name}={units} and {name}_fraction={fraction}: set one of them")
        low = getattr(s, f"{name}_min_lr")
        if low > cfg.lr:
            problems.append(f"{name}_min_lr={low}: need a number in [0, lr={cfg.lr}]")
    if (highest := _highest(cfg)) > LARGEST:
        problems.append(f"name={s.name}: reaches a rate of {highest:.0e}; need at most {LARGEST}")
    if s.name == "exponential" and s.lr_min > cfg.lr:
        problems.append(f"lr_min={s.lr_min}: need a number in (0, lr={cfg.lr}]")
    if not problems:  # lengths below rest on the values above
        total = s.t_max or t_max
        if s.name == "wsds":
            problems = _periods(s)
        elif s.name in STAGED:
            problems = _stages(s, t_max)
        elif s.name not in UNWARMED:
            problems = _lengths(s, warmup_length(s, total), total, t_max)
    return [f"schedule.{line}" for line in problems]


def _highest(cfg: OptimConfig) -> float:
    """A rate that the schedule never exceeds."""
    s = cfg.schedule
    ends = (s.alpha_f, *s.period_peaks, *(stage.end for stage in s.stages))
    chain = math.prod(max(1.0, stage.alpha_f) for stage in s.stages)
    return cfg.lr * max(1.0, chain, *ends)


def _unused(s: ScheduleConfig) -> list[str]:
    """Options that are set and that this schedule would not read."""
    decaying = (*DECAYING, "wsds", "sequential")
    readers = {
        "decay": decaying,
        "decay_fraction": decaying,
        "period_lengths": ("wsds",),
        "period_peaks": ("wsds",),
        "stages": STAGED,
        "final_decay_start": STAGED,
    }
    found = [
        f"{option}={getattr(s, option)}: {s.name} does not read it, only {', '.join(names)}"
        for option, names in readers.items()
        if getattr(s, option) not in (None, ()) and s.name not in names
    ]
    if s.name in UNWARMED and (s.warmup or s.warmup_fraction):
        hint = {"constant": "; use constant_with_warmup", "composable": "; make it a stage"}
        found.append(f"warmup: {s.name} has none{hint.get(s.name, '')}")
    return found


def _lengths(s: ScheduleConfig, warmup: float, total: float, run: float) -> list[str]:
    """Phases against the length of their schedule; the cut cosine is decayed within the run."""
    if s.name in NEED_WARMUP and warmup < 1:
        return [f"warmup={warmup}: {s.name} needs at least 1, it scales by the time since then"]
    if warmup > total:
        hint = "; to end a run early set train.hard_stop"
        return [f"warmup={warmup}: longer than the schedule, {total} {s.unit}{hint}"]
    if s.name not in DECAYING:
        return []
    end = run if s.name == "cos_with_warmup_and_linear_decay" else total
    decay = decay_length(s, end)
    if decay < 1:
        return [f"decay={decay}: {s.name} needs at least 1; constant_with_warmup has none"]
    if warmup + decay > end:
        return [f"decay={decay}: with warmup={warmup} longer than the run, {end} {s.unit}"]
    return []


def _periods(s: ScheduleConfig) -> list[str]:
    if not s.period_lengths:
        return ["period_lengths=(): wsds needs the length of every period"]
    problems: list[str] = []
    if s.period_peaks and len(s.period_peaks) != len(s.period_lengths):
        problems.append(f"period_peaks={s.period_peaks}: need {len(s.period_lengths)} or none")
    for i, length in enumerate(s.period_lengths):
        warmup, decay = 0 if i else warmup_length(s, length), decay_length(s, length)
        if decay < 1 or warmup + decay > length:
            problems.append(
                f"period_lengths[{i}]={length}: need 1 to {length} {s.unit} for warmup={warmup}"
                f" and decay={decay} together"
            )
    return problems


def _stages(s: ScheduleConfig, run: float) -> list[str]:
    if not s.stages:
        return [f"stages: {s.name} needs at least one"]
    shapes = SEQUENCE if s.name == "sequential" else ("linear", "cosine")
    problems: list[str] = []
    start = 0
    for i, stage in enumerate(s.stages):
        at, is_last = f"stages[{i}]", i == len(s.stages) - 1
        if stage.shape not in shapes:
            problems.append(f"{at}.shape={brief(stage.shape)}: need one of {', '.join(shapes)}")
        if s.name == "sequential" and not problems:
            if not is_last and not 1 <= stage.duration < run - start:
                problems.append(
                    f"{at}.duration={stage.duration}: need 1 to {run - start - 1} {s.unit}, for"
                    f" the next stage to begin before the end of the run, {run}"
                )
            part, length = stage_of(s, i), run - start if is_last else stage.duration
            problems += [
                f"{at}: {x}" for x in _lengths(part, warmup_length(part, length), length, length)
            ]
        start += stage.duration
    if s.final_decay_start is not None and s.final_decay < 1:
        problems.append(
            f"final_decay={s.final_decay} from final_decay_start={s.final_decay_start}: need at"
            " least 1"
        )
    return problems
