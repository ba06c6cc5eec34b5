"""The training loss: which tokens count and by how much, and the next-token loss itself.

A normalisation is a scale on the batch's `loss_weights`, fixed before the batch is split: the
loss is then a plain sum, the same for any sharding and any number of micro-batches.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.training import TrainConfig
from olmo_jax.kernels.cross_entropy import cross_entropy
from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Output
from olmo_jax.training import experts

Arrays = dict[str, jax.Array]
Parts = dict[str, jax.Array]  # `ce` and `z` (mean logsumexp², not scaled), and those of experts
Apply = Callable[[Any, Arrays], Output]


class Objective(Protocol):
    """A loss: the sum over a (micro-)batch, and its parts; the divisor is in the weights."""

    def __call__(self, apply: Apply, params: Any, batch: Arrays) -> tuple[jax.Array, Parts]:
        """The sum and its parts.

        Args:
          apply: the forward pass of a batch.
          params: of the model.
          batch: `[batch, seq]` arrays: tokens, targets, loss_weights, normalised, and what the
            model and the objective need besides; `n_counted`, a scalar of the whole batch.
        """
        ...


def normalize(weights: jax.Array, mode: str, ranks: int) -> jax.Array:
    """Scale 0/1 loss weights `[batch, seq]` so that the loss is the sum of weight · loss.

    Args:
      weights: 1 for tokens with a loss. A row without any is one that the instance filter masked.
      mode: global_tokens: mean over the tokens of the global batch.
        per_rank_tokens: mean over ranks of the mean over the rank's tokens, the tokens of masked
        rows counted as if they were there (OLMo-core train_module.py: their loss is lower by it).
        per_instance: mean over rows of the mean over the row's tokens.
        legacy_positions: sum over tokens / (batch · seq) (OLMo from v0.4.0 on, train.py:766).
      ranks: of per_rank_tokens; row i belongs to rank i % ranks.

    Returns:
      fp32 `[batch, seq]`; all zero if no token counts.
    """
    rows, seq = weights.shape
    per_row = weights.sum(1)
    if mode == "global_tokens":
        return weights / jnp.maximum(per_row.sum(), 1.0)
    if mode == "legacy_positions":
        return weights / (rows * seq)
    if mode == "per_instance":
        used = jnp.maximum((per_row > 0).sum(), 1)
        return weights / (jnp.maximum(per_row, 1.0) * used)[:, None]
    per_rank = counted(weights).reshape(rows // ranks, ranks).sum(0)
    return weights / (ranks * jnp.tile(per_rank, rows // ranks))[:, None]


def counted(weights: jax.Array) -> jax.Array:
    """The tokens of each row that OLMo-core divides losses by, fp32 `[batch]`.

    Those with a loss, of 0/1 `weights [batch, seq]`; all of a row that has none, as it was masked
    (train_module.py, "we count those tokens for the loss anyways").
    """
    per_row = weights.sum(1)
    return jnp.where(per_row > 0, per_row, weights.shape[1])


def next_token(m: ModelConfig, compute: ComputeConfig, t: TrainConfig) -> Objective:
    """The objective of pretraining: the next token, and what experts add to it."""

    def objective(apply: Apply, params: Any, batch: Arrays) -> tuple[jax.Array, Parts]:
        output = apply(params, batch)
        loss, parts = cross_entropy_of(m, compute, t.z_loss, output.hidden, params, batch)
        if not output.routed:
            return loss, parts
        n_tokens, n_counted = batch["tokens"].size, batch["n_counted"]
        added, more = experts.router(output.routed, n_tokens, n_counted, m, t, compute.accumulate)
        return loss + added, parts | more

    return objective


@jax.named_scope("loss")
def cross_entropy_of(
    m: ModelConfig,
    compute: ComputeConfig,
    z_loss: float | None,
    hidden: jax.Array,
    params: Any,
    batch: Arrays,
) -> tuple[jax.Array, Parts]:
    """The weighted sum of the next-token loss of `hidden [batch, seq, d_model]`, and its parts."""
    return cross_entropy(
        hidden,
        transformer.head(params),
        batch["targets"],
        batch["loss_weights"],
        m.vocab_size,
        z_loss,
        compute.loss_chunk,
        compute.grad_dtype,
    )
