"""What a compiled TPU program does in a step: cycles, products, kernels, collectives.

`cost_analysis()` of a program counts the body of a loop once and a kernel not at all. Here the
text of the program is walked from its entry: bodies of loops count as often as they run, branches
of a conditional by weight. A fusion or a call carries the cycles that the compiler's scheduler
expects, `estimated_cycles`; what is inside of it is not added again.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from olmo_jax.training.program import COLLECTIVES

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_NO_MODEL = 2**50  # the scheduler writes a huge number where it has no estimate
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota", "add-dependency",
}  # fmt: skip


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    result: str  # its shapes, as written
    opcode: str
    operands: tuple[str, ...]
    line: str


class Fusion(NamedTuple):
    """Something that the scheduler has an estimate for."""

    has_products: bool
    cycles: int
    n_bytes: float  # read and written


class CustomCall(NamedTuple):
    """A custom kernel, of which the scheduler knows nothing."""

    name: str
    n_bytes: float  # read and written
    flops: float  # of a grouped product; 0: not known here


class Collective(NamedTuple):
    """What one device sends or takes part in."""

    kind: str
    n_bytes: int  # of the whole array: what is gathered, reduced or exchanged
    devices: tuple[int, ...]  # of a group, by place in the mesh; (): all


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of one device and step: how often each thing occurs.

    Attributes:
      fusions: {Fusion: times}.
      kernels: {CustomCall: times}.
      collectives: {Collective: times}.
      flops: of matrix products outside kernels.
    """

    fusions: collections.Counter
    kernels: collections.Counter
    collectives: collections.Counter
    flops: float

    @classmethod
    def none(cls) -> "Totals":
        """Nothing yet."""
        return cls(collections.Counter(), collections.Counter(), collections.Counter(), 0.0)

    def cycles(self, has_products: bool | None = None) -> float:
        """The scheduler's sum, of fusions with or without products, or (None) of all."""
        return sum(
            fusion.cycles * times
            for fusion, times in self.fusions.items()
            if has_products in (None, fusion.has_products)
        )

    def plus(self, more: "Totals", times: float = 1) -> "Totals":
        """With `more` counted `times` times; the counters of this one are changed."""
        for name in ("fusions", "kernels", "collectives"):
            for key, n in getattr(more, name).items():
                getattr(self, name)[key] += n * times
        return dataclasses.replace(self, flops=self.flops + more.flops * times)


def totals(text: str, weights: Callable[[int], Iterable[float]] | None = None) -> Totals:
    """Walk an optimized program.

    Args:
      text: `compiled.as_text()`.
      weights: share of each of n branches, for a conditional with n; default: the first
        of two is taken always, others equally often.

    Raises:
      ValueError: if the text is no program.
    """
    program = _Program(text)
    return Totals.none().plus(program.walk(program.entry, weights or first_of_two))


def first_of_two(n: int) -> list[float]:
    """Shares of n branches where nothing is known about them."""
    return [1.0, 0.0] if n == 2 else [1 / n] * n


class _Program:
    """The computations of a program, each a list of instructions."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line):
                current = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
                current.append(_instruction(found[1], found[2]))
        if not self.entry:
            raise ValueError("no HLO program: there is no ENTRY")
        self.walk = functools.cache(self._walk)

    def _walk(self, name: str, weights: Callable[[int], Iterable[float]]) -> Totals:
        total, body = Totals.none(), self.computations[name]
        shapes = {i.name: i.result for i in body}
        for i in body:
            if i.opcode == "while":
                condition, inner = _named(i.line, "condition"), _named(i.line, "body")
                total = total.plus(self.walk(inner, weights), self._trips(condition))
            elif i.opcode == "conditional":
                names = _branches(i.line)
                for branch, share in zip(names, weights(len(names)), strict=True):
                    total = total.plus(self.walk(branch, weights), share)
            else:
                total = self._with(total, i, shapes)
                if (inside := self._called(i)) is not None:
                    part = self.walk(inside, weights)
                    if i.opcode == "fusion":  # its own figure stands for all that is in it
                        part = dataclasses.replace(part, fusions=collections.Counter())
                    if inside.startswith("all-reduce-scatter"):
                        part = dataclasses.replace(part, collectives=_scattered(part.collectives))
                    total = total.plus(part)
        return total

    def _with(self, total: Totals, i: Instruction, shapes: dict[str, str]) -> Totals:
        """`total` with one instruction, without what is inside of it."""
        moved = sum(n_bytes(shapes.get(o, "")) for o in i.operands) + n_bytes(i.result)
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            total.collectives[self._collective(kind, i, shapes)] += 1
        elif 'custom_call_target="tpu_custom_call"' in i.line:
            name = re.sub(r"[.\d]+$", "", i.name)
            total.kernels[CustomCall(name, moved, _grouped_flops(name, i, shapes))] += 1
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.line)
        if i.opcode not in _FREE and cycles is not None and int(cycles[1]) < _NO_MODEL:
            inside = self._called(i)
            has_products = i.opcode in ("convolution", "dot") or (
                inside is not None and self.walk(inside, first_of_two).flops > 0
            )
            total.fusions[Fusion(has_products, int(cycles[1]), moved)] += 1
        return dataclasses.replace(total, flops=total.flops + self._flops(i, shapes))

    def _called(self, i: Instruction) -> str | None:
        """The computation that stands inside an instruction and runs once with it."""
        if i.opcode not in ("fusion", "call", "call-start", "async-start", "custom-call"):
            return None
        found = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", i.line)
        return found[1] if found and found[1] in self.computations else None

    def _flops(self, i: Instruction, shapes: dict[str, str]) -> float:
        """2 m n k of a product `[m, k] x [k, n]`: twice the root of the three sizes' product.

        A dimension that all three have, of a batch, is in that product three times and not twice.
        """
        if i.opcode not in ("convolution", "dot"):
            return 0.0
        arrays = [dims(x) for x in (i.result, *(shapes[o] for o in i.operands[:2]))]
        sizes = math.prod(n for array in arrays for n in array)
        return 2.0 * math.sqrt(sizes / _batch(i, arrays[1]))

    def _collective(self, kind: str, i: Instruction, shapes: dict[str, str]) -> Collective:
        taken = sum(n_bytes(shapes.get(o, "")) for o in i.operands)
        given = n_bytes(i.result)
        if kind == "ragged-all-to-all":  # one side is a buffer with room for more than travels
            taken = given = min(given, n_bytes(shapes.get(i.operands[0], "")))
        if i.opcode.endswith("-start"):  # the result holds the operand too
            given -= taken if kind != "all-reduce" else 0
        return Collective(kind, round(max(taken, given)), group(i.line))

    def _trips(self, condition: str) -> int:
        """How often a loop runs: the bound that its condition compares with."""
        found = re.findall(
            r"constant\((\d+)\)", "\n".join(i.line for i in self.computations[condition])
        )
        return max(map(int, found), default=1)


def _instruction(name: str, text: str) -> Instruction:
    result = _result(text)
    rest = text[len(result) :].strip()
    opcode, _, arguments = rest.partition("(")
    operands = re.findall(r"%([\w.\-]+)", arguments.split(")", 1)[0])
    return Instruction(name, result, opcode, tuple(operands), text)


def _result(text: str) -> str:
    """The shapes before the opcode: one word, or a tuple in brackets."""
    if not text.startswith("("):
        return text.split(" ", 1)[0]
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: at + 1]
    return text


def _named(line: str, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", line)
    if found is None:
        raise ValueError(f"no HLO program: {attribute} is missing in {line[:80]!r}")
    return found[1]


def _batch(i: Instruction, left: list[int]) -> int:
    """Products that are done beside each other; a convolution has them as strides in its window."""
    if i.opcode == "dot":
        found = re.search(r"lhs_batch_dims=\{([\d,]*)\}", i.line)
        return math.prod(left[n] for n in _numbers(found[1])) if found else 1
    sizes, dilated = (
        _numbers(found[1])
        if (found := re.search(rf"window=\{{.*?\b{name}=([\dx]+)", i.line))
        else []
        for name in ("size", "lhs_dilate")
    )
    return math.prod(n for n, m in zip(sizes, dilated, strict=False) if n == m)


def _branches(line: str) -> list[str]:
    """The computations of a conditional."""
    if taken := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"[\w.\-]+", taken[1].replace("%", ""))
    return [_named(line, f"{x}_computation") for x in ("true", "false")]


def _scattered(inside: collections.Counter) -> collections.Counter:
    """The collectives in a fusion that keeps a part of an all-reduce, as what they are."""
    return collections.Counter(
        {key._replace(kind="reduce-scatter"): times for key, times in inside.items()}
    )


def _grouped_flops(name: str, i: Instruction, shapes: dict[str, str]) -> float:
    """Of `lax.ragged_dot` and megablox' `tgmm`: two arrays of `[rows, …]`, one of matrices."""
    if not name.startswith(("ragged-dot-", "tgmm")) or name == "ragged-dot-metadata":
        return 0.0
    floats = (x for x in (i.result, *(shapes[o] for o in i.operands)) if re.match(r"\w*f\d+\[", x))
    rows = [dims(x) for x in floats if len(dims(x)) == 2]
    return 2.0 * rows[0][0] * rows[0][1] * rows[1][1] if len(rows) == 2 else 0.0


def dims(shape: str) -> list[int]:
    """The dimensions of the first array in `shape`."""
    found = _SHAPE.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def n_bytes(shape: str) -> float:
    """The bytes of all arrays in `shape`."""
    return sum(
        _BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _SHAPE.findall(shape)
    )


def group(line: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in the ways in which XLA writes groups.

    `{{0,1},{2,3}}`; `[groups,size]<=[shape]T(order)`: the devices in that shape, turned and cut
    into groups; `mesh['a'=4,'b'=2], device_ids=([shape]T(order)) {'b'}`: along axes of a mesh, of
    devices that may be turned first. Empty for all devices.
    """
    if groups := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line
    ):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", groups[1])}
        used = re.findall(r"'(\w+)'", groups[3])
        devices = _turned(groups[2]) if groups[2] else np.arange(math.prod(sizes.values()))
        first = tuple(slice(None) if name in used else 0 for name in sizes)
        return _sorted(devices.reshape(list(sizes.values()))[first])
    if groups := re.search(r"replica_groups=\[([\d,]*)\]<=(\[[\d,]*\](?:T\([\d,]*\))?)", line):
        return _sorted(_turned(groups[2])[: int(groups[1].split(",")[-1])])
    groups = re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}", line)
    return _sorted(np.array(_numbers(groups[1]), int)) if groups else ()


def _turned(text: str) -> np.ndarray:
    """The devices of `[shape]T(order)` in their order."""
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return devices.transpose(_numbers(order) if order else None).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _sorted(devices: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(int(n) for n in devices.reshape(-1)))
