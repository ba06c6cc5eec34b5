"""What Ai2's optimizers keep beside the moments, in the form that ours has it."""

from collections.abc import Mapping

import numpy as np


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
    if len(values) != 1:
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
