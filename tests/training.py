"""Steps of training from arrays that came from somewhere else."""

import jax
import numpy as np

from olmo_jax import sharding, step
from olmo_jax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig


def tree_of(weights) -> dict:
    """Every leaf of `Weights` in nested dicts."""
    tree: dict = {}
    for name in weights.leaves:
        *path, last = name.split("/")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = weights.read(name)
    return tree


def state_of(weights) -> step.TrainState:
    """The state of a run, from `Weights` with the optimizer."""
    return step.TrainState(**tree_of(weights))


def next_losses(
    model: ModelConfig, optim: OptimConfig, state: step.TrainState, batches: np.ndarray
) -> list[float]:
    """The loss before each of the next steps, on the mean over next tokens.

    Args:
      model: of the state.
      optim: of the steps; the learning rate is `optim.lr` throughout.
      state: is left as it is.
      batches: [steps, batch, seq] tokens.
    """
    _, n_rows, seq_len = batches.shape
    config = Config(
        model=model,
        compute=ComputeConfig(dtype="float32", remat="none"),
        data=DataConfig(seq_len=seq_len, global_batch_size=n_rows * seq_len),
        mesh=MeshConfig(fsdp=1),
        optim=optim,
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = jax.device_put(state, step.state_shardings(config, mesh))
    update = step.make_train_step(config, mesh)
    losses = []
    for tokens in batches.astype(np.int32):
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}
        arrays = sharding.to_global(batch, mesh, n_rows)
        state, metrics = update(state, arrays, np.float32(optim.lr), np.float32(1.0))
        losses.append(float(metrics["train/CE loss"]))
    return losses
