"""A plan in words: what `olmo_jax.plan` prints."""

import dataclasses
import sys
from collections.abc import Callable, Iterator

from olmo_jax.config.costs import GIB
from olmo_jax.config.data import DataConfig, batch_stages
from olmo_jax.config.model import MeshConfig, mesh_shape
from olmo_jax.config.run import Config, planned_devices, validate
from olmo_jax.config.training import TrainConfig
from olmo_jax.pods import analytic, estimate, gpus, search
from olmo_jax.pods.analytic import Machine
from olmo_jax.pods.chips import Slice
from olmo_jax.pods.compiled import PlanStore
from olmo_jax.pods.plan import OPTIMISM, Plan

_SHOWN = 8  # ranked plans
_COMPILED = f"""\
An estimate: nothing ran on such devices. Memory is what the compiler allotted. Time is made of its
scheduler's cycles, the instructions of the attention kernels, and bytes of collectives over the
links; the figure has collectives hidden behind the work. The range goes from memory-bound work at
the full bandwidth to no collective hidden and {OPTIMISM - 1:.0%} more: so much too fast was this
method for the one program with a public measurement (MaxText's on 512 chips of tpu7x)."""
_FORMULA = """\
A formula: nothing was compiled and nothing ran. FLOPs and bytes follow from shapes; the shares of
the peak that are reached are """
_OF_GPUS = """\
assumed. Official runs on H100, Olmo 3 7B on 512 and 32B on 1,024, had
0.65 and 0.78 of the speed that comes out here with collectives hidden, 0.78 and 0.93 without."""
_OF_TPUS = """\
those of other programs by the TPU compiler. Good for ranking; the
time and the temporary memory of a plan are known when it is compiled."""


def run(
    config: Config,
    machine: Slice | gpus.Nodes,
    store: PlanStore,
    *,
    n_compiles: int | None = None,
    price: float | None = None,
) -> int:
    """Plan a run, and print the plan.

    Where the batch grows, the plan is of the largest.

    Args:
      config: of the run.
      machine: where it is to run.
      store: of compiled programs.
      n_compiles: programs that a search for the best plan may compile; None: no search.
      price: of a chip and hour, for the cost of the run.
    Returns: 0, or 1 for a plan that does not fit.
    Raises:
      ConfigError: for a mesh or batch that cannot be.
      ValueError: for a slice that the TPU compiler does not know.
      RuntimeError: if the compiler fails.
    """
    n_devices = machine.n_devices if n_compiles is None else planned_devices(config.mesh)
    validate(config, n_devices)
    largest = max(size for _, size in batch_stages(config.data))
    data = dataclasses.replace(config.data, global_batch_size=largest)
    config = dataclasses.replace(config, data=data)
    if isinstance(machine, Slice):
        machine.devices()  # is there a compiler?
    if n_compiles is not None:
        return _search(config, machine, store, n_compiles, price)
    shape = mesh_shape(config.mesh, machine.n_devices)  # without a -1
    config = dataclasses.replace(config, mesh=MeshConfig(**shape))
    if isinstance(machine, gpus.Nodes):
        plan = analytic.predict(config, machine)
    else:
        found = compiler(machine, store)(config)
        if not isinstance(found, Plan):
            print(f"does not fit: needs {_size(found)}, a device has {_size(machine.chip.hbm)}")
            return 1
        plan = found
    print("\n".join(describe(config, machine, plan, price)))
    return 0 if plan.fits else 1


def parse(name: str) -> Slice | gpus.Nodes:
    """The machine of a name such as v5p:4x4x8 or h100:8x16.

    Raises:
      ValueError: if there is none.
    """
    if name.split(":")[0] in gpus.GPUS:
        return gpus.Nodes.parse(name)
    try:
        return Slice.parse(name)
    except ValueError as error:
        raise ValueError(f"{error}; or nodes of {', '.join(gpus.GPUS)}: h100:8x16") from error


def compiler(where: Slice, store: PlanStore) -> Callable[[Config], Plan | float]:
    """The plan of a config from its compiled step, or the bytes that it needs if it has no room."""

    def compile_(config: Config) -> Plan | float:
        program = store.kept(config, where)
        if program is None:
            what = search.overrides(config.mesh, config.compute)
            print(f"compiling, which may take minutes: {what}", file=sys.stderr, flush=True)
            program = store.make(config, where)
        if program.needs is not None:
            return program.needs
        mesh = where.mesh(config.mesh)
        return estimate.estimate(config, where, mesh, program, store.attention)

    return compile_


def _search(
    config: Config,
    machine: Slice | gpus.Nodes,
    store: PlanStore,
    n_compiles: int,
    price: float | None,
) -> int:
    compiled, lines = [], []
    if isinstance(machine, Slice) and n_compiles:
        compile_ = compiler(machine, store)

        def attempt(config: Config) -> Plan | float | None:
            try:
                return compile_(config)
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
                return None

        compiled, ranked = search.search(config, machine, attempt, n_compiles)
        if not compiled:
            lines = ["Nothing that was compiled fits; this is the next best, by formula.", ""]
    else:
        ranked = search.rank(config, machine)
    if not compiled and not ranked:
        sizes = [x.plan.total_memory for x in search.predictions(config, machine)]
        print(_nothing_fits(sizes, machine))
        return 1
    best = (compiled or ranked)[0]
    lines += [*describe(best.config, machine, best.plan, price), ""]
    if compiled:
        lines += ["compiled", *_table(compiled, machine), ""]
    corrected = ", corrected by what was compiled" if compiled else ""
    lines += [
        f"by formula{corrected}: the best of {len(ranked)} that fit, by the mean of step and serial"
    ]
    lines += [*_table(ranked[:_SHOWN], machine), "", "paste", f"  {best.overrides}"]
    print("\n".join(lines))
    return 0


def _nothing_fits(sizes: list[float], machine: Machine) -> str:
    if not sizes:
        return f"does not fit: no mesh of this config can be laid on {machine.name}"
    return (
        f"does not fit: the smallest of {len(sizes)} plans needs {_size(min(sizes))} by formula,"
        f" a device has {_size(machine.chip.hbm)}"
    )


def describe(config: Config, machine: Machine, plan: Plan, price: float | None) -> list[str]:
    """A plan, line by line.

    Args:
      config: with its mesh.
      machine: where.
      plan: of it.
      price: of a chip and hour.
    """
    shape = mesh_shape(config.mesh, machine.n_devices)
    d, tokens = config.data, config.data.global_batch_size
    ways = shape["data"] * shape["fsdp"] * shape["expert"]
    rows = tokens / d.seq_len / ways / config.compute.accumulate
    grows = " (the largest of config.data.batch_sizes)" if d.batch_sizes else ""
    lines = [
        f"{config.name} on {machine.name}: {machine.size}",
        _row("mesh", " x ".join(f"{axis} {n}" for axis, n in shape.items())),
        _row("batch", f"{tokens:,} tokens{grows} in rows of {d.seq_len:,};"
             f" {config.compute.accumulate} micro-batch(es) of {rows:g} row(s) for"
             f" {machine.n_devices // ways} device(s)"),
        _row("remat", config.compute.remat),
        _row("fits" if plan.fits else "does not fit", f"{_size(plan.total_memory)} of"
             f" {_size(plan.available)} on a device"),
        *(_row(f"  {kind}", f"{_size(n):>12}") for kind, n in plan.memory.items()),
        _row("  of temporary", f"{_size(plan.activations):>12} activations (by formula)"),
    ]  # fmt: skip
    if plan.fits:
        lines += [
            *_time(plan),
            *_speed(machine, plan, tokens, token_budget(config.train, d), price),
        ]
        lines += [*(_row("assumed", x) for x in plan.notes)]
    if plan.compile_seconds is not None:
        lines.append(_row("compiled", f"in {plan.compile_seconds:.0f} s"))
        return [*lines, "", _COMPILED]
    source = _OF_GPUS if isinstance(machine, gpus.Nodes) else _OF_TPUS
    return [*lines, "", _FORMULA + source]


def _time(plan: Plan) -> list[str]:
    return [
        _row("FLOPs", f"{plan.flops:.3e} useful on a device and step; done are {plan.done:.3e} in"
             " products, and attention's"),
        _row("step", f"{_ms(plan.step)} ({1e3 * plan.fastest:,.1f} to {1e3 * plan.slowest:,.1f})"),
        *(_row(f"  {kind}", _ms(s)) for kind, s in plan.seconds.items() if s),
        *_collectives(plan),
    ]  # fmt: skip


def _row(name: str, text: str) -> str:
    return f"{name:18}{text}"


def _size(n_bytes: float) -> str:
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:10,.1f} ms"


def _collectives(plan: Plan) -> Iterator[str]:
    for name, (times, n_bytes, seconds) in plan.collectives.items():
        yield f"    {name:28}{times:7,.0f} x {n_bytes / 1e9:9,.2f} GB {_ms(seconds)}"


def _speed(
    machine: Machine, plan: Plan, batch: int, budget: int | None, price: float | None
) -> Iterator[str]:
    each = batch / machine.n_devices
    low, high = each / plan.slowest, each / plan.fastest
    yield _row("speed", f"{each / plan.step:,.0f} tokens/s/device ({low:,.0f} to {high:,.0f})")
    mfu = plan.flops / machine.chip.peak
    yield _row(
        "MFU", f"{mfu / plan.step:.1%} ({mfu / plan.slowest:.1%} to {mfu / plan.fastest:.1%})"
    )
    if budget is None:
        yield _row("run", "as long as its data: the config names no number of tokens")
        return
    hours = budget / batch * plan.step / 3600
    chips = machine.n_devices // (2 if machine.chip.kind == "TPU7x" else 1)
    cost = "" if price is None else f", {hours * chips * price:,.0f} at {price:g} per chip and hour"
    yield _row("run", f"{budget / 1e9:,.1f}B tokens: {hours / 24:.1f} days, "
               f"{hours * chips:,.0f} chip-hours{cost}")  # fmt: skip


def token_budget(t: TrainConfig, d: DataConfig) -> int | None:
    """Tokens of the whole run; None where only the data tell, or the batch grows."""
    found = []
    for n, unit in ((t.duration, t.duration_unit), (t.hard_stop, t.hard_stop_unit)):
        if n is not None and unit == "tokens":
            found.append(n)
        elif n is not None and unit == "steps" and not d.batch_sizes:
            found.append(n * d.global_batch_size)
    return min(found, default=None)


def _table(plans: list[search.Candidate], machine: Machine) -> list[str]:
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    lines = ["".join(f"{name:>11}" for name in (*axes, "remat", "accumulate", "GiB", "step ms",
                                                "serial ms", "MFU"))]  # fmt: skip
    for config, plan in plans:
        cells = [*dataclasses.astuple(config.mesh), config.compute.remat, config.compute.accumulate]
        mfu = plan.flops / machine.chip.peak / plan.step
        cells += [f"{plan.total_memory / GIB:.2f}", f"{1e3 * plan.step:,.1f}",
                  f"{1e3 * plan.serial:,.1f}", f"{mfu:.1%}"]  # fmt: skip
        lines.append("".join(f"{x:>11}" for x in cells))
    return lines
