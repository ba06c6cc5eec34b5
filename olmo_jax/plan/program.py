"""The training step, compiled for devices that are not here, and an estimate of its time.

The estimate is the compiler's own: cycles of its scheduler for each fusion, bundles of our kernels,
and bytes of collectives over the links of the torus. It has never been compared with a run of this
code on a TPU; see ERROR.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from olmo_jax import flops, sharding, step
from olmo_jax.config import Config, ModelConfig
from olmo_jax.plan import hlo, kernels
from olmo_jax.plan.chips import Slice

# The one public pair of figures: MaxText's recipe for tpu7x comes out at 47.7 % MFU by this method,
# and its authors report 44.5 % on 512 chips.
ERROR = "estimates of this kind are about 7 % too fast by the one public measurement to compare with"
_OUT_OF_MEMORY = re.compile(r"\(?([\d.]+[KMGT])\)? exceeds available (?:HBM|hbm) \(?([\d.]+[KMGT])")


class DoesNotFit(Exception):
    """The program needs more memory than a device has."""

    def __init__(self, needs: float, has: float):
        super().__init__(f"needs {needs / 2**30:.2f} GiB, a device has {has / 2**30:.2f} GiB")
        self.needs, self.has = needs, has


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs on one device.

    Attributes:
      memory: bytes by kind: parameters, moments, batch, temp, and the most that a device can give.
      flops: useful FLOPs of a step, of all devices (`olmo_jax.flops`).
      seconds: by kind of work. "products" and "other" are the compiler's cycles, "other_floor" the
        same where memory bandwidth is no excuse, "attention" our kernels, "collectives" all links.
      collectives: {kind over n devices: [times, bytes, seconds]}.
      compile_seconds: what the compiler took here.
    """

    memory: dict[str, float]
    flops: float
    seconds: dict[str, float]
    collectives: dict[str, tuple[float, float, float]]
    compile_seconds: float

    @property
    def step(self) -> float:
        """Seconds of a step by the compiler's cycles, the collectives hidden behind them."""
        s = self.seconds
        return max(s["products"] + s["other"] + s["attention"], s["collectives"])

    @property
    def fastest(self) -> float:
        """Seconds if memory-bound work runs at the bandwidth, and collectives are hidden."""
        s = self.seconds
        return max(s["products"] + s["other_floor"] + s["attention"], s["collectives"])

    @property
    def slowest(self) -> float:
        """Seconds if no collective is hidden."""
        s = self.seconds
        return s["products"] + s["other"] + s["attention"] + s["collectives"]


def lower(config: Config, mesh: Mesh) -> Any:
    """The training step on abstract arrays, as `jax.jit(…).lower` gives it."""
    shape = (config.data.global_batch_size // config.data.seq_len, config.data.seq_len)
    split = NamedSharding(mesh, sharding.spec(("batch", "seq")))
    names = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32}
    if config.data.document_mask != "none":
        names |= {"positions": jnp.int32, "segment_ids": jnp.int32}
    batch = {n: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for n, dtype in names.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state, update = step.abstract_state(config, mesh), step.make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        return update.jitted.lower(state, batch, scalar, scalar)  # type: ignore[attr-defined]


def compile_step(config: Config, mesh: Mesh, options: dict[str, str]) -> Any:
    """The compiled step.

    Raises:
      DoesNotFit: if it needs more memory than a device has.
    """
    try:
        return lower(config, mesh).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if found := _OUT_OF_MEMORY.search(str(error)):
            raise DoesNotFit(*(_size(text) for text in found.groups())) from error
        raise


def _size(text: str) -> float:
    return float(text[:-1]) * 2.0 ** (10 * ("KMGT".index(text[-1]) + 1))


def estimate(
    config: Config,
    where: Slice,
    mesh: Mesh,
    compiled: Any,
    attention_seconds: Callable[[kernels.Case], tuple[float, float]],
    compile_seconds: float,
) -> Plan:
    """What the compiled step needs, of memory and of time."""
    chip, memory = where.chip, compiled.memory_analysis()
    kinds = sorted(set(config.model.layer_kinds))  # as the model orders its branches
    shares = [config.model.layer_kinds.count(kind) / config.model.n_layers for kind in kinds]
    found = hlo.totals(
        compiled.as_text(), lambda n: shares if n == len(shares) else hlo.first_of_two(n)
    )
    places = [tuple(device.coords) for device in mesh.devices.flat]
    exchanged: dict[str, list[float]] = {}
    for collective, times in found.collectives.items():
        group = collective.devices or range(len(places))
        n, rate = len(group), where.exchange([places[i] for i in group])
        entry = exchanged.setdefault(f"{collective.kind} over {n}", [0.0, 0.0, 0.0])
        entry[0] += times
        entry[1] += times * collective.n_bytes
        entry[2] += times * _sent(collective.kind, collective.n_bytes, n) / rate
    sizes = flops.state_bytes(config.model, dict(mesh.shape), config.compute.grad_dtype)
    return Plan(
        memory={
            "parameters": sizes.params,
            "moments": sizes.moments,
            "batch": memory.argument_size_in_bytes - sizes.params - sizes.moments,
            "temp": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
            "available": chip.hbm,
        },
        flops=config.data.global_batch_size
        * flops.flops_per_token(config.model, config.data.seq_len),
        seconds={
            "products": found.cycles("products") / chip.clock,
            "other": found.cycles("other") / chip.clock,
            "other_floor": sum(
                min(cycles / chip.clock, 1.15 * moved / chip.bandwidth) * times
                for (kind, cycles, moved), times in found.fusions.items()
                if kind == "other"
            ),
            "attention": _attention(config, where, mesh, found.kernels, kinds, attention_seconds),
            "collectives": sum(entry[2] for entry in exchanged.values()),
        },
        collectives={name: tuple(entry) for name, entry in sorted(exchanged.items())},  # pyright: ignore
        compile_seconds=compile_seconds,
    )


def _sent(kind: str, n_bytes: float, n: int) -> float:
    """Bytes that a device sends so that `n` of them finish a collective over an array."""
    if kind == "collective-permute":
        return n_bytes
    return n_bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _attention(
    config: Config,
    where: Slice,
    mesh: Mesh,
    calls: collections.Counter,
    kinds: list[str],
    seconds: Callable[[kernels.Case], tuple[float, float]],
) -> float:
    """Seconds of the attention kernels of a step on one device."""
    m, tensor = config.model, mesh.shape["tensor"]
    rows = config.data.global_batch_size / config.data.seq_len / config.compute.accumulate
    rows /= math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    total = 0.0
    for key, times in calls.items():
        name, branch = (key, 0) if isinstance(key, str) else key
        if name not in kernels.NAMES:
            continue
        case = kernels.Case(
            where.name.split(":")[0], config.data.seq_len, m.n_heads // tensor,
            m.n_kv_heads // tensor, m.head_dim,
            m.window if kinds[branch] == "sliding" else None,
            int(config.data.document_mask != "none"),
        )  # fmt: skip
        total += times * rows * seconds(case)[kernels.NAMES.index(name)]
    return total
