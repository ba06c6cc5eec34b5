"""Every option of a run, as frozen dataclasses, and the bridge from `--config` files to them.

A config file builds a `ConfigDict` (easy to edit); a run reads dataclasses (typed, frozen). All
problems of a config are reported together, one line each, by the name of the field.
"""

import dataclasses
import math
import os
import re
import runpy
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from olmo_jax import options
from olmo_jax.options import (
    INT32,
    LARGEST,
    Count,
    File,
    Folder,
    Natural,
    NonNegative,
    Path,
    Positive,
    Range,
    RunName,
    Seed,
    Share,
    SomeUnits,
    Units,
)

Row = Annotated[int, Range(2, INT32)]  # tokens; the first has nothing that predicts it
Span = tuple[Count, Count]  # [start, stop) of steps
Beta = Annotated[float, Range(0.0, 0.9999999)]  # what is above is 1 in fp32
Unit = Literal["steps", "tokens", "epochs"]


class ConfigError(ValueError):
    """A config that cannot run; `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: list[str], rest: "Config | None" = None):
        super().__init__("\n".join(problems))
        self.problems = problems
        self.rest = rest  # the config with defaults for what could not be read

    @property
    def options(self) -> set[str]:
        """Names of the options that the lines are about, or that may have been meant."""
        pairs = re.findall(r"(\w+)(?:\[\d+\])*: |did you mean (\w+)\?", "\n".join(self.problems))
        return {name for pair in pairs for name in pair if name}


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. Two runs with equal values here compute the same function."""

    vocab_size: Count = 100_352  # rows of the softmax
    padded_vocab_size: Count | None = None  # rows stored, for sharding; the extra ones never score
    d_model: Count = 2048
    n_layers: Annotated[int, Range(1, 100_000)] = 16
    n_heads: Count = 16
    n_kv_heads: Count = 16
    head_dim: Count = 128
    d_ff: Count = 8192  # of each expert where there are any
    n_experts: Natural = 0  # a mixture of experts in the place of the MLP; 0: the MLP
    n_experts_per_token: Count = 8
    normalize_expert_weights: bool = False  # the weights of a token's experts sum to 1
    # Each token takes its best experts, or each expert the best tokens of every sequence, as many
    # on average; that looks ahead, so that such a model cannot generate text as it was trained.
    router: Literal["token_choice", "expert_choice"] = "token_choice"
    # Balance without a loss: after each step a bias, used for the choice alone, moves by this
    # towards experts with fewer tokens than the mean; OLMo-core's bias_gamma. None: no bias.
    router_bias_gamma: Positive | None = None
    max_seq_len: Count = 4096  # longest sequence that the model is meant for, tokens
    norm: Literal["rms", "nonparametric"] = "rms"
    norm_position: Literal["before", "after"] = "after"  # of the sub-layer: OLMo 1 / OLMo 2
    norm_eps: Positive = 1e-6
    qk_norm: Literal["none", "full"] = "full"  # full: over all heads together
    clip_qkv: Positive | None = None  # q, k and v are clamped to ± this
    tie_embeddings: bool = False
    layer_types: tuple[Literal["full", "sliding"], ...] = ("full",)  # a shorter list repeats
    window: Count | None = None  # positions that a sliding layer sees, the own one included
    rope_theta: Annotated[float, Range(2.0, LARGEST)] = 500_000.0
    yarn_factor: Annotated[float, Range(1.0, LARGEST)] | None = (
        None  # YaRN on the full layers (never on sliding ones)
    )
    yarn_original_len: Count = 8192  # tokens
    yarn_beta_fast: Positive = 32.0
    yarn_beta_slow: Positive = 1.0
    yarn_attention_factor: Positive | None = None  # None: 0.1 ln(yarn_factor) + 1
    init: Literal["normal", "mitchell"] = "normal"
    init_std: Positive = 0.02  # of every matrix (normal), truncated at three of it
    embed_init_std: NonNegative | None = None  # None: as init says
    head_init_std: NonNegative | None = None  # None: as init says
    post_norm_init: NonNegative = 1.0  # gain of the norms on the sub-layers' outputs

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer, `n_layers` of them."""
        return self.layer_types * (self.n_layers // len(self.layer_types))

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table and columns of the head."""
        return self.padded_vocab_size or self.vocab_size


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cos and sin with where `yarn_attention_factor` says nothing."""
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True)
class ComputeConfig:
    """How the function is computed: speed and memory, never what the model is."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; float32 on a CPU always
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # weight gradients and their reduction
    remat: Literal["none", "attention", "qkv", "qkv_mlp", "full", "offload"] = "full"
    # auto: our kernels on a TPU, cuDNN on an NVIDIA GPU where it can (no documents, bfloat16), else
    # blocked, which can all. pallas on a Hopper GPU has not run there yet. A named one that cannot
    # do the model, the mask or the device says why.
    attention: Literal["auto", "pallas", "cudnn", "blocked", "reference"] = "auto"
    loss_chunk: Count | None = 1024  # tokens whose logits are held at once; None: all
    accumulate: Count = 1  # micro-batches per step
    # Rows that the experts of a device can take over mesh.expert, in terms of the balanced load;
    # what needs more ends the run. None: so many that no routing can need more.
    expert_buffer: Annotated[float, Range(1.0, LARGEST)] | None = None
    deterministic: bool = False  # GPU: bit-exact resume, at some speed
    compilation_cache: str | None = "~/.cache/olmo_jax/xla"  # None: compile anew in each process
    # NAME=VALUE, over what `xla_flags.py` has for the chip; NAME=none takes a flag away.
    xla_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """Which tokens, in which order."""

    paths: tuple[File, ...] = ()  # token files or globs; their order is part of the data order
    root: Annotated[str, Path(may_be_empty=True)] = ""  # put before every relative path
    corpus: Literal["stdlib"] | None = None  # prepare this embedded corpus instead of `paths`
    corpus_vocab_size: Annotated[int, Range(257, INT32)] = 4096
    corpus_dir: File = "data"  # where prepared corpora are kept
    dtype: Literal["uint8", "uint16", "uint32"] | None = None  # None: smallest for vocab_size
    check_dtype: bool = True  # refuse files that look like another type, though all ids are valid
    tokenizer: File | None = None  # tokenizer.json or sentencepiece .model that made the tokens
    eos_id: Natural | None = None  # where documents end; a checkpoint's own special tokens stay
    seq_len: Row = 4096  # tokens per row
    global_batch_size: Count = 4_194_304  # tokens per step
    batch_sizes: tuple[Count, ...] = ()  # a schedule of global batch sizes, tokens ...
    batch_starts: tuple[Units, ...] = ()  # ... and the tokens seen at which each begins, first 0
    order: Literal["core", "legacy"] = "core"  # OLMo-core (epochs from 1), OLMo (from 0)
    seed: Seed = 34521  # of the order
    source_permutation_seed: Seed | None = None  # shuffle the list of paths first
    max_target_seq_len: SomeUnits | None = None  # shuffle in chunks of this many tokens
    document_mask: Literal["none", "eos", "boundaries"] = "none"  # attend within documents only
    instance_filter: bool = False  # no loss on rows that repeat an n-gram ...
    filter_max_period: Annotated[int, Range(1, 1_000_000)] = 13  # ... of at most so many tokens ...
    filter_min_repeats: Count = 32  # ... at least so often
    threads: Annotated[int, Range(1, 1024)] = 4  # that read rows
    prefetch: Annotated[int, Range(1, 65_536)] = 4  # batches made ahead


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
    """AdamW, its groups, its guard and its schedule."""

    name: Literal["adamw", "skip_step_adamw"] = "skip_step_adamw"
    lr: NonNegative = 3e-4  # peak
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    no_decay: tuple[str, ...] = ("embed",)  # globs over parameter paths; each must match
    max_grad_norm: Positive | None = 1.0
    clip_warmup: Units = 0  # schedule units during which max_grad_norm is ...
    clip_warmup_factor: Positive = 1.0  # ... times this
    # Steps of history that skip_step_adamw compares with.
    skip_window: Annotated[int, Range(1, 1_000_000)] = 128
    skip_sigma: Positive = 6.0  # standard deviations above the mean that are still taken
    freeze_adam_step: bool = False  # the OLMo-core bug that OLMo 2 32B trained with
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1, which takes the rest."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1  # parts of each sequence, whose keys go around in a ring
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """How long, and which loss."""

    seed: Seed = 0  # of the initial parameters
    duration: SomeUnits = 1000
    duration_unit: Unit = "steps"
    hard_stop: SomeUnits | None = None  # end here, without changing the schedule
    hard_stop_unit: Unit = "steps"
    skip_steps: tuple[Span, ...] = ()  # [start, stop) steps whose batch is not trained
    z_loss: Positive | None = None  # coefficient of mean logsumexp(logits)²; None: none
    load_balancing_loss: Positive | None = None  # coefficient of the experts' loss; None: none
    router_z_loss: Positive | None = None  # coefficient of mean logsumexp(router logits)²
    router_loss_form: Literal["olmoe", "megablocks", "olmo_core", "hugging_face"] = "olmoe"
    loss_normalization: Literal[
        "global_tokens", "per_rank_tokens", "per_instance", "legacy_positions"
    ] = "global_tokens"
    loss_ranks: Count | None = None  # ranks of per_rank_tokens; None: data-parallel ways
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


@dataclass(frozen=True)
class Config:
    """A run."""

    name: RunName = "run"
    dir: Folder | None = None  # of checkpoints and logs; None: runs/{name}
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def run_dir(self) -> str:
        """The folder of checkpoints and logs."""
        return self.dir or f"runs/{self.name}"


# --- ConfigDict <-> dataclasses -------------------------------------------------------------------


def default() -> ConfigDict:
    """All options at their defaults, for a config file to edit."""
    return ConfigDict(to_dict(Config()), type_safe=False, convert_dict=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts, lists and scalars, ready for JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted path, such as `model.rope_theta`, from the dicts of `to_dict`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(typing.cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in _items(value)] if isinstance(value, (tuple, list)) else value


def _items(value: Any) -> Sequence[Any]:
    return value


def from_dict(values: Any, cls: Any = Config, name: str = "config") -> Any:
    """Typed config (or the part of it that `cls` is) from nested mappings.

    Raises:
      ConfigError: with every unknown key and wrong type, one line each.
    """
    problems: list[str] = []
    config = options.build(cls, values, name, problems)
    if problems:
        raise ConfigError(problems, config if cls is Config else None)
    return config


# --- the command line -----------------------------------------------------------------------------


def load(path: str, overrides: dict[str, str] | None = None) -> Config:
    """The config of a file, with dotted overrides, typed but not yet validated.

    Args:
      path: a Python file with `get_config() -> ConfigDict`.
      overrides: {"model.d_model": "512"}: values as written on the command line.
    Raises:
      ConfigError: with every problem at once.
    """
    try:
        path = options.expand(path)
    except ValueError as error:
        raise ConfigError([f"--config={error}"]) from error
    if not os.path.isfile(path):
        raise ConfigError([f"--config={options.brief(path)}: no such file"])
    try:
        values = runpy.run_path(path)["get_config"]()
        if hasattr(values, "items"):
            _refuse_odd_keys(values)
            values = typing.cast(Any, ConfigDict(values))  # a frozen one cannot be changed
            for key, text in (overrides or {}).items():
                _set(values, key.split("."), text)
            values = values.to_dict()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file does, sys.exit() too: it is the user's
        raise ConfigError([f"--config={path}: {_cause(error, path)}"]) from error
    return from_dict(values)


def _cause(error: BaseException, path: str) -> str:
    """What is wrong in a config file, and in which line, on one line."""
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "the file defines no get_config()"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _refuse_odd_keys(values: Any) -> None:
    try:
        are_text = all(isinstance(key, str) for key in values)
    except TypeError:  # a ConfigDict sorts its keys
        are_text = False
    if not are_text:
        raise TypeError("a key of the options is no text")
    for value in values.values():
        if isinstance(value, (dict, ConfigDict)):
            _refuse_odd_keys(value)


def _set(values: Any, keys: list[str], text: str) -> None:
    """Set a dotted key, making the groups on the way so that `from_dict` can name a wrong one."""
    hint: Any = Config
    for i, key in enumerate(keys):
        hint = options.hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
        if i < len(keys) - 1:
            if not isinstance(values.get(key), ConfigDict):
                values[key] = ConfigDict()
            values = values[key]
    values[keys[-1]] = options.read(hint, text)
