"""Optimizers of Optax by name, each parameter and each layer of a stack on its own.

Optax sees one parameter of one layer at a time, as it would in a model without stacks: adafactor
factors a matrix and not a stack of them, a trust ratio is that of a layer. Learning rate, weight
decay and clipping are those of `OptimConfig`, outside of it: Optax's own rate is 1.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib

from olmo_jax.config.options import ConfigError, shown
from olmo_jax.config.parameters import ROUTER_BIAS, Parameter, nested

TESTED = ("muon", "lion", "sgd", "adafactor")
NATIVE = ("adamw", "skip_step_adamw")
# What a gradient, the parameters and a state of one parameter are not enough for.
NEEDS = {
    "the loss again, at other parameters": "lbfgs sam polyak_sgd momo momo_adam sophia",
    "the loss of each step": "reduce_on_plateau",
    "other parameters for evaluations": "schedule_free schedule_free_adamw schedule_free_sgd",
    "the gradient of each row": "dpsgd differentially_private_aggregate",
    "all parameters at once": "prodigy dadapt_adamw dog dowg mechanize",
    "random numbers": "noisy_sgd",
}
# Options of Optax's that `OptimConfig` has for all optimizers.
OURS = {
    "learning_rate": "lr", "weight_decay": "weight_decay", "weight_decay_rate": "weight_decay",
    "adam_weight_decay": "weight_decay", "mask": "no_decay", "weight_decay_mask": "no_decay",
}  # fmt: skip


def transformation(
    name: str, options: Mapping[str, Any], rows: Mapping[str, Parameter]
) -> optax.GradientTransformation:
    """An optimizer of Optax for parameters that are stacked over layers.

    Args:
      name: as Optax or `optax.contrib` call it.
      options: its arguments.
      rows: the table of parameters.
    Returns: with the rate 1 and no weight decay; updates are to be scaled and added. Its state is
      a tree like the parameters', with the state of each in its place, stacked as it is.
    Raises:
      ConfigError: if there is none of this name, it cannot be used here, or an option is not its.
    """
    make = _maker(name, options)
    of = {
        path: _stacked(make(row) if path != ROUTER_BIAS else optax.set_to_zero(), row)
        for path, row in rows.items()
    }

    def init(params: Any) -> dict[str, Any]:
        leaves = _by_path(params)
        return nested({path: each.init(leaves[path]) for path, each in of.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, dict[str, Any]]:
        gradients, leaves = _by_path(updates), _by_path(params)
        made = {
            path: each.update(gradients[path], _at(state, path), leaves[path])
            for path, each in of.items()
        }
        structure = jax.tree.structure(updates)
        made_updates = structure.unflatten([made[path][0] for path in gradients])
        return made_updates, nested({path: new for path, (_, new) in made.items()})

    return optax.GradientTransformation(init, update)


def _maker(name: str, options: Mapping[str, Any]) -> Callable[[Parameter], Any]:
    """What makes the transformation of one parameter."""
    if name not in TESTED:  # those are a part of what is checked before
        for what, names in NEEDS.items():
            if name in names.split():
                raise ConfigError([f"config.optim.name={name}: it needs {what}, which is not here"])
    alias: Any = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    try:
        known = inspect.signature(alias).parameters if callable(alias) else {}
    except ValueError:
        known = {}
    if "learning_rate" not in known:
        raise ConfigError(
            [f"config.optim.name={shown(name)}: need one of {', '.join((*NATIVE, *TESTED))}, or"
             " another optimizer of Optax"]
        )  # fmt: skip
    problems = [
        f"config.optim.options.{key}: set optim.{OURS[key]} instead"
        if key in OURS
        else f"config.optim.options.{key}: {name} of Optax has no such option; it has"
        f" {', '.join(k for k in known if k not in OURS)}"
        for key in options
        if key in OURS or key not in known
    ]
    if problems:
        raise ConfigError(problems)
    fixed: dict[str, Any] = {"learning_rate": 1.0} | dict(options)
    fixed |= {key: 0.0 for key in ("weight_decay", "adam_weight_decay") if key in known}

    def make(row: Parameter) -> Any:
        try:
            if name != "muon":
                return alias(**fixed)
            # A function: None itself would ask Optax to tell by the number of dimensions.
            return alias(**fixed, muon_weight_dimension_numbers=lambda _: _dimensions(row))
        except (TypeError, ValueError) as error:
            raise ConfigError([f"config.optim.options: {name} of Optax: {error}"]) from error

    return make


def _dimensions(row: Parameter) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a matrix Muon takes for its inputs and outputs; None: the parameter is Adam's.

    Embedding, head, router and norms are: Muon is for what maps activations to activations.
    """
    if row.layers is None or not row.inputs or row.logical[-1] is None:
        return None
    letters = [x for x in row.axes.split() if x != "e"]  # an expert is taken alone
    inputs = [i for i, letter in enumerate(letters) if letter in row.inputs]
    outputs = [i for i, x in enumerate(letters) if x not in row.inputs]
    return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))


def _stacked(each: optax.GradientTransformation, row: Parameter) -> optax.GradientTransformation:
    """The transformation of each of a parameter's layers, and of each of its experts, alone."""
    n_stacks = (row.layers is not None) + ("e" in row.axes and row.logical[0] == "expert")
    init, update = each.init, each.update
    for _ in range(n_stacks):
        init, update = jax.vmap(init), jax.vmap(update)
    return optax.GradientTransformation(init, update)


def _at(tree: Any, path: str) -> Any:
    return functools.reduce(lambda place, name: place[name], path.split("/"), tree)


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def moments(name: str, options: Mapping[str, Any], rows: Mapping[str, Parameter]) -> float:
    """Numbers that the state holds for each parameter."""
    params = nested(
        {path: jax.ShapeDtypeStruct(row.shape, "float32") for path, row in rows.items()}
    )
    state = jax.eval_shape(transformation(name, options, rows).init, params)
    held, own = (sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for t in (state, params))
    return held / own
