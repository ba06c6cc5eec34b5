"""What Ai2's optimizers keep beside the moments, in the form that ours has it."""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import from_dict
from olmo_jax.config.text import to_dict


def whole(value: Any, name: str, where: str) -> int:
    """The value if it is a number that can count steps; else a ValueError with its name."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, need a whole number")
    return value


def step(value: Any, where: str) -> np.ndarray:
    """The number of finished steps, int32, as trainers keep it."""
    if value is None:
        raise ValueError(f"{where}: there is no global_step in it")
    if whole(value, "global_step", where) >= 2**31:
        raise ValueError(f"{where}: global_step is {value}; nobody trains so long")
    return np.asarray(value, np.int32)


def config(
    model: ModelConfig,
    seq_len: int,
    order: str,
    optim: Mapping[str, Any],
    train: Mapping[str, Any],
    where: str,
) -> dict:
    """What is known of a run of theirs, as the config that our checkpoints keep.

    Args:
      model: the model.
      seq_len: tokens per row of its data.
      order: of the data, "core" or "legacy".
      optim: options of `OptimConfig`; those that are None stay at their defaults.
      train: options of `TrainConfig`.
      where: they are from, for errors.
    Raises:
      ValueError: if one of them is of another type.
    """
    known = {key: value for key, value in optim.items() if value is not None}
    parts = {"optim": known, "train": train, "data": {"seq_len": seq_len, "order": order}}
    try:
        return to_dict(from_dict(parts | {"model": to_dict(model)}, name="in our words"))
    except ConfigError as error:
        raise ValueError(f"{where}: {'; '.join(error.problems)}") from None
    except OverflowError as error:
        raise ValueError(f"{where}: {error}") from None


def count(steps: Mapping[str, float], where: str) -> np.ndarray:
    """Adam's number of taken steps, int32, from the one that PyTorch keeps for each parameter.

    It is 0 throughout where OLMo-core trained with `step_increment_bugfix=False`; our
    `optim.freeze_adam_step` goes on like that.

    Args:
      steps: by parameter.
      where: they are from, for errors.
    Raises:
      ValueError: if there is none, or they differ.
    """
    values = set(steps.values())
    if len(values) != 1 or not all(0 <= value < 2**31 and value == int(value) for value in values):
        found = ", ".join(f"{key} is {value:g}" for key, value in list(steps.items())[:2])
        raise ValueError(f"{where}: need one number of steps of all parameters; {found or 'none'}")
    return np.asarray(values.pop(), np.int32)


def fresh_history(window: int) -> dict[str, np.ndarray]:
    """The history of skip_step_adamw before its first step.

    Args:
      window: steps that it compares with.
    """
    return {
        "loss": np.zeros([window], np.float32),
        "grad_norm": np.zeros([window], np.float32),
        "filled": np.zeros([], np.int32),
    }
