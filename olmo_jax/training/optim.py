"""Optimizers with groups, clipping and the guard against bad steps, as Optax transformations.

AdamW's state mirrors the parameters, so it can take their shardings:
`{"mu": like params, "nu": like params, "count": int32}`, all moments float32, and for
skip_step_adamw `"history": {"loss": [skip_window], "grad_norm": [skip_window], "filled": int32}`.
Other optimizers are Optax's: `{"optax": {path: its state}}`, see `optim_optax.py`.
The learning rate is an argument (`schedules.py`), never a part of the state.
Source: Decoupled Weight Decay Regularization, arXiv 1711.05101; the guard is OLMo-core's,
`src/olmo_core/optim/skip_step_optimizer.py`.
"""

import fnmatch
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from olmo_jax.config.parameters import ROUTER_BIAS, Parameter
from olmo_jax.config.training import OptimConfig
from olmo_jax.training import optim_optax
from olmo_jax.training.optim_optax import NATIVE, TESTED, transformation

Tree = Any  # nested dicts of arrays
NO_ROWS: Mapping[str, Parameter] = types.MappingProxyType({})


def decay_mask(cfg: OptimConfig, params: Tree) -> Tree:
    """Which parameters weight decay acts on: a bool for each leaf of `params`.

    Args:
      params: arrays or shapes; a path is written `layers/attn/q_norm`, `*` also matches `/`.
    Raises:
      ValueError: if a glob of `cfg.no_decay` matches nothing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    exempt = (*cfg.no_decay, ROUTER_BIAS)  # nothing that AdamW would do to that may happen
    for glob in cfg.no_decay:
        if not fnmatch.filter(names, glob):
            raise ValueError(
                f"config.optim.no_decay: {glob!r} matches no parameter; there are"
                f" {', '.join(names)}"
            )
    decayed = [not any(fnmatch.fnmatchcase(name, glob) for glob in exempt) for name in names]
    return structure.unflatten(decayed)


def describe_groups(cfg: OptimConfig, params: Tree, rows: Mapping[str, Parameter] = NO_ROWS) -> str:
    """The decayed and the exempt parameters, one line each: how many, and their names."""
    heads = (f"weight decay {cfg.weight_decay:g}", "no weight decay", "moved by the experts' loads")
    groups: tuple[dict[str, int], ...] = ({}, {}, {})
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(cfg, params))
    for (path, decayed), leaf in zip(mask, jax.tree.leaves(params), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        groups[0 if decayed else 2 if name == ROUTER_BIAS else 1][name] = math.prod(leaf.shape)
    shown = zip(heads, groups if groups[2] else groups[:2], strict=False)
    others = []
    if cfg.name not in NATIVE:
        others = [f"{cfg.name} of Optax, {moments(cfg, rows):.2f} numbers for each parameter"]
    if cfg.name not in (*NATIVE, *TESTED):
        others.append(f"{cfg.name} of Optax is not tested here")
    return "\n".join(others + [
        f"{head}, {sum(group.values()):,} parameters: {', '.join(group) or 'nothing'}"
        for head, group in shown
    ])  # fmt: skip


def moments(cfg: OptimConfig, rows: Mapping[str, Parameter]) -> float:
    """Numbers that the optimizer keeps for each parameter."""
    return 2.0 if cfg.name in NATIVE else optim_optax.moments(cfg.name, dict(cfg.options), rows)


def init(cfg: OptimConfig, params: Tree, rows: Mapping[str, Parameter] = NO_ROWS) -> dict[str, Any]:
    """The optimizer's state before the first step, see the head of this file.

    Args:
      cfg: which optimizer.
      params: arrays or tracers.
      rows: their table; AdamW does without.
    """
    if cfg.name not in NATIVE:
        return {"optax": transformation(cfg.name, dict(cfg.options), rows).init(params)}

    def zeros() -> Tree:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)

    state = {"mu": zeros(), "nu": zeros(), "count": jnp.zeros([], jnp.int32)}
    if cfg.name == "skip_step_adamw":
        state["history"] = {
            "loss": jnp.zeros([cfg.skip_window], jnp.float32),
            "grad_norm": jnp.zeros([cfg.skip_window], jnp.float32),
            "filled": jnp.zeros([], jnp.int32),
        }
    return state


def update(
    cfg: OptimConfig,
    grads: Tree,
    opt_state: dict[str, Any],
    params: Tree,
    lr: jax.Array | float,
    max_grad_norm: jax.Array | float,
    loss: jax.Array,
    has_tokens: jax.Array | bool,
    rows: Mapping[str, Parameter] = NO_ROWS,
) -> tuple[Tree, dict[str, Any], jax.Array, jax.Array]:
    """One step of the optimizer, or none where the step must not be taken.

    Nothing changes after a step without tokens, with a loss or gradient norm that is not finite,
    or (skip_step_adamw) with one far above its history; only a finite pair enters that history.

    Args:
      grads: like params, of the mean loss; float32 or bfloat16.
      opt_state: from `init`.
      params: float32.
      lr: scalar.
      max_grad_norm: scalar; infinite for no clipping.
      loss: scalar, cross entropy of the whole batch (as in OLMo-core without z-loss).
      has_tokens: scalar bool; false if the batch has nothing to learn from.
      rows: the table of the parameters; AdamW does without.
    Returns: params, opt_state, the norm of the gradients before clipping, and whether anything
      changed, a bool.
    """
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    loss = jnp.asarray(loss, jnp.float32)
    valid = jnp.isfinite(loss) & jnp.isfinite(norm) & has_tokens
    take, history = valid, {}
    if cfg.name == "skip_step_adamw":
        old = opt_state["history"]
        take = valid & _as_expected(cfg, old, loss, norm)
        history = {"history": _keep(valid, _remember(old, loss, norm), old)}

    clip = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * clip, grads)
    if cfg.name not in NATIVE:
        params, state = _other_step(cfg, rows, take, grads, opt_state["optax"], params, lr)
        return params, {"optax": state}, norm, take
    mu = optax.tree.update_moment(grads, opt_state["mu"], cfg.beta1, 1)
    nu = optax.tree.update_moment(grads, opt_state["nu"], cfg.beta2, 2)
    # OLMo: multiplies the step by 0 there, which makes parameters NaN if it is not finite.
    mu, nu = _keep(take, mu, opt_state["mu"]), _keep(take, nu, opt_state["nu"])
    count = opt_state["count"] + 1
    steps = _adamw_steps(cfg, mu, nu, count, params)
    params = _keep(take, jax.tree.map(lambda p, step: p - lr * step, params, steps), params)
    # OLMo: before PR#317 the count stayed at zero: every step was corrected like the first.
    count = jnp.where(take & (not cfg.freeze_adam_step), count, opt_state["count"])
    return params, {"mu": mu, "nu": nu, "count": count} | history, norm, take


def _adamw_steps(cfg: OptimConfig, mu: Tree, nu: Tree, count: jax.Array, params: Tree) -> Tree:
    """What AdamW subtracts for each unit of learning rate, from moments that have this gradient.

    This is the second half of `optax.scale_by_adam`, which would make its step from moments that
    are not selected yet: XLA on a CPU then copies the old ones. At 65M parameters that is 1.7x the
    CPU time of optax.adamw with clipping; as here it is 0.45x, without temporary memory (state and
    parameters donated in the order in which they are returned).
    """
    mu_hat = optax.tree.bias_correction(mu, cfg.beta1, count)
    nu_hat = optax.tree.bias_correction(nu, cfg.beta2, count)
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.eps), mu_hat, nu_hat)
    decay = optax.add_decayed_weights(cfg.weight_decay, decay_mask(cfg, params))
    return decay.update(steps, decay.init(params), params)[0]


def _other_step(
    cfg: OptimConfig,
    rows: Mapping[str, Parameter],
    take: jax.Array,
    grads: Tree,
    state: Tree,
    params: Tree,
    lr: jax.Array | float,
) -> tuple[Tree, Tree]:
    """A step of an optimizer of Optax, or none: then nothing of it is computed.

    A selection of old and new values outside, as AdamW has inside, would take four times as long.
    """
    optimizer = transformation(cfg.name, dict(cfg.options), rows)
    decay = optax.add_decayed_weights(-cfg.weight_decay, decay_mask(cfg, params))

    def step(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(grads, state, params)
        updates, _ = decay.update(updates, decay.init(params), params)
        return jax.tree.map(lambda p, u: p + lr * u, params, updates), state

    stay = lambda grads, state, params: (params, state)  # noqa: E731
    return jax.lax.cond(take, step, stay, grads, state, params)


def _keep(take: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)


def _as_expected(
    cfg: OptimConfig, history: dict[str, jax.Array], loss: jax.Array, norm: jax.Array
) -> jax.Array:
    """Whether neither value is far above the earlier ones, outliers among them included."""
    n = jnp.minimum(history["filled"], cfg.skip_window)
    ok = _within(cfg, history["loss"], n, loss)
    if cfg.max_grad_norm is not None:  # OLMo: has the norm only where it clips
        ok &= _within(cfg, history["grad_norm"], n, norm)
    return ok | (n + 1 < max(2, cfg.skip_window // 2))


def _within(cfg: OptimConfig, values: jax.Array, n: jax.Array, value: jax.Array) -> jax.Array:
    """Whether `value` is at most skip_sigma deviations above the mean of the first n `values`."""
    kept = jnp.arange(cfg.skip_window) < n
    mean = jnp.sum(values, where=kept) / n
    variance = jnp.sum(jnp.square(values - mean), where=kept) / (n - 1)
    return value - mean <= cfg.skip_sigma * jnp.sqrt(variance)


def _remember(
    history: dict[str, jax.Array], loss: jax.Array, norm: jax.Array
) -> dict[str, jax.Array]:
    """The history with one more pair, in place of the oldest; only mean and deviation matter."""
    at = history["filled"] % history["loss"].shape[0]
    return {
        "loss": history["loss"].at[at].set(loss),
        "grad_norm": history["grad_norm"].at[at].set(norm),
        "filled": history["filled"] + 1,
    }
