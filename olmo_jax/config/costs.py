"""What a model costs, by formula: parameters, FLOPs per token, memory of the state, chip peaks.

Nothing here needs JAX: a 32B model is sized on a laptop in microseconds.
"""

import math
import re
from dataclasses import dataclass

from olmo_jax.config.model import RULES, ComputeConfig, ModelConfig
from olmo_jax.config.parameters import ROUTER_BIAS, table

GIB = 2**30

# Peak dense bfloat16 FLOP/s with fp32 accumulation of one device as JAX lists it, by `device_kind`.
# Sources: Google Cloud TPU documentation; NVIDIA and AMD data sheets, whose sparse figures are
# halved. A name must match wholly, so that a slice of a card (MIG) gets no figure. Left out: cards
# whose sheets do not say which accumulation they mean (L4, L40S, A10, RTX).
CHIP_PEAKS = {
    r"TPU v4": 275e12,  # one device is a chip of two cores
    r"TPU v5 lite|TPU v5e": 197e12,
    r"TPU v5p?": 459e12,  # v5p calls itself "TPU v5"
    r"TPU v6 lite|TPU v6e": 918e12,
    r"TPU7x": 1153.5e12,  # one device is a core, half a chip
    r"(NVIDIA )?A[18]00(-SXM4?|-PCIE)?[- ](40|80)GB( PCIe)?": 312e12,
    r"NVIDIA H[18]00 80GB HBM3": 989.5e12,  # SXM
    r"NVIDIA H[18]00 PCIe": 756.5e12,
    r"NVIDIA H100 NVL": 835.5e12,
    r"NVIDIA H200|NVIDIA GH200 \d+GB?( HBM3e)?": 989.5e12,
    r"NVIDIA H200 NVL": 835.5e12,
    r"NVIDIA B[23]00( SXM6 AC)?": 2.25e15,
    r"NVIDIA GB[23]00": 2.5e15,
    r"AMD Instinct MI250X?.*": 191.5e12,  # one device is a die, half a card
    r"AMD Instinct MI3(00|25)X.*": 1307.4e12,
    r"AMD Instinct MI350X.*": 2306.9e12,
    r"AMD Instinct MI355X.*": 2516.6e12,
}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model, padded vocabulary rows included."""

    total: int
    non_embedding: int  # without the input embedding; a tied table counts as the embedding
    core: int  # without input embedding and head


@dataclass(frozen=True)
class StateBytes:
    """Bytes that the training state takes on one device."""

    params: int
    moments: int  # of the optimizer
    gradients: int  # alive at the end of the backward pass only

    @property
    def total(self) -> int:
        """Their sum."""
        return self.params + self.moments + self.gradients


def _sizes(m: ModelConfig) -> dict[str, int]:
    return {path: math.prod(row.shape) for path, row in table(m).items()}


def _active(m: ModelConfig) -> dict[str, int]:
    """Parameters that one token meets."""
    return {
        path: n * m.n_experts_per_token // m.n_experts if path.startswith("layers/moe/w_") else n
        for path, n in _sizes(m).items()
    }


def n_params(model: ModelConfig, active: bool = False) -> ParameterCounts:
    """Parameters of the model, or only those that one token meets."""
    sizes = _active(model) if active else _sizes(model)
    total = sum(sizes.values())
    non_embedding = total - sizes["embed"]
    return ParameterCounts(total, non_embedding, non_embedding - sizes.get("lm_head", 0))


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Useful FLOPs of training on one token, forward and backward, in rows of `seq_len` tokens.

    Two FLOPs forward and four backward for every weight that a token meets (the input embedding is
    a lookup: none) and for every pair of positions that may see each other, in both matrix products
    of attention. Nothing for recomputation. Document masks are not counted, so packed rows show
    more FLOPs than their pairs need.
    Source: OLMo-core 3.0.0, nn/attention/__init__.py:599 and 1269.
    """
    S, W = seq_len, model.window or seq_len
    causal = S * (S + 1) // 2
    inside = W * (W + 1) // 2 + (S - W) * W if W < S else causal
    pairs = {"full": causal, "sliding": inside}
    width = 12 * model.n_heads * model.head_dim
    attention = sum(width * pairs[kind] // S for kind in model.layer_kinds)
    return _matmul_flops(model) + attention


def flops_per_token_core2(model: ModelConfig, seq_len: int) -> int:
    """FLOPs per token as OLMo-core 2.x counted them: every pair of a square, causal or not.

    Published MFU figures of OLMo models use this convention.
    Source: OLMo-core 2.6.0, nn/attention/__init__.py:791-809.
    """
    seen = {"full": seq_len, "sliding": min(model.window or seq_len, seq_len)}
    width = 12 * model.n_heads * model.head_dim
    return _matmul_flops(model) + sum(width * seen[kind] for kind in model.layer_kinds)


def _matmul_flops(m: ModelConfig) -> int:
    """6 FLOPs per weight of attention, MLP and head, with QK-norms and the final norm.

    Of experts those that a token takes, and the router.
    """
    sizes = _active(m)
    # A tied head is the same work as one of its own.
    head = m.d_model * m.vocab_rows + sizes.get("final_norm", 0)
    parts = ("layers/attn/", "layers/mlp/", "layers/moe/")
    layers = sum(n for path, n in sizes.items() if path.startswith(parts) and path != ROUTER_BIAS)
    return 6 * (layers + head)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device, or None for a chip that is not in the table.

    Args:
      device_kind: as `jax.devices()[0].device_kind` says.
    """
    for pattern, peak in CHIP_PEAKS.items():
        if re.fullmatch(pattern, device_kind):
            return peak
    return None


def state_bytes(
    model: ModelConfig,
    mesh_shape: dict[str, int],
    grad_dtype: str = ComputeConfig.grad_dtype,
    moments: float = 2.0,
) -> StateBytes:
    """Memory of the training state on one device; activations come on top.

    Args:
      model: the model, whose parameters are fp32.
      mesh_shape: devices along each mesh axis, of `config.model.mesh_shape`.
      grad_dtype: "float32" or "bfloat16".
      moments: fp32 numbers that the optimizer keeps for each parameter; Adam keeps two.
    """
    params = sum(
        math.prod(
            -(-n // math.prod(mesh_shape.get(axis, 1) for axis in RULES[name or "layers"]))
            for n, name in zip(row.shape, row.stored_axes, strict=True)
        )
        for row in table(model).values()
    )
    return StateBytes(
        4 * params, round(4 * moments * params), params * (2 if grad_dtype == "bfloat16" else 4)
    )
