"""A step's time and memory by formula, for ranking plans in microseconds, and for GPUs.

Each kind of work is counted from shapes (FLOPs of products with what the remat policy repeats,
visible pairs of attention, bytes of collectives, arrays that are kept) and divided by what a device
reaches of it. Those shares start at figures of the TPU compiler (for GPUs: assumptions) and are
corrected by each program that was compiled (`corrected`).
"""

import math
from collections import Counter
from typing import Any, NamedTuple, Protocol

from olmo_jax.config import costs
from olmo_jax.config.costs import GIB
from olmo_jax.config.data import DataConfig
from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig, mesh_shape
from olmo_jax.config.parameters import table
from olmo_jax.config.run import Config
from olmo_jax.parallel import sharding
from olmo_jax.pods.kernels import Case
from olmo_jax.pods.plan import Plan

Corrections = dict[str, float]  # by kind of work, and "temporary": factors


class Shares(NamedTuple):
    """What a chip reaches of its peak."""

    products: float
    forward: float  # attention, on pairs that are visible
    backward: float


# v5p: as in the compiled step of Olmo 3 7B. Other TPUs: the compiler's cycles for a product of
# 16,384³, and bundles of attention kernels (v4, tpu7x: guessed). GPU: assumed.
START = {
    "TPU v4": Shares(0.93, 0.80, 0.85),
    "TPU v5 lite": Shares(0.92, 0.70, 0.75),
    "TPU v5": Shares(0.96, 0.82, 0.90),
    "TPU v6 lite": Shares(0.78, 0.27, 0.36),
    "TPU7x": Shares(0.85, 0.35, 0.40),
    "GPU": Shares(0.70, 0.55, 0.45),
}
_PASSES = 8.0  # of memory-bound work over a layer's activations, forward and backward
# Over q and k, where QK-norm and RoPE are XLA's and not our kernel's: heads that are split, or odd.
_UNFUSED = 80.0
_LOST = 1.15  # what it takes in terms of its bytes at the bandwidth


class Machine(Protocol):
    """A slice of TPUs or nodes with GPUs."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def chip(self) -> Any:
        """Of each device: kind, peak, hbm, bandwidth."""

    @property
    def n_devices(self) -> int:
        """As JAX counts them."""
        ...

    @property
    def size(self) -> str:
        """How many devices, in words."""
        ...

    def rates(self, mesh: MeshConfig) -> dict[str, float]:
        """Bytes/s that a device sends in a group along each axis of the config's mesh."""
        ...


# What the backward pass computes again: parts of a layer, by remat policy.
_AGAIN = {
    "none": (),
    "attention": ("q", "k", "v", "out", "into", "down"),
    "qkv": ("out", "into"),
    "offload": ("out", "into"),
    "qkv_mlp": (),
    "full": ("q", "k", "v", "attention", "out", "into", "down"),
}


class Work(NamedTuple):
    """What a step's time and memory depend on, of a config."""

    model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    batch: int  # tokens
    seq_len: int  # tokens

    @classmethod
    def of(cls, m: ModelConfig, compute: ComputeConfig, mesh: MeshConfig, d: DataConfig) -> "Work":
        """The work of a step of a run with these parts."""
        return cls(m, compute, mesh, d.global_batch_size, d.seq_len)


def predict(config: Config, machine: Machine, corrections: Corrections | None = None) -> Plan:
    """A plan from shapes alone.

    Args:
      config: validated for the machine.
      machine: what it runs on.
      corrections: of `corrected`; None: none.
    """
    fix = {"temporary": 1.0} | (corrections or {})
    work, m, chip = (
        Work.of(config.model, config.compute, config.mesh, config.data),
        config.model,
        machine.chip,
    )
    shape = mesh_shape(config.mesh, machine.n_devices)
    tokens = config.data.global_batch_size / token_ways(shape)
    share, again = START.get(chip.kind, START["GPU"]), _again(work)
    parts = _weights(m)
    done = 2 * sum(n * (3 + (part in again)) for part, n in parts.items()) * m.n_layers
    done = tokens * (done + 6 * m.d_model * m.vocab_rows) / shape["tensor"]
    sizes = costs.state_bytes(m, shape, config.compute.grad_dtype)
    touched = _PASSES * _kept(work, "none", shape)
    if shape["tensor"] > 1 or m.head_dim % 128:
        qk = (m.n_heads + m.n_kv_heads) * m.head_dim / shape["tensor"]
        touched += _UNFUSED * _item(work) * qk
    touched *= tokens * m.n_layers
    floor = (touched + 7 * sizes.params) / chip.bandwidth
    exchanged = _collectives(work, machine, shape, tokens)
    seconds = {
        "products": done / chip.peak / share.products,
        "other": _LOST * floor,
        "attention": _attention(work, machine, shape, "attention" in again),
        "collectives": sum(x[2] for x in exchanged.values()),
    }
    kept = kept_bytes(work, shape)
    working = fix["temporary"] * _working_bytes(work, shape, sizes.gradients)
    return Plan(
        memory={
            "parameters": sizes.params,
            "moments": sizes.moments,
            "batch": 12.0 * tokens,
            "temporary": kept + working,
            "program": 0.1 * GIB,
        },
        available=chip.hbm,
        activations=kept,
        flops=useful_flops(work) / machine.n_devices,
        done=done,
        seconds={kind: fix.get(kind, 1.0) * took for kind, took in seconds.items()},
        other_floor=fix.get("other", 1.0) * floor,
        collectives=exchanged,
        exposed=fix.get("collectives", 1.0)
        * sum(x[2] for name, x in exchanged.items() if " tensor " in name or "all-to-all" in name),
    )


def corrected(corrections: Corrections, predicted: Plan, compiled: Plan) -> Corrections:
    """Corrections with which the prediction would have been what the compiled program shows."""
    new = dict(corrections)
    for kind, took in predicted.seconds.items():
        real = compiled.seconds.get(kind, 0.0)
        if kind == "other":
            real += compiled.seconds.get("kernels", 0.0)
        if kind == "products":
            real += compiled.seconds.get("experts", 0.0)
        if took and real:
            new[kind] = corrections.get(kind, 1.0) * real / took
    working = predicted.memory["temporary"] - predicted.activations
    real = compiled.memory["temporary"] - predicted.activations
    new["temporary"] = corrections.get("temporary", 1.0) * max(real / working, 0.1)
    return new


def useful_flops(work: Work) -> float:
    """Of a step, of all devices."""
    per_token = costs.flops_per_token(work.model, work.seq_len)
    return float(work.batch * per_token)


def attention_seconds(case: Case, chip: Any) -> tuple[float, float]:
    """Of the kernels for a row, forward and backward, at the chip's usual share of its peak."""
    window = min(case.window or case.seq, case.seq)
    pairs = window * (window + 1) // 2 + (case.seq - window) * window
    work = 4 * case.head_dim * case.n_heads * pairs / chip.peak
    share = START.get(chip.kind, START["GPU"])
    return work / share.forward, 2.5 * work / share.backward


def _again(work: Work) -> tuple[str, ...]:
    """Parts that are computed twice; an output that is only added is not needed again."""
    parts = _AGAIN[work.compute.remat]
    is_added = work.model.norm_position == "before"
    return tuple(x for x in parts if not (is_added and x == "down"))


# Matrices of a layer by the part that computes with them, as `_AGAIN` names them.
_PARTS = {
    "wq": "q", "wk": "k", "wv": "v", "wo": "out", "w_gate": "into", "w_up": "into",
    "w_down": "down",
}  # fmt: skip


def _weights(m: ModelConfig) -> dict[str, int]:
    """Numbers of a layer's matrices that a token meets, by part."""
    taken = Counter[str]()
    for path, row in table(m).items():
        if part := _PARTS.get(path.split("/")[-1]):
            n = math.prod(row.sizes)
            taken[part] += n * m.n_experts_per_token // m.n_experts if "e" in row.axes else n
    return dict(taken)


def _stored(m: ModelConfig) -> tuple[int, int]:
    """Numbers of a layer's matrices: outside the experts, and of all experts."""
    dense = experts = 0
    for path, row in table(m).items():
        if path.split("/")[-1] in _PARTS:
            dense, experts = (
                (dense, experts + math.prod(row.sizes))
                if "e" in row.axes
                else (dense + math.prod(row.sizes), experts)
            )
    return dense, experts


def _item(work: Work) -> int:
    return 2 if work.compute.dtype == "bfloat16" else 4


def _kept(work: Work, remat: str, shape: dict[str, int]) -> float:
    """Bytes of a token and layer that the forward pass keeps."""
    m, item, tensor = work.model, _item(work), shape["tensor"]
    q, kv = m.n_heads * m.head_dim / tensor, m.n_kv_heads * m.head_dim / tensor
    taken = m.n_experts_per_token * _room(work, shape) if m.n_experts else 1
    ff, lse = m.d_ff / tensor * taken, 4 * m.n_heads
    # Of experts: the rows into them, out of them and in the order of tokens, and of gate times up.
    rows = 3 * m.d_model * taken + ff if m.n_experts else 0
    x = item * m.d_model
    attended = x + item * q + lse / tensor
    # An output is kept where the norm after it needs it.
    added = x if m.norm_position == "after" else 0
    qkv = attended + item * (q + 2 * kv) + added
    return {
        "full": x,
        "offload": x,
        "attention": attended,
        "qkv": qkv,
        "qkv_mlp": qkv + x + 2 * item * ff,
        "none": attended + 3 * x + item * (2 * q + 4 * kv + 2 * ff + rows),
    }[remat]


def kept_bytes(work: Work, shape: dict[str, int]) -> float:
    """Bytes that the forward pass of a micro-batch keeps on a device for the backward pass."""
    return _tokens(work, shape) * work.model.n_layers * _kept(work, work.compute.remat, shape)


def _tokens(work: Work, shape: dict[str, int]) -> float:
    """Of a micro-batch, of a device."""
    return work.batch / token_ways(shape) / work.compute.accumulate


def token_ways(shape: dict[str, int]) -> int:
    """How many devices, or groups that share heads, have different tokens."""
    return math.prod(shape[axis] for axis in (*sharding.BATCH_AXES, "context"))


def _room(work: Work, shape: dict[str, int]) -> float:
    """Rows that the experts of a device can take, in terms of the balanced load."""
    m, ways = work.model, shape["expert"]
    if ways == 1 or m.router == "expert_choice":  # always balanced
        return 1.0
    k, limit = m.n_experts_per_token, work.compute.expert_buffer
    most = ways * min(k, m.n_experts // ways) / k  # a token goes to an expert once
    return most if limit is None else min(most, limit)


def _working_bytes(work: Work, shape: dict[str, int], gradients: float) -> float:
    """What a layer's and the head's passes hold at once, weights as gathered, and gradients."""
    m, item, tensor = work.model, _item(work), shape["tensor"]
    tokens, embedding = _tokens(work, shape), m.d_model * m.vocab_rows / tensor
    rows = m.n_experts_per_token * _room(work, shape) if m.n_experts else 1
    dense, experts = _stored(m)
    layer = tokens * item * (20 * m.d_model + 6 * rows * m.d_ff / tensor)
    if m.n_experts:
        layer += tokens * item * 6 * rows * m.d_model
    head = 12.0 * min(work.compute.loss_chunk or tokens, tokens) * m.vocab_rows / tensor
    gathered = 2 * item * (dense + experts / shape["expert"]) / tensor + (2 * item + 4) * embedding
    return layer + head + gathered + gradients * (2 if work.compute.accumulate > 1 else 1)


def _attention(work: Work, machine: Machine, shape: dict[str, int], again: bool) -> float:
    m, total = work.model, 0.0
    rows = work.batch / work.seq_len
    rows /= math.prod(n for axis, n in shape.items())  # context and tensor divide its pairs
    for kind in set(m.layer_kinds):
        window = m.window if kind == "sliding" else None
        case = Case(machine.name, work.seq_len, m.n_heads, m.n_kv_heads, m.head_dim, window)
        forward, backward = attention_seconds(case, machine.chip)
        total += rows * m.layer_kinds.count(kind) * ((1 + again) * forward + backward)
    return total


def _collectives(
    work: Work, machine: Machine, shape: dict[str, int], tokens: float
) -> dict[str, tuple[float, float, float]]:
    """{kind along an axis: (times, bytes, seconds)}."""
    m, item, again = work.model, _item(work), len(_again(work)) > 0
    n, tensor, micro = m.n_layers, shape["tensor"], work.compute.accumulate
    grad = 2 if work.compute.grad_dtype == "bfloat16" else 4
    dense, experts = (x / tensor for x in _stored(m))
    layer, embedding = dense + experts / shape["expert"], m.d_model * m.vocab_rows / tensor
    activations = tokens / micro * m.d_model * item
    kv = tokens / micro * 2 * m.n_kv_heads * m.head_dim / tensor * item
    hops = [  # of a device's keys and values: around the ring, or as far as the window reaches
        shape["context"] - 1
        if kind == "full"
        else min(1.0, 2 * (m.window or 0) * shape["context"] / work.seq_len)
        for kind in m.layer_kinds
    ]
    gradients = n * layer + 2 * embedding
    # kind, axis, bytes of the array, times in a micro-batch
    wanted = [
        ("all-gather", "fsdp", layer * item, 2 * n),
        ("all-gather", "fsdp", embedding * item, 2),
        ("reduce-scatter", "fsdp", layer * grad, n),
        ("reduce-scatter", "fsdp", embedding * grad, 2),
        *(
            ("all-reduce", axis, gradients / shape["fsdp"] * grad, 1)
            for axis in ("data", "context")
        ),
        ("all-reduce", "expert", (n * dense + 2 * embedding) / shape["fsdp"] * grad, 1),
        ("all-reduce", "tensor", activations, (4 + 2 * again) * n),
        ("collective-permute", "context", kv * sum(hops), 3 + again),
        ("all-to-all", "expert", activations * m.n_experts_per_token, (4 + 2 * again) * n),
    ]
    rates, moved = machine.rates(work.mesh), {}
    for kind, axis, n_bytes, times in wanted:
        if shape[axis] == 1:
            continue
        if shape[axis] == machine.n_devices and machine.chip.kind.startswith("TPU"):
            # So the TPU compiler makes a scatter over a whole slice, and a gather over a large one.
            is_reduce = kind == "reduce-scatter" or (kind == "all-gather" and shape[axis] > 64)
            kind = "all-reduce" if is_reduce else kind
        took = micro * times * sent(kind, n_bytes, shape[axis]) / rates[axis]
        name = f"{kind} over {axis} {shape[axis]}"
        old = moved.get(name, (0.0, 0.0, 0.0))
        moved[name] = (old[0] + micro * times, old[1] + micro * times * n_bytes, old[2] + took)
    return moved


def sent(kind: str, n_bytes: float, n: int) -> float:
    """Bytes that a device sends so that `n` of them finish a collective over an array."""
    if kind == "collective-permute":
        return n_bytes
    return n_bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)
