"""Learning rate and clipping norm of each step: host-side float64 functions of the config.

Time `t` counts in the schedule's unit: the number of the step (the first is 1), or the tokens seen
with the current batch. Nothing of it is state: a resumed run follows the config that it is given.
Source: OLMo-core, `src/olmo_core/optim/scheduler.py`; legacy_*: OLMo, `olmo/optim.py`.
"""

import math
from dataclasses import replace

from olmo_jax.config.training import (
    OptimConfig,
    ScheduleConfig,
    decay_length,
    stage_of,
    warmup_length,
)


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
    warmup = warmup_length(s, total)
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
    start = end - decay_length(s, end)
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
        part = stage_of(s, i)
        if i == len(s.stages) - 1:  # runs to the end, whatever its duration says
            return _rate(part, peak, t, run)
        if t <= stage.duration:
            return _rate(part, peak, t, min(run, stage.duration))
        peak = _rate(part, peak, stage.duration, stage.duration)
        t, run = t - stage.duration, run - stage.duration
    raise AssertionError("a sequential schedule has stages")


def _wsds(s: ScheduleConfig, peak: float, t: float) -> float:
    """Periods that each hold their peak and end with a line, arXiv 2410.05192."""
    start = 0
    for i, length in enumerate(s.period_lengths):
        end = start + length
        if t <= end:
            top = peak * (s.period_peaks[i] if s.period_peaks else 1.0)
            warmup = 0 if i else warmup_length(s, length)
            if t < warmup:
                return _line(s.warmup_min_lr, top, t / warmup)
            return _line(top, s.decay_min_lr, _progress(t, end - decay_length(s, length), end))
        start = end
    return s.decay_min_lr


def _progress(t: float, start: float, end: float) -> float:
    """The part of [start, end] that has passed at `t`, within [0, 1]."""
    if t >= end:
        return 1.0
    return max(t - start, 0.0) / (end - start)


def _line(a: float, b: float, x: float) -> float:
    return (1 - x) * a + x * b  # in this form exact at both ends and never below both


def _cosine(a: float, b: float, x: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2
