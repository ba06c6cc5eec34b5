"""Reading other people's configs: every option is understood, known to be harmless, or refused."""

import contextlib
import reprlib
from collections.abc import Mapping
from typing import Any

MOST = 10_000  # layers, or experts of one
SMALLEST = 1e-37  # in size, below which fp32 has few bits, or 0
LARGEST = 2**53  # of numbers; JSON's may have any size, or be infinite
HARMLESS = "_CLASS_"  # OLMo-core writes the name of each group's class


class Fields:
    """A group of options; what nobody has asked for when it is done is refused by name."""

    def __init__(self, values: Any, where: str):
        """Start with nothing read.

        Args:
          values: the group.
          where: its name, for errors, such as `config.json: model.block`.
        Raises:
          ValueError: if it is no group.
        """
        if not isinstance(values, Mapping):
            found = reprlib.repr(values)
            raise ValueError(f"{where}: found {found}, need a group of options")
        self.where = where
        self.name_of_class = str(values.get(HARMLESS, "")).rpartition(".")[2]
        self._left = {k: v for k, v in values.items() if v is not None and k != HARMLESS}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an option; null is as good as absent."""
        return self._left.pop(name, default)

    def need(self, name: str) -> Any:
        """The value of an option that must be there."""
        if name not in self._left:
            raise ValueError(f"{self.where}.{name} is missing")
        return self.take(name)

    def expect(self, name: str, *allowed: Any, default: Any) -> Any:
        """The value of an option that olmo_jax has in some values only.

        Args:
          name: of the option.
          allowed: its values here.
          default: what the original takes where nothing is said.
        """
        value = self.take(name, default)
        if value not in allowed:
            need = " or ".join(map(repr, allowed))
            found = reprlib.repr(value)
            raise ValueError(f"{self.where}.{name} is {found}; olmo_jax has only {need}")
        return value

    def number(self, name: str, kind: type, default: Any = None, most: float = LARGEST) -> Any:
        """The value of an option that is a positive number or a switch.

        Args:
          name: of the option.
          kind: bool, float or int.
          default: what the original takes where nothing is said, null too.
          most: above which it is no number of this.
        """
        value, problems = self.take(name, default), list[str]()
        if value is default:
            return value
        value = real(value) if kind is float else value
        value = number(f"{self.where}.{name}", value, kind, problems, most)
        if problems:
            raise ValueError(problems[0])
        return value

    def need_number(self, name: str, kind: type, most: float = LARGEST) -> Any:
        """The same where the option must be there."""
        return Fields({name: self.need(name)}, self.where).number(name, kind, most=most)

    def group(self, name: str) -> "Fields | None":
        """A group within the group."""
        values = self.take(name)
        return None if values is None else Fields(values, f"{self.where}.{name}")

    def ignore(self, *names: str) -> None:
        """Options that do not change the function."""
        for name in names:
            self.take(name)

    def done(self) -> None:
        """Refuse what is left."""
        for name, value in self._left.items():
            raise ValueError(
                f"{self.where}.{name} is {reprlib.repr(value)}; olmo_jax does not know this option,"
                " which may change the function"
            )


def real(value: Any) -> Any:
    """The number in a text such as YAML's 1e-5, which is none to PyYAML without a point."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def number(key: str, value: Any, kind: type, problems: list[str], most: float = LARGEST) -> Any:
    """A number, or a switch, of somebody's config, after a look at it.

    Args:
      key: its name there.
      value: what is there.
      kind: bool, float (positive) or int (positive).
      problems: takes a line if it is something else.
      most: above which it is no number of this.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = {
        bool: isinstance(value, bool),
        float: is_number and SMALLEST <= value <= most,
        int: is_number and 0 < value <= most and value == int(value),
    }
    words = {bool: "true or false", float: "a positive number", int: "a positive whole number"}
    if not right[kind]:
        problems.append(f"{key}={reprlib.repr(value)}: need {words[kind]}")
        return value
    return kind(value)


def odd_ids(ids: Mapping[str, Any]) -> list[str]:
    """A line for each special token that is neither a number, nor several, nor null.

    Args:
      ids: BOS, EOS and padding, by Hugging Face's names, and others.
    """
    found = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return [
        f"{key}={reprlib.repr(value)}: need a token's number"
        for key, value in found.items()
        if any(type(n) is not int for n in (value if isinstance(value, list) else [value]))
        and value is not None
    ]


def find(config: Any, *path: str) -> Any:
    """The value under nested keys; None where one of them is missing."""
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config
