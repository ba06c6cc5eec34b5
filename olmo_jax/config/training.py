"""Options of training: optimizer, schedule, length, evaluations, checkpoints and records."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from olmo_jax.config.options import (
    Bears,
    Checkpoint,
    Count,
    File,
    Natural,
    NonNegative,
    Pairs,
    Positive,
    Range,
    RowLength,
    RunName,
    Seed,
    Share,
    SomeUnits,
    Units,
)

Span = tuple[Count, Count]  # [start, stop) of steps
Beta = Annotated[float, Range(0.0, 0.9999999)]  # what is above is 1 in fp32
Unit = Literal["steps", "tokens", "epochs"]


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
    seq_len: RowLength | None = None  # None: data.seq_len
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
    # To start from: a run's folder or a checkpoint, of Hugging Face (also its id on the Hub), OLMo,
    # OLMo-core and Orbax too.
    load_path: Checkpoint | None = None
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
