"""Steps of training from arrays that came from somewhere else."""

import dataclasses
import pathlib
from typing import Any

import hf
import jax
import made
import numpy as np

from olmo_jax.config.data import FixedLength
from olmo_jax.config.model import ComputeConfig, MeshConfig
from olmo_jax.config.run import Config, from_dict
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import sharding
from olmo_jax.training.state import TrainState

# Two batches in turn, so that there is something to learn.
BATCHES = np.tile(np.random.default_rng(3).integers(0, 128, (2, 4, 24)), (3, 1, 1))
SAVED_AFTER = 3  # steps


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


def state_of(weights) -> TrainState:
    """The state of a run, from `Weights` with the optimizer."""
    return TrainState(**tree_of(weights))


def assert_goes_on(weights, want: dict[str, Any], src: str, tmp_path: pathlib.Path) -> None:
    """A run that somebody else began goes on as theirs did.

    Args:
      weights: of their checkpoint after SAVED_AFTER steps on BATCHES, with the optimizer.
      want: their `logits` of its first row then, and all six `losses`.
      src: the checkpoint.
      tmp_path: for its export, whose logits are compared too.
    """
    assert int(weights.read("step")) == int(weights.read("opt_state/count")) == SAVED_AFTER
    position = {key: weights.meta["position"][key] for key in ("row", "tokens")}
    assert position == {"row": SAVED_AFTER * 4, "tokens": SAVED_AFTER * 4 * 24}
    state, first = state_of(weights), BATCHES[0][:1]
    model = Transformer(weights.model)
    logits = made.logits_of(model, state.params, first)
    np.testing.assert_allclose(logits[0], want["logits"], atol=2e-5)
    exported = hf.exported_logits(src, str(tmp_path / "hf"), first)
    np.testing.assert_allclose(exported[0], want["logits"], atol=2e-5)
    losses = next_losses(from_dict(weights.meta["config"]), state, BATCHES[SAVED_AFTER:])
    assert want["losses"][5] < want["losses"][3] - 0.1
    np.testing.assert_allclose(losses, want["losses"][SAVED_AFTER:], rtol=0, atol=1e-5)


def next_losses(config: Config, state: TrainState, batches: np.ndarray) -> list[float]:
    """The loss before each of the next steps, on the mean over next tokens.

    Args:
      config: what is known of the run; the learning rate is `optim.lr` throughout.
      state: is left as it is.
      batches: [steps, batch, seq] tokens.
    """
    _, n_rows, seq_len = batches.shape
    config = dataclasses.replace(
        config,
        compute=ComputeConfig(dtype="float32", remat="none"),
        data=FixedLength(seq_len=seq_len, global_batch_size=n_rows * seq_len),
        mesh=MeshConfig(fsdp=1),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = jax.device_put(state, made.state_places(config, mesh))
    update = made.make_update(config, mesh)
    losses = []
    for tokens in batches.astype(np.int32):
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights}
        arrays = sharding.to_global(batch, mesh, n_rows)
        state, report = update(state, arrays, np.float32(config.optim.lr), np.float32(1.0))
        losses.append(float(report.loss))
    return losses
