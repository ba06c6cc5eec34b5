"""Options as plain dicts, by dotted path, and as typed on a command line."""

import dataclasses
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from olmo_jax.config import options, typed


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts, lists and scalars, ready for JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted path, such as `model.rope_theta`, from the dicts of `to_dict`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(typing.cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, options.Pairs):
        return dict(value)
    return [_plain(v) for v in _items(value)] if isinstance(value, (tuple, list)) else value


def _items(value: Any) -> Sequence[Any]:
    return value


def cause(error: BaseException, path: str) -> str:
    """What is wrong in a config file, and in which line, on one line."""
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "the file defines no get_config()"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def refuse_odd_keys(values: Any) -> None:
    """Refuse keys that are no text, in a ConfigDict and its groups.

    Raises:
      TypeError: if there is one.
    """
    try:
        are_text = all(isinstance(key, str) for key in values)
    except TypeError:  # a ConfigDict sorts its keys
        are_text = False
    if not are_text:
        raise TypeError("a key of the options is no text")
    for value in values.values():
        if isinstance(value, (dict, ConfigDict)):
            refuse_odd_keys(value)


def assign(group: Any, values: Any, keys: list[str], text: str) -> None:
    """Set an option to what was typed for it.

    Groups are made on the way, so that a wrong one can be named afterwards.

    Args:
      group: the class of the options.
      values: a ConfigDict of them.
      keys: the option's dotted path, cut.
      text: its value as typed.
    """
    hint, is_open = group, False
    for i, key in enumerate(keys):
        is_open = hint is options.Pairs  # what is in it has no hints
        hint = typed.hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
        if i < len(keys) - 1:
            if not isinstance(values.get(key), ConfigDict):
                values[key] = ConfigDict()
            values = values[key]
    values[keys[-1]] = typed.word(text) if is_open else typed.read(hint, text)
