"""The router: which experts each token takes, and with which weights.

As OLMoE was trained (arXiv 2409.02060): softmax over all experts in fp32, the top k of it as
weights, not renormalised. Letters: n tokens, e experts, k experts of a token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config import ModelConfig
from olmo_jax.sharding import BATCH_AXES, axis_size

# Of one layer, fp32 and over the whole batch: `tokens [e]` (routed to each expert), `probability
# [e]` (mean softmax), `z` (mean of logsumexp² of the logits); and where `compute.expert_buffer`
# limits it, `buffer`: the factor that was needed.
Stats = dict[str, jax.Array]

_AXES = (*BATCH_AXES, "context")  # over which tokens are split


def route(
    x: jax.Array, router: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which experts each token takes.

    Args:
      x: [n, d_model].
      router: [d_model, e].
      config: `n_experts_per_token`, `normalize_expert_weights`.

    Returns: expert numbers `[n, k]` int32, their weights `[n, k]`, and for the losses the softmax
      over all experts `[n, e]` and the logsumexp of the logits `[n]`, fp32.
    """
    # fp32 in truth, on a TPU too: a rounded logit can change the choice.
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=exact)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    scores = jnp.exp(logits - lse)
    weights, chosen = jax.lax.top_k(scores, config.n_experts_per_token)
    if config.normalize_expert_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    return chosen, weights, scores, lse[:, 0]


def stats(chosen: jax.Array, scores: jax.Array, lse: jax.Array, n_experts: int) -> Stats:
    """Sums and means over the tokens of all devices, see `Stats`."""
    own = {
        "tokens": jnp.bincount(chosen.reshape(-1), length=n_experts).astype(jnp.float32),
        "probability": scores.mean(0),
        "z": jnp.mean(jnp.square(lse)),
    }
    total = over_devices(jax.lax.psum, own)
    ways = axis_size(*_AXES)
    return total | {name: total[name] / ways for name in ("probability", "z")}


def over_devices(reduce: Callable[..., Any], values: Any) -> Any:
    """`values` reduced over all devices that hold different tokens, inside `shard_map`."""
    axes = tuple(name for name in _AXES if axis_size(name) > 1)
    return reduce(values, axes) if axes else values
