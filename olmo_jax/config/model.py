"""Options of the model, of how it is computed, and of the mesh that it is spread over."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from olmo_jax.config.options import (
    INT32,
    LARGEST,
    Bears,
    ConfigError,
    Count,
    Natural,
    NonNegative,
    Positive,
    Range,
    shown,
)

LANES = 128  # columns of a TPU's tile; sequences there are cut into multiples of it


@dataclass(frozen=True)
class ModelConfig:
    """What the model is. Two runs with equal values here compute the same function."""

    vocab_size: Count = 100_352  # rows of the softmax
    padded_vocab_size: Count | None = None  # rows stored, for sharding; the extra ones never score
    d_model: Count = 2048
    n_layers: Annotated[int, Range(1, 100_000)] = 16
    n_heads: Count = 16
    n_kv_heads: Count = 16
    head_dim: Count = 128
    d_ff: Count = 8192  # of each expert where there are any
    n_experts: Natural = 0  # a mixture of experts in the place of the MLP; 0: the MLP
    n_experts_per_token: Count = 8
    dense_layers: tuple[Natural, ...] = ()  # numbers of layers that have the MLP all the same
    normalize_expert_weights: bool = False  # the weights of a token's experts sum to 1
    # Each token takes its best experts, or each expert the best tokens of every sequence, as many
    # on average; that looks ahead, so that such a model cannot generate text as it was trained.
    router: Literal["token_choice", "expert_choice"] = "token_choice"
    # Balance without a loss: after each step a bias, used for the choice alone, moves by this
    # towards experts with fewer tokens than the mean; OLMo-core's bias_gamma. None: no bias.
    router_bias_gamma: Positive | None = None
    # The longest sequence that the model is meant for, tokens.
    max_seq_len: Annotated[Count, Bears.NOTHING] = 4096
    norm: Literal["rms", "nonparametric"] = "rms"
    norm_position: Literal["before", "after"] = "after"  # of the sub-layer: OLMo 1 / OLMo 2
    norm_eps: Positive = 1e-6
    qk_norm: Literal["none", "full"] = "full"  # full: over all heads together
    clip_qkv: Positive | None = None  # q, k and v are clamped to ± this
    tie_embeddings: bool = False
    layer_types: tuple[Literal["full", "sliding"], ...] = ("full",)  # a shorter list repeats
    window: Count | None = None  # positions that a sliding layer sees, the own one included
    rope_theta: Annotated[float, Range(2.0, LARGEST)] = 500_000.0
    yarn_factor: Annotated[float, Range(1.0, LARGEST)] | None = (
        None  # YaRN on the full layers (never on sliding ones)
    )
    yarn_original_len: Count = 8192  # tokens
    yarn_beta_fast: Positive = 32.0
    yarn_beta_slow: Positive = 1.0
    yarn_attention_factor: Positive | None = None  # None: 0.1 ln(yarn_factor) + 1
    init: Annotated[Literal["normal", "mitchell"], Bears.NOTHING] = "normal"
    # Of every matrix (normal), truncated at three of it.
    init_std: Annotated[Positive, Bears.NOTHING] = 0.02
    # None: as init says.
    embed_init_std: Annotated[NonNegative | None, Bears.NOTHING] = None
    head_init_std: Annotated[NonNegative | None, Bears.NOTHING] = None
    # The gain of the norms on the sub-layers' outputs.
    post_norm_init: Annotated[NonNegative, Bears.NOTHING] = 1.0

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer, `n_layers` of them."""
        return self.layer_types * (self.n_layers // len(self.layer_types))

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table and columns of the head."""
        return self.padded_vocab_size or self.vocab_size


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cos and sin with where `yarn_attention_factor` says nothing."""
    return 0.1 * math.log(factor) + 1.0


@dataclass(frozen=True)
class ComputeConfig:
    """How the function is computed: speed and memory, never what the model is."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; float32 on a CPU always
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # weight gradients and their reduction
    remat: Literal["none", "attention", "qkv", "qkv_mlp", "full", "offload"] = "full"
    # auto: our kernels on a TPU, cuDNN on an NVIDIA GPU where it can (no documents, bfloat16), else
    # blocked, which can all. pallas on a Hopper GPU has not run there yet. A named one that cannot
    # do the model, the mask or the device says why.
    attention: Literal["auto", "pallas", "cudnn", "blocked", "reference"] = "auto"
    loss_chunk: Count | None = 1024  # tokens whose logits are held at once; None: all
    accumulate: Count = 1  # micro-batches per step
    # Rows that the experts of a device can take over mesh.expert, in terms of the balanced load;
    # what needs more ends the run. None: so many that no routing can need more.
    expert_buffer: Annotated[float, Range(1.0, LARGEST)] | None = None
    deterministic: bool = False  # GPU: bit-exact resume, at some speed
    # None: compile anew in each process.
    compilation_cache: Annotated[str | None, Bears.RECORDS] = "~/.cache/olmo_jax/xla"
    # NAME=VALUE, over what `xla_flags.py` has for the chip; NAME=none takes a flag away.
    xla_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1, which takes the rest."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1  # parts of each sequence, whose keys go around in a ring
    tensor: int = 1


# The mesh axes that arrays are split over, by the logical names of their axes.
BATCH_AXES = ("data", "fsdp", "expert")
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "seq": ("context",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "embed": ("fsdp",),
    "head_dim": (),
    "layers": (),
    "norm": (),
}


def divisors(n: int, most: int | None = None) -> list[int]:
    """The numbers, of at most `most`, that divide `n`, ascending."""
    return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]


def mesh_shape(mesh: MeshConfig, n_devices: int) -> dict[str, int]:
    """Devices along each axis, with -1 resolved.

    Raises:
      ConfigError: if the axes cannot cover exactly `n_devices`.
    """
    shape = dataclasses.asdict(mesh)
    free = [axis for axis, n in shape.items() if n == -1]
    problems = [
        f"config.mesh.{axis}={n}: need -1, or a number from 1 to {INT32}"
        for axis, n in shape.items()
        if n != -1 and not 1 <= n <= INT32
    ]
    if len(free) > 1:
        problems.append(f"config.mesh: only one axis can be -1, found {', '.join(free)}")
    if problems:
        raise ConfigError(problems)
    used = math.prod(n for n in shape.values() if n != -1)
    if n_devices % used or (not free and used != n_devices):
        axes = " x ".join(f"{axis} {n}" for axis, n in shape.items() if n > 1) or "one device"
        need = f"a multiple of {used}" if free else f"{used}"
        fix = "" if free else "; one axis may be -1 and takes what the others leave"
        raise ConfigError([f"config.mesh: {axes} needs {need} devices, found {n_devices}{fix}"])
    return shape | dict.fromkeys(free, n_devices // used)


def model_problems(m: ModelConfig) -> list[str]:
    """What is wrong between the options of a model, one line each."""
    problems: list[str] = []
    if m.n_heads % m.n_kv_heads:
        problems.append(
            f"config.model.n_heads={m.n_heads} is no multiple of n_kv_heads={m.n_kv_heads}"
        )
    if m.head_dim % 2:
        problems.append(f"config.model.head_dim={m.head_dim}: rotary embedding needs an even one")
    if not m.layer_types or m.n_layers % len(m.layer_types):
        problems.append(
            f"config.model.layer_types: {len(m.layer_types)} entries do not repeat evenly over"
            f" n_layers={m.n_layers}; write the kind of every layer"
        )
    if "sliding" in m.layer_types and m.window is None:
        problems.append(f"config.model.window={m.window}: sliding layers need at least 1 position")
    if m.n_experts and m.n_experts_per_token > m.n_experts:
        problems.append(
            f"config.model.n_experts_per_token={m.n_experts_per_token} is above"
            f" n_experts={m.n_experts}"
        )
    if m.dense_layers and not (
        m.n_experts
        and sorted(set(m.dense_layers)) == list(m.dense_layers)
        and m.dense_layers[-1] < m.n_layers
        and len(m.dense_layers) < m.n_layers
    ):
        problems.append(
            f"config.model.dense_layers={shown(m.dense_layers)}: need some of the layers 0 to"
            f" {m.n_layers - 1}, rising, of a model with model.n_experts"
        )
    if m.router_bias_gamma is not None and (not m.n_experts or m.router == "expert_choice"):
        problems.append(
            "config.model.router_bias_gamma: only tokens that choose among model.n_experts need it"
        )
    if m.router == "expert_choice" and (not m.n_experts or m.normalize_expert_weights):
        problems.append(
            "config.model.router: expert_choice needs model.n_experts, and"
            " normalize_expert_weights=False"
        )
    if m.vocab_rows < m.vocab_size:
        problems.append(
            f"config.model.padded_vocab_size={m.vocab_rows} is below vocab_size={m.vocab_size}"
        )
    return problems
