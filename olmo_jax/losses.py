"""The training loss: which tokens count and by how much, and the next-token loss itself.

A normalisation is a scale on the batch's `loss_weights`, fixed before the batch is split: the
loss is then a plain sum, the same for any sharding and any number of micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config import Config
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


def router(
    routed: dict[str, jax.Array], n_tokens: int, n_counted: jax.Array | float, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the routers of a (micro-)batch add to the loss.

    Args:
      routed: `tokens` and `probability` `[n_layers, n_experts]`, `z` `[n_layers]`; see `nn/moe.py`.
      n_tokens: of the (micro-)batch, with those that have no loss.
      n_counted: of the whole batch, as `counted` says.
      config: of the run; `train.router_loss_form` says whose form:
        olmoe: E / (L T k) Σ_l Σ_e n_le p_le, and mean logsumexp² / k, as OLMoE trained
        (Muennighoff/megablocks@olmoe, layers/moe.py). megablocks: without that k. olmo_core: as
        megablocks, but the divisor T is `n_counted`, that of the cross entropy: the fewer tokens
        have a loss, the more it weighs (nn/moe/loss.py). hugging_face: E Σ_e f_e P_e over all
        layers at once, about k at balance (modeling_olmoe.py).

    Returns:
      The loss, and its parts: `balance` and `router z` (without their coefficients, means over the
      micro-batches of a step), `routed`, the tokens per layer and expert, and `buffer`, the largest
      of the layers, where it is limited.
    """
    # OLMo: the products n · p there are of one device's tokens, here of the whole micro-batch's.
    m, t = config.model, config.train
    is_core = t.router_loss_form == "olmo_core"
    share = n_tokens / n_counted if is_core else 1.0 / config.compute.accumulate
    tokens, probability = routed["tokens"] / n_tokens, routed["probability"]
    if t.router_loss_form == "hugging_face":
        balance = m.n_experts * jnp.sum(tokens.mean(0) * probability.mean(0))
    else:
        k = m.n_experts_per_token
        balance = m.n_experts / k * jnp.mean(jnp.sum(tokens * probability, axis=1))
    z = routed["z"].mean() / (m.n_experts_per_token if t.router_loss_form == "olmoe" else 1)
    parts = {"balance": share * balance, "router z": share * z, "routed": routed["tokens"]}
    if "buffer" in routed:
        parts["buffer"] = routed["buffer"].max()
    loss = (t.load_balancing_loss or 0.0) * parts["balance"]
    return loss + (t.router_z_loss or 0.0) * parts["router z"], parts


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
