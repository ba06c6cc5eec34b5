"""Options of training: optimizer, schedule, length, evaluations, checkpoints and records."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from olmo_jax.config.data import Row
from olmo_jax.config.options import (
    LARGEST,
    Bears,
    Count,
    File,
    Folder,
    Natural,
    NonNegative,
    Pairs,
    Positive,
    Range,
    RunName,
    Seed,
    Share,
    SomeUnits,
    Units,
)
from olmo_jax.files import brief

Span = tuple[Count, Count]  # [start, stop) of steps
Beta = Annotated[float, Range(0.0, 0.9999999)]  # what is above is 1 in fp32
Unit = Literal["steps", "tokens", "epochs"]

DECAYING = ("wsd", "power_lr", "cos_with_warmup_and_linear_decay")  # end with a line of `decay`
STAGED = ("composable", "sequential")
UNWARMED = ("constant", "composable", "exponential")  # read no warmup
NEED_WARMUP = ("power_lr", "inv_sqrt_with_warmup", "legacy_inv_sqrt")  # divide by it
SEQUENCE = (
    "constant", "constant_with_warmup", "wsd", "power_lr", "linear_with_warmup",
    "inv_sqrt_with_warmup", "cos_with_warmup", "half_cos_with_warmup",
    "cos_with_warmup_and_linear_decay", "legacy_inv_sqrt", "legacy_cos_linear",
)  # fmt: skip  # may be stages of a sequential schedule


@dataclass(frozen=True)
class StageConfig:
    """One stage of a composable or sequential schedule."""

    duration: Units = 0  # in the schedule's unit; the last stage of a sequential one runs on
    shape: str = "linear"  # linear | cosine, or a schedule's name in a sequential schedule
    end: NonNegative = 1.0  # fraction of the peak LR at the stage's end
    alpha_f: NonNegative = 0.1  # of a schedule in a sequential one


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run; names and formulas are OLMo-core's."""

    name: Literal[
        "constant", "constant_with_warmup", "wsd", "power_lr", "linear_with_warmup",
        "inv_sqrt_with_warmup", "cos_with_warmup", "half_cos_with_warmup",
        "cos_with_warmup_and_linear_decay", "composable", "sequential", "wsds", "exponential",
        "legacy_inv_sqrt", "legacy_cos_linear",
    ] = "cos_with_warmup"  # fmt: skip
    unit: Literal["steps", "tokens"] = "steps"
    warmup: Units = 0  # units; of the first stage of sequential, within the first period of wsds
    warmup_fraction: Share | None = None  # of t_max (wsds: of the period), instead of warmup
    warmup_min_lr: NonNegative = 0.0  # where warm-up starts
    # Units; None: the run's duration. cos_with_warmup_and_linear_decay: of the cosine, which the
    # last phase cuts short at the end of the run.
    t_max: SomeUnits | None = None
    alpha_f: NonNegative = 0.1  # final LR as a fraction of the peak
    decay: SomeUnits | None = None  # units of the last, linear phase
    decay_fraction: Share | None = None  # of t_max (wsds: of each period); without both 0.1
    decay_min_lr: NonNegative = 0.0
    power: Annotated[float, Range(-100.0, 0.0)] = -0.51  # exponent of power_lr
    lr_min: Positive = 1e-9  # start of exponential
    period_lengths: tuple[SomeUnits, ...] = ()  # of wsds, units
    period_peaks: tuple[Positive, ...] = ()  # multipliers of the peak, one per period; (): all 1
    stages: tuple[StageConfig, ...] = ()  # of composable and sequential
    final_decay_start: Units | None = None  # composable, sequential: decay from here on, units
    final_decay: Units = 0  # for so many units
    final_decay_lr: NonNegative = 0.0  # down to this


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its groups, its guard and its schedule."""

    # adamw or skip_step_adamw; muon, lion, sgd, adafactor or another optimizer of Optax.
    name: Annotated[str, Bears.STATE | Bears.PROGRAM] = "skip_step_adamw"
    # Arguments of an optimizer of Optax, by its names.
    options: Annotated[Pairs, Bears.STATE | Bears.PROGRAM] = field(default_factory=Pairs)
    lr: Annotated[NonNegative, Bears.NOTHING] = 3e-4  # peak
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    no_decay: tuple[str, ...] = ("embed",)  # globs over parameter paths; each must match
    max_grad_norm: Positive | None = 1.0
    # Schedule units during which max_grad_norm is ....
    clip_warmup: Annotated[Units, Bears.NOTHING] = 0
    clip_warmup_factor: Annotated[Positive, Bears.NOTHING] = 1.0  # ... times this
    # Steps of history that skip_step_adamw compares with.
    skip_window: Annotated[int, Range(1, 1_000_000), Bears.STATE | Bears.PROGRAM] = 128
    skip_sigma: Positive = 6.0  # standard deviations above the mean that are still taken
    freeze_adam_step: bool = False  # the OLMo-core bug that OLMo 2 32B trained with
    schedule: Annotated[ScheduleConfig, Bears.NOTHING] = field(default_factory=ScheduleConfig)


@dataclass(frozen=True)
class TrainConfig:
    """How long, and which loss."""

    seed: Seed = 0  # of the initial parameters
    duration: SomeUnits = 1000
    duration_unit: Unit = "steps"
    hard_stop: SomeUnits | None = None  # end here, without changing the schedule
    hard_stop_unit: Unit = "steps"
    skip_steps: tuple[Span, ...] = ()  # [start, stop) steps whose batch is not trained
    # Coefficient of mean logsumexp(logits)²; None: none.
    z_loss: Annotated[Positive | None, Bears.PROGRAM] = None
    # Coefficient of the experts' loss; None: none.
    load_balancing_loss: Annotated[Positive | None, Bears.PROGRAM] = None
    # Coefficient of mean logsumexp(router logits)².
    router_z_loss: Annotated[Positive | None, Bears.PROGRAM] = None
    router_loss_form: Annotated[
        Literal["olmoe", "megablocks", "olmo_core", "hugging_face"], Bears.PROGRAM
    ] = "olmoe"
    loss_normalization: Annotated[
        Literal["global_tokens", "per_rank_tokens", "per_instance", "legacy_positions"],
        Bears.PROGRAM,
    ] = "global_tokens"
    # Ranks of per_rank_tokens; None: data-parallel ways.
    loss_ranks: Annotated[Count | None, Bears.PROGRAM] = None
    max_nonfinite_steps: Count = 8  # steps in a row without a finite loss that end the run
    step_timeout_s: Count = 1800  # a step that takes longer ends the run
    summary: bool = False  # draw curves, compare with gzip and xz, continue a text at the end


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    paths: tuple[File, ...] = ()  # token files; the label in the metrics is the file's stem
    interval: Count | None = None  # steps
    at_start: bool = False
    at_finish: bool = True
    seq_len: Row | None = None  # None: data.seq_len
    stride: Count | None = None  # tokens scored per row, the rest is context; None: all
    batch_rows: Count = 16
    max_rows: Count | None = None  # for evaluations before the last one


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved when, and where a run starts from."""

    interval: Count = 1000  # steps between permanent checkpoints
    ephemeral_interval: Count | None = None  # steps; only the newest of these is kept
    fixed_steps: tuple[Natural, ...] = ()  # saved too, and never deleted
    step0: bool = True  # save before the first step
    keep: Count | None = None  # permanent ones kept besides fixed and newest confirmed; None: all
    async_save: bool = True  # write behind the training, from a copy in the host's memory
    load_path: Folder | None = None  # a checkpoint, or a run's folder, to start from
    load_optimizer: bool = True  # of load_path
    load_position: bool = False  # step, tokens and place in the data of load_path
    allow_changes: tuple[str, ...] = ()  # config keys that may differ from the checkpoint's


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    interval: Count = 10  # steps between console lines
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: RunName = "olmo_jax"
    norms_interval: Count | None = None  # steps between per-layer norms
    device_peak_flops: Positive | None = None  # FLOP/s for MFU; None: from the chip's name


@dataclass(frozen=True)
class ProfileConfig:
    """What is traced, for XProf."""

    steps: Span | None = None  # [start, stop): [10, 13] is 10, 11, 12; from 1


# --- the parts of a schedule ----------------------------------------------------------------------


def warmup_length(s: ScheduleConfig, length: float) -> float:
    """Units of the warmup of a schedule that is so long."""
    return s.warmup if s.warmup_fraction is None else round(s.warmup_fraction * length)


def decay_length(s: ScheduleConfig, length: float) -> float:
    """Units of the last, linear phase; a tenth where nothing is said."""
    if s.decay is not None:
        return s.decay
    return round((0.1 if s.decay_fraction is None else s.decay_fraction) * length)


def stage_of(s: ScheduleConfig, i: int) -> ScheduleConfig:
    """Stage `i` of a sequential schedule as a schedule of its own; only the first warms up."""
    stage = s.stages[i]
    part = replace(s, name=stage.shape, alpha_f=stage.alpha_f, t_max=None, final_decay_start=None)
    return replace(part, warmup=0, warmup_fraction=None) if i else part


# --- what is wrong with an optimizer --------------------------------------------------------------


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
            found = _lengths(s, warmup_length(s, total), total, t_max)
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
    decay = decay_length(s, end)
    if decay < 1:
        return [f"decay={decay}: {s.name} needs at least 1; constant_with_warmup has none"]
    if warmup + decay > end:
        return [f"decay={decay}: with warmup={warmup} longer than the run, {end} {s.unit}"]
    return []


def _periods(s: ScheduleConfig) -> list[str]:
    if not s.period_lengths:
        return ["period_lengths=(): wsds needs the length of every period"]
    found: list[str] = []
    if s.period_peaks and len(s.period_peaks) != len(s.period_lengths):
        found.append(f"period_peaks={s.period_peaks}: need {len(s.period_lengths)} or none")
    for i, length in enumerate(s.period_lengths):
        warmup, decay = 0 if i else warmup_length(s, length), decay_length(s, length)
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
    found: list[str] = []
    start = 0
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
            part, length = stage_of(s, i), run - start if is_last else stage.duration
            found += [
                f"{at}: {x}" for x in _lengths(part, warmup_length(part, length), length, length)
            ]
        start += stage.duration
    if s.final_decay_start is not None and s.final_decay < 1:
        found.append(
            f"final_decay={s.final_decay} from final_decay_start={s.final_decay_start}: need at"
            " least 1"
        )
    return found
