"""Learning rate and clipping norm of each step: host-side float64 functions of the config.

Time `t` counts in the schedule's unit: the number of the step (the first is 1), or the tokens seen
with the current batch. Nothing of it is state: a resumed run follows the config that it is given.
Source: OLMo-core, `src/olmo_core/optim/scheduler.py`; legacy_*: OLMo, `olmo/optim.py`.
"""

import math
from dataclasses import replace

from olmo_jax.config import OptimConfig, ScheduleConfig
from olmo_jax.options import LARGEST, brief

DECAYING = ("wsd", "power_lr", "cos_with_warmup_and_linear_decay")  # end with a line of `decay`
STAGED = ("composable", "sequential")
UNWARMED = ("constant", "composable", "exponential")  # read no warmup
NEED_WARMUP = ("power_lr", "inv_sqrt_with_warmup", "legacy_inv_sqrt")  # divide by it
SEQUENCE = (
    "constant", "constant_with_warmup", "wsd", "power_lr", "linear_with_warmup",
    "inv_sqrt_with_warmup", "cos_with_warmup", "half_cos_with_warmup",
    "cos_with_warmup_and_linear_decay", "legacy_inv_sqrt", "legacy_cos_linear",
)  # fmt: skip  # may be stages of a sequential schedule


def learning_rate(cfg: OptimConfig, t: float, t_max: float) -> float:
    """The learning rate at time `t` of a run that lasts until `t_max`, never negative.

    Past its end a schedule that falls to a final value stays there.
    """
    return _rate(cfg.schedule, cfg.lr, t, t_max)


def clip_norm(cfg: OptimConfig, t: float) -> float:
    """The norm that gradients are clipped to at time `t`; infinite without clipping."""
    if cfg.max_grad_norm is None:
        return math.inf
    # OLMo: the legacy trainer clips with the value of the step before, so its relaxed phase runs
    # one step late and leaves out step 1 (olmo/train.py). Here the phase is steps 1..clip_warmup.
    return cfg.max_grad_norm * (cfg.clip_warmup_factor if t <= cfg.clip_warmup else 1.0)


def batch_lr_scale(initial_batch: float, batch: float) -> float:
    """Factor of the learning rate when the batch is no longer the first one: √(batch / initial)."""
    return math.sqrt(batch / initial_batch)


def _rate(s: ScheduleConfig, peak: float, t: float, run: float) -> float:
    if s.final_decay_start is not None and t > s.final_decay_start:
        high = _rate(replace(s, final_decay_start=None), peak, s.final_decay_start, run)
        x = _progress(t, s.final_decay_start, s.final_decay_start + s.final_decay)
        return _line(high, s.final_decay_lr, x)
    total = s.t_max or run
    match s.name:
        case "constant":
            return peak
        case "exponential":
            return s.lr_min * (peak / s.lr_min) ** _progress(t, 0, total)
        case "composable":
            return _composable(s, peak, t)
        case "sequential":
            return _sequential(s, peak, t, run)
        case "wsds":
            return _wsds(s, peak, t)
    warmup = _warmup(s, total)
    after = _after_warmup(s, peak, max(t, warmup), warmup, total, run)
    # Warm-up leads to where the schedule begins; only that of half_cos is not the peak.
    return _line(s.warmup_min_lr, after, t / warmup) if t < warmup else after


def _after_warmup(
    s: ScheduleConfig, peak: float, t: float, warmup: float, total: float, run: float
) -> float:
    low, x = s.alpha_f * peak, _progress(t, warmup, total)
    match s.name:
        case "linear_with_warmup":
            return _line(peak, low, x)
        case "cos_with_warmup":
            return _cosine(peak, low, x)
        case "half_cos_with_warmup":
            return _cosine(peak, low, (1 + x) / 2)
        case "legacy_cos_linear":  # a cosine under a linear envelope
            return low + (1 - x) * (_cosine(peak, low, x) - low)
        case "inv_sqrt_with_warmup":
            return _line(low, peak, math.sqrt(warmup / t))
        case "legacy_inv_sqrt":
            return peak * math.sqrt(warmup / t)
    # The rest may end with a line down to decay_min_lr, from the value where that line begins.
    # OLMo: wsd, power_lr and the cut cosine turn negative past their end there; these stay.
    end = run if s.name == "cos_with_warmup_and_linear_decay" else total  # t_max is the cosine's
    start = end - _decay(s, end)
    match s.name:
        case "cos_with_warmup_and_linear_decay":
            high = _cosine(peak, low, _progress(min(t, start), warmup, total))
        case "power_lr":
            high = peak * (min(t, start) / warmup) ** s.power
        case "wsd":
            high = peak
        case _:  # constant_with_warmup
            return peak
    return _line(high, s.decay_min_lr, _progress(t, start, end))


def _composable(s: ScheduleConfig, peak: float, t: float) -> float:
    """Stages one after the other, each from the end of the one before; the last value stays."""
    value, start = s.warmup_min_lr, 0
    for stage in s.stages:
        end, goal = start + stage.duration, stage.end * peak
        if t < end:
            curve = _line if stage.shape == "linear" else _cosine
            return curve(value, goal, _progress(t, start, end))
        value, start = goal, end
    return value


def _sequential(s: ScheduleConfig, peak: float, t: float, run: float) -> float:
    """Whole schedules one after the other; the final rate of each is the peak of the next."""
    for i, stage in enumerate(s.stages):
        part = _stage(s, i)
        if i == len(s.stages) - 1:  # runs to the end, whatever its duration says
            return _rate(part, peak, t, run)
        if t <= stage.duration:
            return _rate(part, peak, t, min(run, stage.duration))
        peak = _rate(part, peak, stage.duration, stage.duration)
        t, run = t - stage.duration, run - stage.duration
    raise AssertionError("a sequential schedule has stages")


def _stage(s: ScheduleConfig, i: int) -> ScheduleConfig:
    """Stage `i` of a sequential schedule as a schedule of its own; only the first warms up."""
    stage = s.stages[i]
    part = replace(s, name=stage.shape, alpha_f=stage.alpha_f, t_max=None, final_decay_start=None)
    return replace(part, warmup=0, warmup_fraction=None) if i else part


def _wsds(s: ScheduleConfig, peak: float, t: float) -> float:
    """Periods that each hold their peak and end with a line, arXiv 2410.05192."""
    start = 0
    for i, length in enumerate(s.period_lengths):
        end = start + length
        if t <= end:
            top = peak * (s.period_peaks[i] if s.period_peaks else 1.0)
            warmup = 0 if i else _warmup(s, length)
            if t < warmup:
                return _line(s.warmup_min_lr, top, t / warmup)
            return _line(top, s.decay_min_lr, _progress(t, end - _decay(s, length), end))
        start = end
    return s.decay_min_lr


def _warmup(s: ScheduleConfig, length: float) -> float:
    return s.warmup if s.warmup_fraction is None else round(s.warmup_fraction * length)


def _decay(s: ScheduleConfig, length: float) -> float:
    """Units of the last, linear phase; a tenth where nothing is said."""
    if s.decay is not None:
        return s.decay
    return round((0.1 if s.decay_fraction is None else s.decay_fraction) * length)


def _progress(t: float, start: float, end: float) -> float:
    """The part of [start, end] that has passed at `t`, within [0, 1]."""
    if t >= end:
        return 1.0
    return max(t - start, 0.0) / (end - start)


def _line(a: float, b: float, x: float) -> float:
    return (1 - x) * a + x * b  # in this form exact at both ends and never below both


def _cosine(a: float, b: float, x: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2


# --- problems of a config -------------------------------------------------------------------------


def problems(cfg: OptimConfig, t_max: float) -> list[str]:
    """What is wrong with the optimizer's options for a run until `t_max`, one line each."""
    return [f"config.optim.{line}" for line in _optimizer(cfg) + _schedule(cfg, t_max)]


def _optimizer(cfg: OptimConfig) -> list[str]:
    found = []
    if cfg.clip_warmup > 0 and cfg.max_grad_norm is None:
        found.append(f"clip_warmup={cfg.clip_warmup}: max_grad_norm=none clips nothing")
    if cfg.name == "skip_step_adamw" and cfg.skip_window < 6:
        # The guard starts at half a window, and a standard deviation needs two earlier steps.
        found.append(f"skip_window={cfg.skip_window}: need at least 6 steps")
    return found


def _schedule(cfg: OptimConfig, t_max: float) -> list[str]:
    s = cfg.schedule
    found = _unused(s)
    for name in ("warmup", "decay"):
        units, fraction = getattr(s, name), getattr(s, f"{name}_fraction")
        if units and fraction is not None:
            found.append(f"{name}={units} and {name}_fraction={fraction}: set one of them")
        low = getattr(s, f"{name}_min_lr")
        if low > cfg.lr:
            found.append(f"{name}_min_lr={low}: need a number in [0, lr={cfg.lr}]")
    if (highest := _highest(cfg)) > LARGEST:
        found.append(f"name={s.name}: reaches a rate of {highest:.0e}; need at most {LARGEST}")
    if s.name == "exponential" and s.lr_min > cfg.lr:
        found.append(f"lr_min={s.lr_min}: need a number in (0, lr={cfg.lr}]")
    if not found:  # lengths below rest on the values above
        total = s.t_max or t_max
        if s.name == "wsds":
            found = _periods(s)
        elif s.name in STAGED:
            found = _stages(s, t_max)
        elif s.name not in UNWARMED:
            found = _lengths(s, _warmup(s, total), total, t_max)
    return [f"schedule.{line}" for line in found]


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
    decay = _decay(s, end)
    if decay < 1:
        return [f"decay={decay}: {s.name} needs at least 1; constant_with_warmup has none"]
    if warmup + decay > end:
        return [f"decay={decay}: with warmup={warmup} longer than the run, {end} {s.unit}"]
    return []


def _periods(s: ScheduleConfig) -> list[str]:
    if not s.period_lengths:
        return ["period_lengths=(): wsds needs the length of every period"]
    found = []
    if s.period_peaks and len(s.period_peaks) != len(s.period_lengths):
        found.append(f"period_peaks={s.period_peaks}: need {len(s.period_lengths)} or none")
    for i, length in enumerate(s.period_lengths):
        warmup, decay = 0 if i else _warmup(s, length), _decay(s, length)
        if decay < 1 or warmup + decay > length:
            found.append(
                f"period_lengths[{i}]={length}: need 1 to {length} {s.unit} for warmup={warmup}"
                f" and decay={decay} together"
            )
    return found


def _stages(s: ScheduleConfig, run: float) -> list[str]:
    if not s.stages:
        return [f"stages: {s.name} needs at least one"]
    shapes = SEQUENCE if s.name == "sequential" else ("linear", "cosine")
    found, start = [], 0
    for i, stage in enumerate(s.stages):
        at, is_last = f"stages[{i}]", i == len(s.stages) - 1
        if stage.shape not in shapes:
            found.append(f"{at}.shape={brief(stage.shape)}: need one of {', '.join(shapes)}")
        if s.name == "sequential" and not found:
            if not is_last and not 1 <= stage.duration < run - start:
                found.append(
                    f"{at}.duration={stage.duration}: need 1 to {run - start - 1} {s.unit}, for"
                    f" the next stage to begin before the end of the run, {run}"
                )
            part, length = _stage(s, i), run - start if is_last else stage.duration
            found += [f"{at}: {x}" for x in _lengths(part, _warmup(part, length), length, length)]
        start += stage.duration
    if s.final_decay_start is not None and s.final_decay < 1:
        found.append(
            f"final_decay={s.final_decay} from final_decay_start={s.final_decay_start}: need at"
            " least 1"
        )
    return found
