"""What files of others say, read strictly: whatever is wrong is one line with the file."""

import json
from typing import Any, NoReturn

DEEPEST = 100  # groups within groups; Python's own limit depends on its version and on the caller


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      data: the file's bytes.
      where: the file, for errors.
    Raises:
      ValueError: if it is not UTF-8, no JSON, no object, nested too deeply, says a key twice,
        NaN or a number that no file has: readers differ on these, so that two of them see two
        things in one file.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_without_twins,
            parse_constant=_refuse_constant,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    groups: list[Any] = [value]
    for _ in range(DEEPEST):
        values = [v for g in groups for v in (g.values() if isinstance(g, dict) else g)]
        groups = [v for v in values if isinstance(v, (dict, list))]
    if groups:
        raise ValueError(_too_deep(where))
    return value


def is_inside(name: Any) -> bool:
    """Whether this is the name of a file in a folder or below it, on every operating system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not set(name) & set(":\\")
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _too_deep(where: str) -> str:
    return f"{where} is damaged: more than {DEEPEST} groups within each other"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in values if keys.count(k) > 1)!r} is there twice")
    return values


def _integer(text: str) -> int:
    if len(text) > 20:  # of 64 bits, with a sign
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
