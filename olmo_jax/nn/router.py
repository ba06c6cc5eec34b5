"""The router: which experts see which tokens, and with which weights.

As OLMoE was trained (arXiv 2409.02060): softmax over all experts in fp32, the top k of it as
weights, not renormalised. Or the other way round, as its authors compared it: each expert takes the
tokens of a sequence that score highest. Letters: n tokens, e experts, k experts of a token, b rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config.model import ModelConfig
from olmo_jax.parallel.sharding import BATCH_AXES, axis_size

# Of one layer, fp32 and over the whole batch: `tokens [e]` (routed to each expert), `probability
# [e]` (mean softmax), `z` (mean of logsumexp² of the logits); and where `compute.expert_buffer`
# limits it, `buffer`: the factor that was needed.
Stats = dict[str, jax.Array]

_AXES = (*BATCH_AXES, "context")  # over which tokens are split


@jax.named_scope("router")
def score(x: jax.Array, router: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over all experts `[n, e]` and the logsumexp of the logits `[n]`, fp32.

    Args:
      x: [n, d_model].
      router: [d_model, e].
    """
    # fp32 in truth, on a TPU too: a rounded logit can change the choice.
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.matmul(x.astype(jnp.float32), router.astype(jnp.float32), precision=exact)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - lse), lse[:, 0]


def choose_experts(
    scores: jax.Array, config: ModelConfig, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k experts of each token: their numbers `[n, k]` int32 and weights `[n, k]` fp32.

    Args:
      scores: [n, e], as `score` gives them.
      config: `n_experts_per_token`, `normalize_expert_weights`.
      bias: [e], added to the scores for the choice alone.
    """
    k = config.n_experts_per_token
    if bias is None:
        weights, chosen = jax.lax.top_k(scores, k)
    else:
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores + bias[None]), k)
        weights = jnp.take_along_axis(scores, chosen, axis=1)
    if config.normalize_expert_weights:
        # A bias can choose experts whose scores are all 0 in fp32: they get 0, and no NaN.
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-18)
    return chosen, weights


def choose_tokens(
    scores: jax.Array, config: ModelConfig, batch: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens of each expert: of every sequence the k · seq / e (rounded down) highest scores.

    It looks ahead: a later token can take an earlier one's place.

    Args:
      scores: [n, e] of `batch` whole sequences.
      config: `n_experts_per_token`.
      batch: number of sequences.

    Returns: tokens `[rows]` int32, by expert, their weights `[rows]` fp32, and the rows of each
      expert `[e]` int32.
    Source: arXiv 2409.02060, whose code takes the capacity k per sequence; arXiv 2202.09368.
    """
    n, e = scores.shape
    seq = n // batch
    size = config.n_experts_per_token * seq // e
    weights, token = jax.lax.top_k(scores.reshape(batch, seq, e).transpose(2, 0, 1), size)
    token += seq * jnp.arange(batch)[None, :, None]
    return token.reshape(-1), weights.reshape(-1), jnp.full(e, batch * size, jnp.int32)


def stats(sizes: jax.Array, scores: jax.Array, lse: jax.Array) -> Stats:
    """Sums and means over the tokens of all devices, see `Stats`; `sizes [e]`: tokens of each."""
    own = {
        "tokens": sizes.astype(jnp.float32),
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
