"""What experts add to training: losses, the balancing bias, metrics, a limit."""

from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import table
from olmo_jax.config.training import TrainConfig


def router(
    routed: dict[str, jax.Array],
    n_tokens: int,
    n_counted: jax.Array | float,
    m: ModelConfig,
    t: TrainConfig,
    accumulate: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the routers of a (micro-)batch add to the loss.

    Args:
      routed: `tokens` and `probability` `[n_layers, n_experts]`, `z` `[n_layers]`; see `nn/moe.py`.
      n_tokens: of the (micro-)batch, with those that have no loss.
      n_counted: of the whole batch, as `counted` says.
      m: the model.
      t: `router_loss_form` says whose form:
        olmoe: E / (L T k) Σ_l Σ_e n_le p_le, and mean logsumexp² / k, as OLMoE trained
        (Muennighoff/megablocks@olmoe, layers/moe.py). megablocks: without that k. olmo_core: as
        megablocks, but the divisor T is `n_counted`, that of the cross entropy: the fewer tokens
        have a loss, the more it weighs (nn/moe/loss.py). hugging_face: E Σ_e f_e P_e over all
        layers at once, about k at balance (modeling_olmoe.py).
      accumulate: micro-batches of a step.

    Returns:
      The loss, and its parts: `balance` and `router z` (without their coefficients, means over the
      micro-batches of a step), `routed`, the tokens per layer and expert, and `buffer`, the largest
      of the layers, where it is limited.
    """
    # OLMo: the products n · p there are of one device's tokens, here of the whole micro-batch's.
    is_core = t.router_loss_form == "olmo_core"
    share = n_tokens / n_counted if is_core else 1.0 / accumulate
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


def reached_all(limit: float | None, parts: dict[str, jax.Array]) -> Any:
    """Whether every token reached its experts; if not, the step is void and the run ends."""
    return limit is None or "buffer" not in parts or parts["buffer"] <= limit


def balance(params: Any, tokens: jax.Array, gamma: jax.Array) -> Any:
    """Parameters whose router biases have moved by gamma towards experts with few tokens.

    Args:
      params: of the model.
      tokens: [n_layers, n_experts], routed to each expert in this step.
      gamma: scalar.
    Source: arXiv 2408.15664; OLMo-core nn/moe/router.py, post_batch.
    """
    layers, moe = params["layers"], params["layers"]["moe"]
    bias = moe["router_bias"] + gamma * jnp.sign(tokens.mean(1, keepdims=True) - tokens)
    return params | {"layers": layers | {"moe": moe | {"router_bias": bias}}}


def metrics(m: ModelConfig, t: TrainConfig, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the routers of a step did, by OLMo-core's names."""
    layers, busiest = table(m)["layers/moe/router"].layers or (), loads(parts).max(1)
    scalars = {
        f"train/block {i:02}/load imbalance": x for i, x in zip(layers, busiest, strict=True)
    }
    if "buffer" in parts:
        scalars["train/expert buffer"] = parts["buffer"]
    for name, key, weight in (
        ("load balancing loss", "balance", t.load_balancing_loss),
        ("router Z loss", "router z", t.router_z_loss),
    ):
        if weight is not None:
            scalars |= {
                f"train/{name}": weight * parts[key],
                f"train/{name} unscaled": parts[key],
            }
    return scalars


def loads(parts: dict[str, jax.Array]) -> jax.Array:
    """The tokens of each expert in terms of the balanced load, `[n_layers, n_experts]`."""
    tokens = parts["routed"]
    return tokens / tokens.mean(1, keepdims=True)
