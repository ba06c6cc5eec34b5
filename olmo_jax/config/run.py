"""A whole run: its config, from a `--config` file, and the relations between its options.

A config file builds a `ConfigDict` (easy to edit); a run reads dataclasses (typed, frozen). All
problems of a config are reported together, one line each, by the name of the field.
"""

import dataclasses
import fnmatch
import math
import os
import re
import runpy
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from olmo_jax import files
from olmo_jax.config import costs, options, parameters, typed
from olmo_jax.config.data import KINDS, DataConfig, FixedLength, batch_stages
from olmo_jax.config.model import (
    ComputeConfig,
    MeshConfig,
    ModelConfig,
    divisors,
    mesh_shape,
    model_problems,
)
from olmo_jax.config.options import (
    INT32,
    INT64,
    Bears,
    ConfigError,
    Folder,
    RunName,
    shown,
)
from olmo_jax.config.schedule_problems import optimizer_problems
from olmo_jax.config.text import assign, cause, refuse_odd_keys, to_dict
from olmo_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)
from olmo_jax.files import brief


@dataclass(frozen=True)
class Config:
    """A run."""

    name: RunName = "run"
    dir: Folder | None = None  # of checkpoints and logs; None: runs/{name}
    model: Annotated[ModelConfig, Bears.FUNCTION | Bears.PROGRAM] = field(
        default_factory=ModelConfig
    )
    compute: Annotated[ComputeConfig, Bears.PROGRAM] = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=FixedLength)
    optim: Annotated[OptimConfig, Bears.PROGRAM] = field(default_factory=OptimConfig)
    mesh: Annotated[MeshConfig, Bears.PROGRAM] = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: Annotated[LogConfig, Bears.RECORDS] = field(default_factory=LogConfig)
    profile: Annotated[ProfileConfig, Bears.RECORDS] = field(default_factory=ProfileConfig)

    @property
    def run_dir(self) -> str:
        """The folder of checkpoints and logs."""
        return self.dir or f"runs/{self.name}"

    def changed(self, part: str, **options: Any) -> "Config":
        """The config with other options in one of its parts."""
        new = dataclasses.replace(getattr(self, part), **options)
        return dataclasses.replace(self, **{part: new})


# --- ConfigDict <-> dataclasses -------------------------------------------------------------------


def default() -> ConfigDict:
    """All options at their defaults, for a config file to edit; of the data those of all kinds."""
    values = to_dict(Config())
    for kind in KINDS.values():
        values["data"] = to_dict(kind()) | values["data"]
    return ConfigDict(values, type_safe=False, convert_dict=True)


def from_dict(values: Any, cls: Any = Config, name: str = "config") -> Any:
    """Typed config (or the part of it that `cls` is) from nested mappings.

    Raises:
      ConfigError: with every unknown key and wrong type, one line each.
    """
    problems: list[str] = []
    config = typed.build(cls, values, name, problems)
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
        path = files.expand(path)
    except ValueError as error:
        raise ConfigError([f"--config={error}"]) from error
    if not os.path.isfile(path):
        raise ConfigError([f"--config={files.brief(path)}: no such file"])
    try:
        values = runpy.run_path(path)["get_config"]()
        if hasattr(values, "items"):
            refuse_odd_keys(values)
            values = typing.cast(Any, ConfigDict(values))  # a frozen one cannot be changed
            for key, text in (overrides or {}).items():
                assign(Config, values, key.split("."), text)
            values = values.to_dict()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file does, sys.exit() too: it is the user's
        raise ConfigError([f"--config={path}: {cause(error, path)}"]) from error
    return from_dict(values)


# --- relations between options --------------------------------------------------------------------


def validate(config: Config, n_devices: int, unread: Iterable[str] = ()) -> None:
    """Check the relations between options, for a run on `n_devices`.

    Args:
      config: of the run.
      n_devices: devices of all processes together.
      unread: names of options whose values are not known; what depends on them is not checked.
    Raises:
      ConfigError: with every problem at once, one line each.
    """
    config, lines = typed.checked(config, "config")
    # What they are about is at its default now; the relations of that would mean nothing.
    unread = {name.split(".")[-1] for name in lines} | set(unread)
    problems = list(lines.values())
    model, data, train = config.model, config.data, config.train
    relations = model_problems(model) + _size(model) + _data(data, model) + _eval(config.eval, data)
    relations += _optim(config.optim, train, model, data) + _lengths(train, data)
    relations += _experts(train, model, {"data": data.seq_len, "eval": config.eval.seq_len})
    relations += _checkpoint(config.checkpoint) + _compute(config.compute)
    relations += _spans(train.skip_steps, config.profile.steps)
    try:
        shape = mesh_shape(config.mesh, n_devices)
        relations += _mesh(shape, model, {"data": data.seq_len, "eval": config.eval.seq_len})
        relations += _rows(shape, data, config.compute.accumulate, train.loss_ranks)
    except ConfigError as error:
        relations += error.problems
    problems += [line for line in relations if not unread & set(re.findall(r"\w+", line))]
    if problems:
        raise ConfigError(problems)


def planned_devices(mesh: MeshConfig) -> int:
    """The fewest devices that the mesh can cover."""
    return math.prod(n for n in dataclasses.asdict(mesh).values() if n > 0)


def _size(m: ModelConfig) -> list[str]:
    if 12 * (n := costs.n_params(m).total) <= INT64:  # bytes of the state
        return []
    return [
        f"config.model: d_model={m.d_model}, d_ff={m.d_ff}, n_layers={m.n_layers} and the other"
        f" sizes make {n:.1e} parameters; need at most {INT64 // 12:.1e}"
    ]


def _data(d: DataConfig, m: ModelConfig) -> list[str]:
    problems: list[str] = []
    rising = list(d.batch_starts) == sorted(set(d.batch_starts)) and d.batch_starts[:1] in (
        (),
        (0,),
    )
    if len(d.batch_sizes) != len(d.batch_starts) or not rising:
        problems.append(
            "config.data.batch_starts: need one start per batch size, rising, the first 0;"
            f" found {shown(d.batch_starts)} for {shown(d.batch_sizes)}"
        )
    else:
        problems += [
            f"config.data.global_batch_size={size} tokens is no multiple of seq_len={d.seq_len}"
            for _, size in batch_stages(d)
            if size % d.seq_len
        ]
    if d.seq_len > m.max_seq_len:
        problems.append(
            f"config.data.seq_len={d.seq_len} is above model.max_seq_len={m.max_seq_len}"
        )
    if isinstance(d, FixedLength):
        problems += _fixed_length(d)
    if d.document_mask == "eos" and d.eos_id is None and d.corpus is None:
        problems.append("config.data.eos_id: document_mask='eos' needs it")
    if d.eos_id is not None and not 0 <= d.eos_id < m.vocab_size:
        problems.append(f"config.data.eos_id={d.eos_id} is outside model.vocab_size={m.vocab_size}")
    if d.instance_filter and d.filter_max_period > d.seq_len:
        problems.append(
            f"config.data.filter_max_period={d.filter_max_period} is above seq_len={d.seq_len}: no"
            " row repeats so long an n-gram"
        )
    if not d.paths and d.corpus is None:
        problems.append("config.data.paths: no token files; name some, or set data.corpus=stdlib")
    return problems


def _fixed_length(d: FixedLength) -> list[str]:
    problems: list[str] = []
    if d.max_target_seq_len is not None and d.max_target_seq_len % d.seq_len:
        problems.append(
            f"config.data.max_target_seq_len={d.max_target_seq_len} is no multiple of"
            f" seq_len={d.seq_len}"
        )
    if d.max_target_seq_len is not None and d.order == "legacy":
        problems.append("config.data.max_target_seq_len: only order='core' shuffles in chunks")
    return problems


def _eval(e: EvalConfig, d: DataConfig) -> list[str]:
    problems: list[str] = []
    if e.batch_rows * (e.seq_len or d.seq_len) > INT32:
        problems.append(
            f"config.eval.batch_rows={e.batch_rows} rows of seq_len="
            f"{e.seq_len or d.seq_len} are more than {INT32} tokens, the most of a batch"
        )
    if e.stride is not None and e.stride > (e.seq_len or d.seq_len):
        problems.append(
            f"config.eval.stride={e.stride} is above"
            f" {'eval' if e.seq_len else 'data'}.seq_len={e.seq_len or d.seq_len}"
        )
    return problems


def _optim(o: OptimConfig, t: TrainConfig, m: ModelConfig, d: DataConfig) -> list[str]:
    names = list(parameters.table(m))
    problems = [
        f"config.optim.no_decay: {shown(glob)} matches no parameter; there are {', '.join(names)}"
        for glob in o.no_decay
        if not fnmatch.filter(names, glob)
    ]
    t_max = _schedule_end(o.schedule, t, d)
    return problems + (optimizer_problems(o, t_max) if t_max is not None else [])


def _schedule_end(s: ScheduleConfig, t: TrainConfig, d: DataConfig) -> int | None:
    """The end of the run in the schedule's unit; None where only the data tell."""
    if s.t_max is not None or s.unit == t.duration_unit:
        return s.t_max or t.duration
    if t.duration_unit == "epochs" or d.batch_sizes:
        return None
    size = d.global_batch_size
    return -(-t.duration // size) if s.unit == "steps" else t.duration * size


def _experts(t: TrainConfig, m: ModelConfig, lengths: dict[str, int | None]) -> list[str]:
    problems = [
        f"config.train.{name}: only a model with model.n_experts has it"
        for name in ("load_balancing_loss", "router_z_loss")
        if getattr(t, name) is not None and not m.n_experts
    ]
    return problems + [
        f"config.{part}.seq_len={n}: model.router=expert_choice leaves the {m.n_experts} experts no"
        f" token of such a row; use {-(-m.n_experts // m.n_experts_per_token)} or more"
        for part, n in lengths.items()
        if n is not None and m.router == "expert_choice" and m.n_experts_per_token * n < m.n_experts
    ]


def _checkpoint(k: CheckpointConfig) -> list[str]:
    known = options.bearing(Config, options.Bears.NOTHING) if k.allow_changes else frozenset[str]()
    unknown = sorted(set(k.allow_changes) - known)
    problems = [f"config.checkpoint.allow_changes: no option {brief(name)}" for name in unknown]
    if k.ephemeral_interval is not None and k.ephemeral_interval >= k.interval:
        problems.append(
            f"config.checkpoint.ephemeral_interval={k.ephemeral_interval} must be below"
            f" interval={k.interval}"
        )
    return problems


def _spans(skipped: tuple[tuple[int, int], ...], traced: tuple[int, int] | None) -> list[str]:
    spans = [("train.skip_steps", span) for span in skipped]
    spans += [] if traced is None else [("profile.steps", traced)]
    return [f"config.{name}: [{a}, {b}) is empty" for name, (a, b) in spans if a >= b]


def _compute(c: ComputeConfig) -> list[str]:
    problems: list[str] = []
    if c.compilation_cache is not None and not c.compilation_cache.strip():
        problems.append("config.compute.compilation_cache='': need a path, or none")
    return problems + [
        f"config.compute.xla_flags: found {shown(word)}, need NAME=VALUE as in xla_some_flag=true;"
        " a path there without ~"
        for word in c.xla_flags
        if not re.fullmatch(r"[a-z]\w*=[^~].*", word)
    ]


def _lengths(t: TrainConfig, d: DataConfig) -> list[str]:
    """Ends of the run that steps, int32, never reach; those in epochs depend on the data."""
    largest = max(d.batch_sizes or (d.global_batch_size,))
    ends = {"duration": (t.duration, t.duration_unit), "hard_stop": (t.hard_stop, t.hard_stop_unit)}
    return [
        f"config.train.{name}={n} {unit} is more than {INT32} steps"
        for name, (n, unit) in ends.items()
        if n is not None and n > INT32 * (largest if unit == "tokens" else 1)
    ]


def _mesh(shape: dict[str, int], m: ModelConfig, lengths: dict[str, int | None]) -> list[str]:
    problems: list[str] = []
    for name, size, axis in (
        ("model.n_heads", m.n_heads, "tensor"),
        ("model.n_kv_heads", m.n_kv_heads, "tensor"),
        ("model.d_ff", m.d_ff, "tensor"),
        ("model.d_model", m.d_model, "fsdp"),
        ("model.n_experts", m.n_experts, "expert"),
    ):
        if size % shape[axis]:
            problems.append(
                f"config.{name}={size} is not divisible by mesh.{axis}={shape[axis]};"
                f" use {_in_words(divisors(size, 512))}"
            )
    chunks = 2 * shape["context"] if shape["context"] > 1 else 1
    problems += [
        f"config.{part}.seq_len={size} is not divisible by 2 x mesh.context={chunks}, the chunks"
        f" that a sequence is cut into; use {-(-size // chunks) * chunks}"
        for part, size in lengths.items()
        if size is not None and size % chunks
    ]
    if m.vocab_rows % shape["tensor"]:
        block = math.lcm(128, shape["tensor"])
        problems.append(
            f"config.model.vocab_size={m.vocab_rows} is not divisible by"
            f" mesh.tensor={shape['tensor']}; set model.padded_vocab_size="
            f"{-(-m.vocab_rows // block) * block}"
        )
    if m.router == "expert_choice" and shape["context"] > 1:
        problems.append(
            f"config.mesh.context={shape['context']}: model.router=expert_choice needs whole"
            " sequences on a device; use 1"
        )
    return problems


def _rows(shape: dict[str, int], d: DataConfig, accumulate: int, ranks: int | None) -> list[str]:
    problems: list[str] = []
    ways = shape["data"] * shape["fsdp"] * shape["expert"]
    if len(d.batch_sizes) != len(d.batch_starts):
        return problems
    for _, size in batch_stages(d):
        rows = size // d.seq_len
        if size % d.seq_len:
            continue  # said above
        if rows % (ways * accumulate):
            problems.append(
                f"config.data.global_batch_size={size} tokens is {rows} rows of"
                f" seq_len={d.seq_len}, not divisible by mesh.data x fsdp x expert = {ways}"
                f" times compute.accumulate={accumulate}"
            )
        if ranks is not None and rows % ranks:
            problems.append(
                f"config.train.loss_ranks={ranks} does not divide the {rows} rows of a batch"
            )
    return problems


def _in_words(numbers: list[int]) -> str:
    small = [str(n) for n in numbers]
    return ", ".join(small[:-1]) + f" or {small[-1]}" if len(small) > 1 else "1"
