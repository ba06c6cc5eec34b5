"""The training loss: which tokens count and by how much, and the next-token loss itself.

A normalisation is a scale on the batch's `loss_weights`, fixed before the batch is split: the
loss is then a plain sum, the same for any sharding and any number of micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config.run import Config
from olmo_jax.kernels.cross_entropy import cross_entropy

Batch = dict[str, jax.Array]


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


@jax.named_scope("loss")
def next_token(
    hidden: jax.Array, head: jax.Array, batch: Batch, config: Config
) -> tuple[jax.Array, dict[str, Any]]:
    """Weighted sum of the next-token loss over a (micro-)batch.

    Args:
      hidden: [batch, seq, d_model].
      head: [d_model, vocab_rows].
      batch: with `targets` and `loss_weights`, normalised.
      config: of the run.

    Returns:
      The loss, and its parts: `ce` and `z` (mean logsumexp², not scaled).
    """
    return cross_entropy(
        hidden,
        head,
        batch["targets"],
        batch["loss_weights"],
        config.model.vocab_size,
        config.train.z_loss,
        config.compute.loss_chunk,
        config.compute.grad_dtype,
    )
