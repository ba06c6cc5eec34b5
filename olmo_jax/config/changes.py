"""Options that differ between a checkpoint and a run, and which of them a run refuses."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from olmo_jax.config.model import yarn_attention
from olmo_jax.config.options import Bears, bearing
from olmo_jax.config.renamed import modern
from olmo_jax.config.run import Config
from olmo_jax.config.text import flatten, to_dict

FUNCTION = bearing(Config, Bears.FUNCTION)
STATE = bearing(Config, Bears.STATE)
ORDER = bearing(Config, Bears.ORDER)
RECORDS = bearing(Config, Bears.RECORDS)
ALL = bearing(Config, Bears.NOTHING)


class Change(NamedTuple):
    """An option that differs from the checkpoint's."""

    key: str  # such as model.rope_theta
    old: Any
    new: Any

    @property
    def is_of_the_function(self) -> bool:
        """Whether the trained model computes something else with it.

        An option of the model that is no longer there was of the function.
        """
        return self.key in FUNCTION or (self.key not in ALL and self.key.startswith("model."))

    def __str__(self) -> str:
        note = "; the data comes in another order from here on" if self.key in ORDER else ""
        return f"config.{self.key}: {self.old!r} -> {self.new!r}{note}"


def between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The options that differ between two configs, as `config.to_dict` gives them.

    An option that one of them does not know has its default there: it was added or removed since.
    What says the same in two ways is no change, and neither is an option that one of the two makes
    no use of: then the option that switches it on or off is one.
    """
    old = modern(old)
    before, after, default = flatten(old), flatten(new), flatten(to_dict(Config()))
    pairs = {
        key: (before.get(key, default.get(key)), after.get(key, default.get(key)))
        for key in [*after, *(key for key in before if key not in after)]
        if key.split(".")[0] in old and key.split(".")[0] in new
    }
    a, b = (_canonical({key: pair[i] for key, pair in pairs.items()}) for i in (0, 1))
    return [
        Change(key, *pair)
        for key, pair in pairs.items()
        if pair[0] != pair[1] and key in a and key in b and a[key] != b[key]
    ]


def _canonical(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are in use, each in the one form that others with its meaning have too."""
    values, unused = dict(flat), set[str]()

    kinds = values.get("model.layer_types")
    if not isinstance(kinds, list):  # of a damaged checkpoint: a change, whatever it is
        kinds = []
    if kinds:  # a short list repeats
        values["model.layer_types"] = shortest(kinds)
    if kinds and "sliding" not in kinds:
        unused |= {"model.window"}
    factor = values.get("model.yarn_factor")
    if factor is None or (kinds and "full" not in kinds):
        unused |= {key for key in values if key.startswith("model.yarn_")} - {"model.yarn_factor"}
    elif not values.get("model.yarn_attention_factor"):
        is_sound = isinstance(factor, (int, float)) and factor > 0
        values["model.yarn_attention_factor"] = yarn_attention(factor) if is_sound else None
    if not values.get("model.padded_vocab_size"):
        values["model.padded_vocab_size"] = values.get("model.vocab_size")
    if values.get("compute.attention") == "auto":  # older versions did not say what ran
        unused |= {"compute.attention"}
    if not values.get("model.n_experts"):
        unused |= {"model.n_experts_per_token", "model.normalize_expert_weights", "model.router"}
    if values.get("optim.name") != "skip_step_adamw":
        unused |= {"optim.skip_window", "optim.skip_sigma"}
    return {key: value for key, value in values.items() if key not in unused}


def shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest list that gives `kinds` when it is repeated."""
    n = next(n for n in range(1, len(kinds) + 1) if kinds[:n] * (len(kinds) // n) == kinds)
    return tuple(kinds[:n])


def refuse(changes: Sequence[Change], allow: Collection[str], parts: Collection[str] = ()) -> None:
    """Refuse a resume or start that would silently compute another function.

    Args:
      changes: from `between`.
      allow: `checkpoint.allow_changes`.
      parts: of the state that are loaded; the optimizer's must be of the same kind.
    Raises:
      ValueError: with every option that changed and is not allowed to.
    """
    _refuse(
        [c for c in changes if c.is_of_the_function and c.key not in allow],
        "set them as they were, or name them in config.checkpoint.allow_changes",
    )
    if "opt_state" in parts:
        _refuse(
            [c for c in changes if c.key in STATE],
            "set them as they were; checkpoint.load_path with checkpoint.load_optimizer=False, in a"
            " new config.dir, starts with a new optimizer state",
        )


def _refuse(changes: list[Change], need: str) -> None:
    lines = [f"config.{c.key}={c.new!r}, but the checkpoint was trained with {c.old!r}"
             for c in changes]  # fmt: skip
    if lines:
        raise ValueError("; ".join([*lines, need]))
