"""All options of runs: the face for config files and users; modules import the parts."""

from olmo_jax.config import presets
from olmo_jax.config.data import DataConfig, FixedLength
from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config, default, from_dict, load
from olmo_jax.config.text import to_dict
from olmo_jax.config.training import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ProfileConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "FixedLength",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "ProfileConfig",
    "ScheduleConfig",
    "StageConfig",
    "TrainConfig",
    "default",
    "from_dict",
    "load",
    "presets",
    "to_dict",
]
