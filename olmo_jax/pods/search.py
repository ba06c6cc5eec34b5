"""The best mesh, remat policy and number of micro-batches for a config on a machine.

All plans that the config allows are ranked by formula (`analytic`). As layers are scanned, a
program of one layer takes as long to compile as the whole; so the model is calibrated on whole
programs: the best plan is compiled, the formula corrected by what its program shows, the plans are
ranked again, and so on, a few times. The best of what was compiled is the answer.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from olmo_jax.config.model import ComputeConfig, MeshConfig, divisors
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config, validate
from olmo_jax.pods import analytic
from olmo_jax.pods.analytic import Corrections, Machine
from olmo_jax.pods.chips import NoSuchMeshError
from olmo_jax.pods.plan import Plan

_REMAT = ("none", "qkv_mlp", "qkv", "attention", "full")  # offload: only by hand
_LONG = 16_384  # rows from this length on may be split over `context`
_MARGIN = 0.97  # of a device's memory that a prediction may fill


class Candidate(NamedTuple):
    """A config and what it is expected to need."""

    config: Config
    plan: Plan

    @property
    def overrides(self) -> str:
        """What to put on the command line for it."""
        return overrides(self.config.mesh, self.config.compute)


def rank(
    config: Config, machine: Machine, corrections: Corrections | None = None
) -> list[Candidate]:
    """All plans that fit, the fastest first; collectives count as hidden by half.

    Raises:
      ConfigError: if no mesh is one for this config.
    """
    found = predictions(config, machine, corrections)
    found = [x for x in found if x.plan.total_memory <= _MARGIN * x.plan.available]
    # Of equals the one with more room: a full device counts as one percent of time.
    share = lambda plan: plan.total_memory / plan.available  # noqa: E731
    return sorted(found, key=lambda x: expected(x.plan) * (1 + 0.01 * share(x.plan)))


def predictions(
    config: Config, machine: Machine, corrections: Corrections | None = None
) -> Iterator[Candidate]:
    """What each candidate needs by formula."""
    for each in candidates(config, machine):
        try:
            yield Candidate(each, analytic.predict(each, machine, corrections))
        except NoSuchMeshError:
            continue


def expected(plan: Plan) -> float:
    """Seconds of a step between all collectives hidden and none."""
    return (plan.step + plan.serial) / 2


def search(
    config: Config, machine: Machine, compile_: Callable[[Config], Plan | float | None], times: int
) -> tuple[list[Candidate], list[Candidate]]:
    """Compile the most promising plans, correcting the ranking by each.

    Args:
      config: whose mesh, remat policy and micro-batches are free.
      machine: where.
      compile_: gives the plan of a compiled config, or the bytes that it needs if it does not fit,
        or None if the compiler fails.
      times: programs to compile at most.

    Returns:
      What was compiled and fits, and all that fits by formula; each the fastest first.
    Raises:
      ConfigError: if no mesh is one for this config.
    """
    fix: Corrections = {}
    compiled: dict[str, Candidate] = {}
    refused: set[str] = set()
    for _ in range(times):
        ranked = rank(config, machine, fix)
        best = next((x for x in ranked if x.overrides not in refused | {*compiled}), None)
        if best is None:
            break
        if compiled and expected(best.plan) > min(expected(x.plan) for x in compiled.values()):
            break  # nothing better is expected any more
        name, found = best.overrides, compile_(best.config)
        if isinstance(found, Plan):
            compiled[name] = Candidate(best.config, found)
            fix = analytic.corrected(fix, best.plan, found)
        else:
            refused.add(name)
        if isinstance(found, float):
            more = found / best.plan.total_memory
            fix = fix | {"temporary": fix.get("temporary", 1.0) * max(1.1, more)}
    ranked = [x for x in rank(config, machine, fix) if x.overrides not in refused]
    return sorted(compiled.values(), key=lambda x: expected(x.plan)), ranked


def overrides(mesh: MeshConfig, compute: ComputeConfig) -> str:
    """What to put on the command line for this plan."""
    words = [f"--config.mesh.{axis}={n}" for axis, n in dataclasses.asdict(mesh).items()]
    words.append(f"--config.compute.remat={compute.remat}")
    words.append(f"--config.compute.accumulate={compute.accumulate}")
    return " ".join(words)


def candidates(config: Config, machine: Machine) -> Iterator[Config]:
    """Every plan that the config's shapes allow on so many devices.

    Raises:
      ConfigError: if there is none: what is wrong with the first.
    """
    n, is_any, wrong = machine.n_devices, False, None
    rows = config.data.global_batch_size // config.data.seq_len
    is_dense = not config.model.n_experts
    policies = [x for x in _REMAT if is_dense or x != "qkv_mlp"]  # experts have no such names
    for mesh in _meshes(config.mesh, config.data.seq_len, not is_dense, n):
        for micro in divisors(rows // (mesh.data * mesh.fsdp * mesh.expert)) or [1]:
            one = dataclasses.replace(config, mesh=mesh).changed("compute", accumulate=micro)
            try:
                validate(one, n)
            except ConfigError as error:
                wrong = wrong or error
                break  # so are the other numbers of micro-batches
            for remat in policies:
                is_any = True
                yield one.changed("compute", remat=remat)
    if wrong and not is_any:
        raise wrong


def _meshes(mesh: MeshConfig, seq_len: int, has_experts: bool, n: int) -> Iterator[MeshConfig]:
    long = seq_len >= _LONG
    for tensor in (x for x in (1, 2, 4, 8) if n % x == 0):
        for context in (x for x in (1, 2, 4, 8, 16) if n % (tensor * x) == 0 and (long or x == 1)):
            inner = tensor * context
            for expert in (x for x in divisors(n // inner) if x == 1 or has_experts):
                for fsdp in divisors(n // inner // expert):
                    yield dataclasses.replace(
                        mesh, data=n // inner // expert // fsdp, fsdp=fsdp, expert=expert,
                        context=context, tensor=tensor,
                    )  # fmt: skip
