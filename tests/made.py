"""The parts of a run, made out of a whole config as the loop makes them."""

from typing import Any

import jax

from olmo_jax.nn import transformer
from olmo_jax.nn.transformer import Transformer
from olmo_jax.training import losses, state, step


def model_of(config) -> Transformer:
    return Transformer(config.model, config.compute)


def fresh_state(config, mesh) -> state.TrainState:
    return state.init_state(config.model, config.optim, mesh, config.train.seed)


def state_shapes(config, mesh) -> state.TrainState:
    return state.abstract_state(config.model, config.optim, mesh)


def state_places(config, mesh) -> state.TrainState:
    return state.state_shardings(config.model, config.optim, mesh)


def make_update(config, mesh) -> step.Jitted:
    objective = losses.next_token(config.model, config.compute, config.train)
    return step.make_update(objective, model_of(config), config.train, config.optim, mesh)


def make_eval_step(config, mesh) -> step.Jitted:
    return step.make_eval_step(model_of(config), mesh)


def make_norms(config, mesh) -> step.Jitted:
    objective = losses.next_token(config.model, config.compute, config.train)
    return step.make_norms(objective, model_of(config), config.train, mesh)


def metrics_of(report: step.Report) -> dict[str, Any]:
    """All scalars of a step by OLMo-core's names, and its tables."""
    return jax.device_get(report.metrics() | report.tables)


def logits_of(model: Transformer, params, tokens, **kwargs) -> jax.Array:
    """Scores [batch, seq, vocab_size] of next tokens."""
    return transformer.logits(
        model, params, model.apply({"params": params}, tokens, **kwargs).hidden
    )
