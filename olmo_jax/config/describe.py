"""What a run will be, in words: the answer of `--dry_run`, from shapes and formulas alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from olmo_jax.config import costs
from olmo_jax.config.costs import GIB
from olmo_jax.config.data import batch_stages
from olmo_jax.config.model import LANES, ModelConfig, mesh_shape
from olmo_jax.config.run import Config


def describe(config: Config, n_devices: int, optimizer: Sequence[str], moments: float = 2.0) -> str:
    """The resolved config, parameters, FLOPs, mesh and memory of the state, as text.

    Args:
      config: validated.
      n_devices: devices of the run; they need not be here.
      optimizer: what it does with which parameters, in lines.
      moments: fp32 numbers that it keeps for each parameter.
    """
    model, shape = config.model, mesh_shape(config.mesh, n_devices)
    counts = costs.n_params(model)
    state = costs.state_bytes(model, shape, config.compute.grad_dtype, moments)
    seq = config.data.seq_len
    ways = shape["data"] * shape["fsdp"] * shape["expert"]
    lines = [*_options(config), ""]
    lines += [
        f"parameters        {counts.total:,} ({counts.non_embedding:,} non-embedding,"
        f" {counts.core:,} without the head too)",
        *_experts(model),
        f"FLOPs per token   {costs.flops_per_token(model, seq):.6e} at {seq:,} tokens"
        f" ({costs.flops_per_token_core2(model, seq):.6e} as OLMo-core 2 counts)",
        f"layers            {_kinds(model.layer_kinds, model.window)}",
        f"mesh              {n_devices} devices: "
        + " x ".join(f"{axis} {n}" for axis, n in shape.items()),
        *_chunks(seq, shape["context"]),
    ]
    for start, size in batch_stages(config.data):
        rows, n = size // seq, config.compute.accumulate
        lines.append(
            f"batch             {size:,} tokens = {rows:,} rows of {seq:,}, {n} micro-batch(es) of"
            f" {rows / ways / n:g} row(s) for {n_devices // ways} device(s), from token {start:,}"
        )
    lines += [
        f"state per device  {state.total / GIB:.2f} GiB: parameters {state.params / GIB:.2f},"
        f" moments {state.moments / GIB:.2f}, gradients {state.gradients / GIB:.2f};"
        " activations come on top",
        f"checkpoint        {counts.total * 4 * (1 + moments) / GIB:.2f} GiB each",
        *(f"optimizer         {line}" for line in optimizer),
    ]
    return "\n".join(lines)


def _chunks(seq: int, ways: int) -> list[str]:
    if ways == 1:
        return []
    chunk = seq // (2 * ways)
    is_short = chunk % LANES
    short = f"; no multiple of {LANES}, as it has to be on a TPU" if is_short else ""
    return [f"chunks            {2 * ways} of each row, {chunk:,} tokens{short}"]


def _experts(model: ModelConfig) -> list[str]:
    if not model.n_experts:
        return []
    active = costs.n_params(model, active=True).total
    per_token = f"{model.n_experts_per_token} of {model.n_experts} experts"
    n = model.n_layers - len(model.dense_layers)
    layers = f"{n} of {model.n_layers} layers" if model.dense_layers else "each layer"
    return [f"  of a token      {active:,}, with {per_token} in {layers}"]


def _options(config: Any, path: str = "config") -> list[str]:
    lines = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines += _options(value, f"{path}.{f.name}")
        else:
            lines.append(f"{path}.{f.name} = {value!r}")
    return lines


def _kinds(kinds: tuple[str, ...], window: int | None) -> str:
    full = kinds.count("full")
    if full == len(kinds):
        return f"{full} full"
    return f"{len(kinds) - full} sliding (window {window:,}), {full} full"
