"""Reading other people's configs: every option is understood, known to be harmless, or refused."""

import reprlib
from collections.abc import Mapping
from typing import Any

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
            raise ValueError(f"{where}: found {values!r}, need a group of options")
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
            raise ValueError(f"{self.where}.{name} is {value!r}; olmo_jax has only {need}")
        return value

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
                f"{self.where}.{name} is {value!r}; olmo_jax does not know this option, which may"
                " change the function"
            )


def number(key: str, value: Any, kind: type, problems: list[str]) -> Any:
    """A number, or a switch, of somebody's config, after a look at it.

    Args:
      key: its name there.
      value: what is there.
      kind: bool, float (positive) or int (positive).
      problems: takes a line if it is something else.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = {
        bool: isinstance(value, bool),
        float: is_number and 0 < value < LARGEST,
        int: is_number and 0 < value < LARGEST and value == int(value),
    }
    words = {bool: "true or false", float: "a positive number", int: "a positive whole number"}
    if not right[kind]:
        problems.append(f"{key}={reprlib.repr(value)}: need {words[kind]}")
        return value
    return kind(value)
