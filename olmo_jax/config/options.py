"""Kinds of options, and what they bear on, for the hints of the dataclasses of `config/`.

How text and values become one of a kind is in `typed.py`, relations between several in `run.py`.
"""

import dataclasses
import enum
import re
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from olmo_jax.files import brief, is_address, path_problem

INT32, INT64 = 2**31 - 1, 2**63 - 1
SMALLEST, LARGEST = 1e-37, 3e38  # sizes that fp32 holds with all of its digits


class ConfigError(ValueError):
    """A config that cannot run; `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: list[str], rest: Any = None):
        super().__init__("\n".join(problems))
        self.problems = problems
        self.rest = rest  # the config with defaults for what could not be read

    @property
    def options(self) -> set[str]:
        """Names of the options that the lines are about, or that may have been meant."""
        pairs = re.findall(r"(\w+)(?:\[\d+\])*: |did you mean (\w+)\?", "\n".join(self.problems))
        return {name for pair in pairs for name in pair if name}


# --- what options bear on -------------------------------------------------------------------------


class Bears(enum.Flag):
    """What an option bears on; it stands in the hint, and an option without has its group's."""

    NOTHING = 0
    FUNCTION = enum.auto()  # what a trained model computes; a run that loads it may not change it
    STATE = enum.auto()  # what the state of the optimizer holds
    ORDER = enum.auto()  # which token comes when
    PROGRAM = enum.auto()  # the compiled step
    RECORDS = enum.auto()  # only what a run tells, and how fast it starts


def bearing(group: Any, on: Bears, groups: Bears = Bears.NOTHING) -> frozenset[str]:
    """Names of the options that bear on something, within a group and the groups in it.

    Args:
      group: the class.
      on: what the options bear on; NOTHING gives all names.
      groups: what the group itself bears on.
    """
    names: set[str] = set()
    for name, hint in marked_hints(group).items():
        marks = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Bears)]
        bears = marks[0] if marks else groups
        if dataclasses.is_dataclass(inner := unmarked(hint)):
            names |= {f"{name}.{inner_name}" for inner_name in bearing(inner, on, bears)}
        elif on in bears:
            names.add(name)
    return frozenset(names)


def marked_hints(group: Any) -> dict[str, Any]:
    """The hints of a group's options by name, with their kinds and what they bear on.

    Of a group with several classes (`kinds`) these are the options of all of them.
    """
    if "kinds" not in vars(group):
        return typing.get_type_hints(group, include_extras=True)
    hints: dict[str, Any] = {}
    for each in group.kinds().values():
        hints = typing.get_type_hints(each, include_extras=True) | hints
    return hints | {"kind": typing.get_type_hints(group, include_extras=True)["kind"]}


def unmarked(hint: Any) -> Any:
    """The hint of an option without what it bears on."""
    if typing.get_origin(hint) is not Annotated:
        return hint
    inner, *metadata = typing.get_args(hint)
    kinds = [m for m in metadata if not isinstance(m, Bears)]
    return Annotated[inner, *kinds] if kinds else inner


# --- kinds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def problem(self, value: float) -> str | None:
        """What is needed instead of `value`; None if it is in the range."""
        if self.low <= value <= self.high:
            return None
        return f"need a number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Location:
    """The path of a file or folder, in which a leading ~ is the home folder."""

    addresses: tuple[str, ...] = ()  # that may stand for one, as they look
    may_be_empty: bool = False

    def problem(self, value: str) -> str | None:
        """What is needed instead of `value`; None if it can be a path."""
        if not value.strip():
            return None if self.may_be_empty and not value else "need a path"
        if is_address(value):
            schemes = "|".join(address.split(":")[0] for address in self.addresses)
            if schemes and re.match(rf"({schemes})://[^/]", value):
                return None
            return " or ".join(["need a local path", *self.addresses])
        return path_problem(value)


@dataclass(frozen=True)
class Name:
    """What a run or a project may be called: a folder and a chart get this name."""

    def problem(self, value: str) -> str | None:
        """What is needed instead of `value`; None if it can be a name."""
        is_plain = value.strip() not in ("", ".", "..") and value[0] != "~" and "/" not in value
        if is_plain and value.isprintable() and len(value.encode()) <= 128:
            return None
        return "need a plain name of at most 128 bytes, no path"


class Pairs(tuple[tuple[str, Any], ...]):
    """Options that are not ours: (name, value) by name; those who set them see a mapping."""

    __slots__ = ()


Count = Annotated[int, Range(1, INT32)]
Natural = Annotated[int, Range(0, INT32)]
Units = Annotated[int, Range(0, INT64)]  # steps or tokens
SomeUnits = Annotated[int, Range(1, INT64)]
RowLength = Annotated[int, Range(2, INT32)]  # tokens; the first has nothing that predicts it
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(SMALLEST, LARGEST)]
NonNegative = Annotated[float, Range(0.0, LARGEST)]
Share = Annotated[float, Range(0.0, 1.0)]
File = Annotated[str, Location()]
Folder = Annotated[str, Location(("gs://BUCKET/…",))]
# Or an id on the Hugging Face Hub.
Checkpoint = Annotated[str, Location(("gs://BUCKET/…", "https://HOST/…"))]
RunName = Annotated[str, Name()]


def shown(value: Any) -> str:
    """The value as Python writes it, on one line that is not long."""
    try:
        return brief(" ".join(repr(value).split()))
    except Exception:  # of the value's own code; or an int of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"
