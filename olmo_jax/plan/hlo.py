"""What a compiled TPU program does in a step: the compiler's cycles, products, kernels, collectives.

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

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_NO_MODEL = 2**50  # the scheduler writes a huge number where it has no estimate
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute",
)  # fmt: skip
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


class Collective(NamedTuple):
    """What one device sends or takes part in."""

    kind: str
    n_bytes: int  # of the whole array: what is gathered, reduced or exchanged
    devices: tuple[int, ...]  # of a group, by place in the mesh


@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts of one device and step.

    Attributes:
      fusions: {(class, cycles, bytes moved): times}; class is "products" or "other".
      flops: of matrix products outside kernels.
      kernels: {name: calls}, and for kernels in branches {(name, branch): calls}.
      collectives: {Collective: times}.
    """

    fusions: collections.Counter
    flops: float
    kernels: collections.Counter
    collectives: collections.Counter

    def cycles(self, *classes: str) -> float:
        """The scheduler's sum for these classes; all without."""
        keys = self.fusions if not classes else [k for k in self.fusions if k[0] in classes]
        return sum(key[1] * self.fusions[key] for key in keys)


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
    total = Totals(collections.Counter(), 0.0, collections.Counter(), collections.Counter())
    return _scaled_sum(total, program.walk(program.entry, weights or first_of_two))


def first_of_two(n: int) -> list[float]:
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
        total = Totals(collections.Counter(), 0.0, collections.Counter(), collections.Counter())
        body = self.computations[name]
        shapes = {i.name: i.result for i in body}
        for i in body:
            if i.opcode == "while":
                condition, inner = _named(i.line, "condition"), _named(i.line, "body")
                total = _scaled_sum(total, self.walk(inner, weights), self._trips(condition))
            elif i.opcode == "conditional":
                taken = re.search(r"branch_computations=\{([^}]*)\}", i.line)
                names = (
                    re.findall(r"[\w.\-]+", taken[1].replace("%", ""))
                    if taken
                    else [_named(i.line, f"{x}_computation") for x in ("true", "false")]
                )
                for at, (branch, share) in enumerate(zip(names, weights(len(names)), strict=True)):
                    part = self.walk(branch, weights)
                    kernels = collections.Counter(
                        {(k, at) if isinstance(k, str) else k: n for k, n in part.kernels.items()}
                    )
                    total = _scaled_sum(total, dataclasses.replace(part, kernels=kernels), share)
            else:
                self._add(total, i, shapes)
                inside = self._called(i)
                total = dataclasses.replace(total, flops=total.flops + self._flops(i, shapes))
                if inside is not None:
                    part = self.walk(inside, weights)
                    if i.opcode == "fusion":  # its own figure stands for all that is in it
                        part = dataclasses.replace(part, fusions=collections.Counter())
                    total = _scaled_sum(total, part)
        return total

    def _add(self, total: Totals, i: Instruction, shapes: dict[str, str]) -> None:
        kind = i.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            total.collectives[self._collective(kind, i, shapes)] += 1
        elif 'custom_call_target="tpu_custom_call"' in i.line:
            total.kernels[re.sub(r"[.\d]+$", "", i.name)] += 1
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.line)
        if i.opcode in _FREE or cycles is None or int(cycles[1]) >= _NO_MODEL:
            return
        inside = self._called(i)
        has_products = i.opcode in ("convolution", "dot") or (
            inside is not None and self.walk(inside, first_of_two).flops > 0
        )
        moved = sum(n_bytes(shapes.get(o, "")) for o in i.operands) + n_bytes(i.result)
        total.fusions["products" if has_products else "other", int(cycles[1]), moved] += 1

    def _called(self, i: Instruction) -> str | None:
        """The computation that stands inside an instruction and runs once with it."""
        if i.opcode not in ("fusion", "call", "async-start", "custom-call"):
            return None
        found = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", i.line)
        return found[1] if found and found[1] in self.computations else None

    def _flops(self, i: Instruction, shapes: dict[str, str]) -> float:
        """2 m n k of a product `[m, k] x [k, n]`: twice the root of the three sizes' product."""
        if i.opcode not in ("convolution", "dot"):
            return 0.0
        sizes = [math.prod(dims(x)) for x in (i.result, *(shapes[o] for o in i.operands[:2]))]
        return 2.0 * math.sqrt(math.prod(sizes))

    def _collective(self, kind: str, i: Instruction, shapes: dict[str, str]) -> Collective:
        taken = sum(n_bytes(shapes.get(o, "")) for o in i.operands)
        given = n_bytes(i.result)
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


def _scaled_sum(a: Totals, b: Totals, times: float = 1) -> Totals:
    """`a` with `b` counted `times` times; the counters of `a` are changed."""
    for into, more in ((a.fusions, b.fusions), (a.kernels, b.kernels)):
        for key, n in more.items():
            into[key] += n * times
    for key, n in b.collectives.items():
        a.collectives[key] += n * times
    return dataclasses.replace(a, flops=a.flops + b.flops * times)


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
    into groups; `mesh['a'=4,'b'=2] {'b'}`: along axes of a mesh, whose devices may be given as
    `device_ids=([shape]T(order))`. Empty for all devices.
    """
    found = re.search(
        r"(?:replica_groups|source_target_pairs)="
        r"(?:(mesh\[[^{]*\{[^}]*\})|(\[[\d,]*\])<=(\[[\d,]*\](?:T\([\d,]*\))?)|(\{\{[^}]*\}))",
        line,
    )
    if found is None:
        return ()
    mesh, cut, order, listed = found.groups()
    if listed:
        return tuple(sorted(map(int, re.findall(r"\d+", listed))))
    if cut:
        return tuple(sorted(_turned(order).reshape(-1, _integers(cut)[-1])[0].tolist()))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    shape, used = list(map(int, sizes.values())), re.findall(r"'(\w+)'", mesh.split("{")[1])
    given = re.search(r"device_ids=\(([^{]*)\) \{", mesh)
    devices = _turned(given[1]) if given else np.arange(math.prod(shape))
    along = tuple(slice(None) if axis in used else 0 for axis in sizes)
    return tuple(sorted(devices.reshape(shape)[along].ravel().tolist()))


def _turned(text: str) -> np.ndarray:
    """Devices in the order that `[shape]T(axes)` says."""
    shape, _, axes = text.partition("T")
    devices = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return devices.transpose(_integers(axes) or None).ravel()


def _integers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
