"""How long a compiled step takes on a slice of TPUs: the compiler's own figures, put together.

Cycles of the scheduler for fusions; bundles of our attention kernels; the bandwidth of the memory
for other kernels; bytes over the links of the torus for collectives.
"""

from collections.abc import Callable

from jax.sharding import Mesh

from olmo_jax.config import costs
from olmo_jax.config.data import DataConfig
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.run import Config
from olmo_jax.nn import rope
from olmo_jax.pods import analytic, hlo, kernels
from olmo_jax.pods.chips import Chip, Slice
from olmo_jax.pods.compiled import Program
from olmo_jax.pods.plan import Plan

Seconds = Callable[[kernels.Case], tuple[float, float]]
_HEADS = 4  # of keys, for which kernels are compiled: a time for one is the same for any number
_ABOVE_FLOOR = 1.15  # what memory-bound work takes, in terms of its bytes at the full bandwidth


def estimate(
    config: Config, where: Slice, mesh: Mesh, program: Program, seconds_of: Seconds
) -> Plan:
    """What a program that fits needs, of memory and of time.

    Args:
      config: of the step.
      where: the slice that it was compiled for.
      mesh: over its devices.
      program: the compiled step.
      seconds_of: of the attention kernels for a row (`kernels.seconds`).
    """
    work = analytic.Work.of(config.model, config.compute, config.mesh, config.data)
    chip, kinds = where.chip, rope.kinds(config.model)  # as the model has its branches
    shares = [config.model.layer_kinds.count(kind) / config.model.n_layers for kind in kinds]
    totals = hlo.totals(program.text, lambda n: shares if n == len(shares) else hlo.first_of_two(n))
    exchanged = _collectives(totals, where, mesh)
    other, experts, notes = _kernels(totals, chip)
    attention, more = _attention(config.model, config.data, where, mesh, totals, kinds, seconds_of)
    sizes = costs.state_bytes(config.model, dict(mesh.shape), config.compute.grad_dtype)
    return Plan(
        memory={
            "parameters": sizes.params,
            "moments": sizes.moments,
            "batch": max(0.0, program.memory["argument"] - sizes.params - sizes.moments),
            "temporary": program.memory["temp"],
            "program": program.memory["generated_code"],
        },
        available=chip.hbm,
        activations=analytic.kept_bytes(work, dict(mesh.shape)),
        flops=analytic.useful_flops(work) / where.n_devices,
        done=totals.flops,
        seconds={
            "products": totals.cycles(True) / chip.clock,
            "other": totals.cycles(False) / chip.clock,
            "attention": attention,
            "experts": experts,
            "kernels": other,
            "collectives": sum(seconds for _, _, seconds in exchanged.values()),
        },
        other_floor=sum(
            times * min(f.cycles / chip.clock, _ABOVE_FLOOR * f.n_bytes / chip.bandwidth)
            for f, times in totals.fusions.items()
            if not f.has_products
        ),
        collectives=exchanged,
        exposed=sum(x[2] for name, x in exchanged.items() if _is_waited_for(name, mesh)),
        notes=(*notes, *more),
        compile_seconds=program.seconds,
    )


def _collectives(
    found: hlo.Totals, where: Slice, mesh: Mesh
) -> dict[str, tuple[float, float, float]]:
    places = [tuple(device.coords) for device in mesh.devices.flat]
    total: dict[str, tuple[float, float, float]] = {}
    for collective, times in found.collectives.items():
        group = collective.devices or range(len(places))
        rate = where.exchange([places[i] for i in group])
        took = times * analytic.sent(collective.kind, collective.n_bytes, len(group)) / rate
        name = f"{collective.kind} over {len(group)}"
        n, n_bytes, seconds = total.get(name, (0.0, 0.0, 0.0))
        total[name] = (n + times, n_bytes + times * collective.n_bytes, seconds + took)
    return dict(sorted(total.items()))


def _is_waited_for(name: str, mesh: Mesh) -> bool:
    kind, _, size = name.partition(" over ")
    of_tensor = int(size) == mesh.shape["tensor"] and kind != "collective-permute"
    return of_tensor or kind.endswith("all-to-all")


def _kernels(found: hlo.Totals, chip: Chip) -> tuple[float, float, tuple[str, ...]]:
    """Seconds of kernels bound by memory, seconds of experts' products, and what that assumes."""
    bound = {k: n for k, n in found.kernels.items() if k.name not in kernels.NAMES}
    experts = sum(n * k.flops for k, n in bound.items())
    rest = {k: n for k, n in bound.items() if not k.flops}
    seconds = sum(n * _ABOVE_FLOOR * k.n_bytes / chip.bandwidth for k, n in rest.items())
    notes = []
    if experts:
        notes.append("products of experts: as fast as other products, loads balanced")
    if names := sorted({k.name for k in rest}):
        notes.append(f"kernels bound by the memory's bandwidth: {', '.join(names)}")
    return seconds, experts / (chip.peak * analytic.START[chip.kind].products), tuple(notes)


def _attention(
    m: ModelConfig,
    data: DataConfig,
    where: Slice,
    mesh: Mesh,
    found: hlo.Totals,
    kinds: list[str],
    seconds_of: Seconds,
) -> tuple[float, tuple[str, ...]]:
    """Seconds of our attention kernels in a step of a device, and what that assumes.

    A layer has a backward pass and, if it is computed again, two forward passes: how often is in
    the program. Over `context` the pairs of a row are divided evenly.
    """
    calls = [sum(n for k, n in found.kernels.items() if k.name == name) for name in kernels.NAMES]
    if not calls[1]:
        return 0.0, ("attention: XLA's, among the products",)
    again, total, notes = calls[0] / calls[1], 0.0, ()
    rows = data.global_batch_size / data.seq_len
    rows /= analytic.token_ways(dict(mesh.shape))
    for kind in kinds:
        case = kernels.Case(
            where.name.split(":")[0], data.seq_len, _HEADS * m.n_heads // m.n_kv_heads,
            _HEADS, m.head_dim, m.window if kind == "sliding" else None,
            int(data.document_mask != "none"),
        )  # fmt: skip
        try:
            forward, backward = seconds_of(case)
        except RuntimeError as error:
            forward, backward = analytic.attention_seconds(case, where.chip)
            notes = (f"attention: at the usual share of the chip's peak, since {error}",)
        heads = m.n_kv_heads / mesh.shape["tensor"] / _HEADS
        layers = m.layer_kinds.count(kind)
        total += rows * layers * heads * (again * forward + backward)
    return total, notes
