"""Sampling from a model by full forward passes over a window of fixed length."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Transformer


def sample(
    model: Transformer,
    params: Any,
    prompt_ids: Sequence[int],
    n_new: int,
    temperature: float = 1.0,
    seed: int = 0,
    context: int = 256,
) -> list[int]:
    """Continue a prompt; one compilation serves all prompts, temperatures and seeds.

    Args:
      model: the Transformer.
      params: of the model.
      prompt_ids: at least one id; only the last `context` are seen.
      n_new: ids to make.
      temperature: 0 takes the most likely id; 1 samples from the model's distribution.
      seed: of the sampling; the same seed gives the same ids.
      context: ids that the model sees at most.

    Returns:
      The `n_new` new ids.

    Raises:
      ValueError: if the prompt is empty, `temperature` is negative, or the model looks ahead.
    """
    if not len(prompt_ids):
        raise ValueError("the prompt is empty; give at least one id, such as the EOS")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: need 0 or more")
    if looks_ahead(model):
        raise ValueError(
            "model.router=expert_choice: experts choose among all tokens of a row, those that are"
            " not there yet too; such a model cannot continue a text"
        )
    seen = jnp.array(prompt_ids[-context:], jnp.int32)
    window = jnp.zeros(context, jnp.int32).at[: seen.size].set(seen)
    scale, key = jnp.float32(temperature), jax.random.key(seed)
    new = _continue(model, n_new, params, window, jnp.int32(seen.size), scale, key)
    return [int(i) for i in jax.device_get(new)]


def looks_ahead(model: Any) -> bool:
    """Whether what a model says depends on later tokens: where experts choose their tokens."""
    return getattr(getattr(model, "config", None), "router", None) == "expert_choice"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    model: Any,
    n_new: int,
    params: Any,
    window: jax.Array,
    length: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The new ids `[n_new]` after the first `length` of `window [context]`."""

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        window, length = carry
        # What stands behind `length` is never seen: the model does not look ahead.
        hidden = model.apply({"params": params}, window[None]).hidden
        logits = transformer.logits(model, params, hidden[:, length - 1][:, None])[0, 0]
        # Gumbel-max: a sample of softmax(logits / temperature), and the argmax at 0.
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        new = jnp.argmax(logits + temperature * noise).astype(jnp.int32)
        window = jnp.where(length < window.size, window, jnp.roll(window, -1))
        length = jnp.minimum(length + 1, window.size)
        return (window.at[length - 1].set(new), length), new

    return jax.lax.scan(step, (window, length), jax.random.split(key, n_new))[1]
