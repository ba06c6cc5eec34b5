"""How text and plain values become options of the kinds that their hints ask for."""

import ast
import dataclasses
import difflib
import functools
import math
import os
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from olmo_jax.config.options import (
    INT64,
    LARGEST,
    SMALLEST,
    ConfigError,
    Location,
    Pairs,
    marked_hints,
    shown,
    unmarked,
)
from olmo_jax.config.renamed import RENAMED
from olmo_jax.files import brief

# --- from text ------------------------------------------------------------------------------------


def read(hint: Any, text: str) -> Any:
    """What was typed as the value of an option with this hint; the text itself where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    word = text.lower()
    if origin is Annotated:
        return read(args[0], text)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if word == "none" else read(args[0], text)
    if origin is tuple:
        words = [] if word == "none" else _words(text)
        each = args[:1] * len(words) if args[-1] is Ellipsis else args
        pairs = zip(each, words, strict=True)
        return tuple(read(h, w) for h, w in pairs) if len(each) == len(words) else text
    if origin is Literal and word == "none" in args:
        return word
    if hint is Pairs:
        return _group(text)
    if hint is bool:
        return {"true": True, "false": False}.get(word, text)
    if hint in (int, float):
        return _number(hint, text)
    return _group(text) if dataclasses.is_dataclass(hint) else text


def _number(hint: type, text: str) -> Any:
    for kind in (int, float) if hint is int else (float,):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def word(text: str) -> Any:
    """What was typed for an option without a hint: a number, true, false, none, or the text."""
    known = {"true": True, "false": False, "none": None}
    number = _number(int, text)
    return known.get(text.lower(), text) if number is text else number


def _group(text: str) -> Any:
    """One of several groups of options, such as `{"duration": 10, "end": 0.5}`."""
    if not text.startswith("{"):
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def _words(text: str) -> list[str]:
    """The words of a list such as `a,b`, `[a, b]` or `('a', 'b')`; lists in it stay together.

    A shell would take quotes and brackets away, so they need not be there.
    """
    inner = text.strip()
    if _is_wrapped(inner):
        inner = inner[1:-1]
    words = [word.strip() for word in _cut(inner)]
    is_quoted = lambda w: len(w) > 1 and w[0] == w[-1] and w[0] in "'\""  # noqa: E731
    return [word[1:-1] if is_quoted(word) else word for word in words if word]


def _is_wrapped(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "[(") - (c in "])")
        if not depth:
            return 0 < i == len(text) - 1
    return False


def _cut(text: str) -> list[str]:
    """The parts of a text between those commas that stand neither in brackets nor in quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and not parts[-1].strip():
            quote = c
        else:
            depth += (c in "[({") - (c in "])}")
            if c == "," and depth <= 0:
                parts.append("")
                continue
        parts[-1] += c
    return parts


# --- from values ----------------------------------------------------------------------------------


@functools.cache
def hints(group: Any) -> dict[str, Any]:
    """The hints of a group's options by name, with their kinds."""
    return {name: unmarked(hint) for name, hint in marked_hints(group).items()}


def build(group: Any, values: Any, path: str, problems: list[str]) -> Any:
    """A group of options from a mapping; `problems` gets a line for each wrong key or type."""
    if not hasattr(values, "items"):  # of a dict or a ConfigDict
        problems.append(f"{path}: expected a group of options, found {shown(values)}")
        return default(group)
    if "kinds" in vars(group):
        values = dict(values)
        group = _chosen(group, values, path, problems)
    known: dict[str, Any] = {}
    for name, value in typing.cast(Mapping[Any, Any], values).items():
        hint = hints(group).get(name)
        if hint is None:
            problems.append(f"{path}.{brief(str(name))}: {_unknown(group, str(name), path)}")
            continue
        before = len(problems)
        converted = convert(hint, value, f"{path}.{name}", problems)
        if len(problems) == before or dataclasses.is_dataclass(hint):
            known[name] = converted
    return group(**known)


def default(group: Any) -> Any:
    """A group of options at their defaults; of several classes, the first."""
    return next(iter(group.kinds().values()))() if "kinds" in vars(group) else group()


def _chosen(group: Any, values: dict[str, Any], path: str, problems: list[str]) -> Any:
    """The class that `values` ask for; what other classes have leaves them."""
    kinds = group.kinds()
    kind = values.setdefault("kind", next(iter(kinds)))
    if not isinstance(kind, str) or kind not in kinds:
        problems.append(f"{path}.kind: found {shown(kind)}, need one of {', '.join(kinds)}")
        values["kind"] = kind = next(iter(kinds))
    for name in [name for name in values if name not in hints(kinds[kind])]:
        owners = [other for other in kinds if name in hints(kinds[other])]
        if not owners:
            continue  # said as of any other group
        value = values.pop(name)  # a config file has the options of all kinds
        if _plain(value) != _plain(getattr(kinds[owners[0]](), name)):
            owned = f"an option of {path}.kind={' or '.join(owners)}"
            problems.append(f"{path}.{name}: {owned}, found kind={kind}")
    return kinds[kind]


def _plain(value: Any) -> Any:
    """A value of an option as a file or a ConfigDict may have it: with lists for tuples."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _unknown(group: Any, name: str, path: str) -> str:
    now = RENAMED.get(f"{path}.{name}".removeprefix("config."))
    if now is not None:
        return f"is now {now}"
    close = difflib.get_close_matches(name, hints(group), n=1)
    meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(hints(group))}"
    return f"unknown option; {meant}"


def convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as the type that `hint` asks for, paths expanded; or a line in `problems`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path, problems)
    if origin is Annotated:
        value = convert(args[0], value, path, problems)
        is_path = isinstance(args[1], Location) and isinstance(value, str)
        return os.path.expanduser(value) if is_path else value
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else convert(args[0], value, path, problems)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        if value is None and "none" in args:  # a file may say None
            return "none"
        problems.append(f"{path}: found {shown(value)}, need one of {', '.join(args)}")
        return value
    if origin is tuple:
        return _sequence(hint, value, path, problems)
    if hint is Pairs:
        return _pairs(value, path, problems)
    return _scalar(hint, value, path, problems)


def _pairs(value: Any, path: str, problems: list[str]) -> Any:
    if not hasattr(value, "items"):
        problems.append(f"{path}: expected options by name, found {shown(value)}")
        return Pairs()
    items: list[tuple[str, Any]] = sorted(value.items())
    for name, each in items:
        if not isinstance(each, (bool, int, float, str, type(None))):
            problems.append(f"{path}.{name}: found {shown(each)}, need a number, a word or none")
    return Pairs(items)


def _sequence(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    args = typing.get_args(hint)
    if isinstance(value, (tuple, list)):
        items = typing.cast(Sequence[Any], value)
        each = args[:1] * len(items) if args[-1] is Ellipsis else args
        if len(each) == len(items):
            pairs = enumerate(zip(each, items, strict=True))
            return tuple(convert(h, v, f"{path}[{i}]", problems) for i, (h, v) in pairs)
    problems.append(f"{path}: found {shown(value)}, need a list of {_name(hint)}")
    return value


def _scalar(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and type(value) is int and abs(value) <= INT64:  # such as a run called 2024
        return str(value)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: found {value!r}, need a finite number")
    elif not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{path}: found {shown(value)}, need {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    """The type of a hint in words, without kinds."""
    if typing.get_origin(hint) is Annotated:
        return _name(typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        return f"tuple[{', '.join('...' if a is ... else _name(a) for a in typing.get_args(hint))}]"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def value(hint: Any, text: Any, path: str) -> Any:
    """The value of an option with this hint that was typed as `text`, a tuple of texts for a list.

    Raises:
      ConfigError: with what is needed instead; `path` is its name.
    """
    problems: list[str] = []
    found = convert(hint, read(hint, text) if isinstance(text, str) else text, path, problems)
    problems += [] if problems else _problems(hint, found, path)
    if problems:
        raise ConfigError(problems)
    return found


# --- what a kind does not allow -------------------------------------------------------------------


def checked(group: Any, path: str) -> tuple[Any, dict[str, str]]:
    """The group with defaults for what its kind does not allow, and a line for each such option.

    Args:
      group: a dataclass of options, of the right types.
      path: its name in the lines.
    Returns: the group; lines by the names of the options, without the path.
    """
    changes: dict[str, Any] = {}
    lines: dict[str, str] = {}
    for name, hint in hints(type(group)).items():
        value = getattr(group, name)
        if dataclasses.is_dataclass(hint):
            changes[name], more = checked(value, f"{path}.{name}")
            lines |= {f"{name}.{key}": line for key, line in more.items()}
            continue
        found = next(_problems(hint, value, f"{path}.{name}"), None)
        if found is not None:
            changes[name] = getattr(type(group)(), name)
            lines[name] = found
    return dataclasses.replace(group, **changes), lines


def _problems(hint: Any, value: Any, path: str) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if dataclasses.is_dataclass(hint):  # one of several
        yield from checked(value, path)[1].values()
    elif origin in (types.UnionType, typing.Union):
        yield from (f"{line}, or none" for line in _problems(args[0], value, path))
    elif origin is tuple:
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        for i, (h, v) in enumerate(zip(each, value, strict=True)):
            yield from _problems(h, v, f"{path}[{i}]")
    elif isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        yield f"{path}={value}: need 0 or a size from {SMALLEST:g} to {LARGEST:g}, for float32"
    elif origin is Annotated and (need := args[1].problem(value)):
        yield f"{path}={shown(value)}: {need}"
