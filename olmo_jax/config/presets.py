"""The published OLMo models, and what their runs have in common, as data for config files.

    c.model.update(presets.MODELS["olmo2_7B"])
    c.update(presets.OLMO2_RUN)

Model names are OLMo-core's where it has one: `olmo2_1B_v2` is the released 1B, `olmo2_1B` an
18-layer shape that was never released. Vocabulary rows are those that were trained, padding
included. Sources: configs of allenai/OLMo and presets of allenai/OLMo-core.
"""

from itertools import pairwise
from typing import Any

Preset = dict[str, Any]  # fields of ModelConfig


def _size(
    d_model: int,
    n_layers: int,
    n_heads: int,
    d_ff: int,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> Preset:
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads or n_heads,
        "head_dim": head_dim or d_model // n_heads,
        "d_ff": d_ff,
    }


# --- families: everything but the size ------------------------------------------------------------

OLMO1: Preset = {
    "vocab_size": 50_304,  # of them 50,280 are tokens; the rest was trained like any other row
    "padded_vocab_size": None,
    "max_seq_len": 2048,
    "norm": "nonparametric",
    "norm_position": "before",
    "norm_eps": 1e-5,
    "qk_norm": "none",
    "clip_qkv": None,
    "tie_embeddings": False,
    "layer_types": ("full",),
    "window": None,
    "rope_theta": 10_000.0,
    "yarn_factor": None,
    "init": "mitchell",
}
OLMO1_0424: Preset = OLMO1 | {"max_seq_len": 4096, "clip_qkv": 8.0}  # also 0724
OLMO2: Preset = {
    "vocab_size": 100_352,  # of them 100,278 are tokens
    "padded_vocab_size": None,
    "max_seq_len": 4096,
    "norm": "rms",
    "norm_position": "after",
    "norm_eps": 1e-6,
    "qk_norm": "full",
    "clip_qkv": None,
    "tie_embeddings": False,
    "layer_types": ("full",),
    "window": None,
    "rope_theta": 500_000.0,
    "yarn_factor": None,
    "init": "normal",
    "init_std": 0.02,
}
OLMO3: Preset = OLMO2 | {
    "max_seq_len": 8192,
    "layer_types": ("sliding", "sliding", "sliding", "full"),
    "window": 4096,
}

OLMOE: Preset = OLMO1 | {  # norms before the sub-layers, as OLMo 1 has them, but RMSNorm; QK-norm
    "max_seq_len": 4096,
    "norm": "rms",
    "qk_norm": "full",
    "init": "normal",
    "init_std": 0.02,
    "n_experts": 64,
    "n_experts_per_token": 8,
}

# --- variations, to be laid over a model ----------------------------------------------------------

LONG_CONTEXT: Preset = {  # Olmo 3 from its long-context stage on
    "max_seq_len": 65_536,
    "yarn_factor": 8.0,
    "yarn_original_len": 8192,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
HF_TABLE: Preset = {  # Olmo 3 on Hugging Face: the rows that are no tokens were cut off
    "vocab_size": 100_278,
    "padded_vocab_size": 100_352,
}

# --- sizes ----------------------------------------------------------------------------------------

SIZES: dict[str, Preset] = {
    "1M": _size(12, 4, 4, 256, head_dim=4),
    "14M": _size(128, 4, 8, 512),
    "30M": _size(256, 4, 8, 768),
    "60M": _size(384, 8, 8, 1536),
    "100M": _size(512, 12, 8, 2048),
    "190M": _size(768, 12, 12, 3072),
    "370M": _size(1024, 16, 16, 4096),
    "600M": _size(1344, 16, 16, 5376),
    "760M": _size(1536, 16, 16, 6144),
    "1B": _size(2048, 18, 16, 8192),
    "1B_v2": _size(2048, 16, 16, 8192),
    "3B": _size(3328, 16, 16, 13_312),
    "7B": _size(4096, 32, 32, 11_008),
    "13B": _size(5120, 40, 40, 13_824),
    "32B": _size(5120, 64, 40, 27_648, n_kv_heads=8),
}
# OLMo-core: olmo3_600M is narrower, and olmo3_1B has the 16 layers of olmo2_1B_v2.
OLMO3_SIZES = {name: size for name, size in SIZES.items() if name != "1B_v2"} | {
    "600M": _size(1280, 16, 16, 5120),
    "1B": SIZES["1B_v2"],
}

MODELS: dict[str, Preset] = {
    "olmo1_1B": OLMO1 | SIZES["1B_v2"] | {"tie_embeddings": True},  # OLMo-1B
    "olmo1_7B": OLMO1 | SIZES["7B"],  # OLMo-7B, OLMo-7B-Twin-2T
    "olmo1_7B_0424": OLMO1_0424 | SIZES["7B"],  # OLMo-7B-0424, once called OLMo-1.7-7B
    "olmo1_1B_0724": OLMO1_0424 | SIZES["1B_v2"],  # OLMo-1B-0724
    "olmo1_7B_0724": OLMO1_0424 | SIZES["7B"],  # OLMo-7B-0724
    # OLMo-2-0425-1B is olmo2_1B_v2; OLMo-2-1124-7B, -13B and OLMo-2-0325-32B have their size.
    **{f"olmo2_{name}": OLMO2 | size for name, size in SIZES.items()},
    # Olmo 3 as it was pretrained, 8,192 positions and no YaRN.
    **{f"olmo3_{name}": OLMO3 | size for name, size in OLMO3_SIZES.items()},
    "olmo3_7B_long": OLMO3 | SIZES["7B"] | LONG_CONTEXT,  # Olmo-3-1025-7B as trained
    "olmo3_32B_long": OLMO3 | SIZES["32B"] | LONG_CONTEXT,  # Olmo-3-1125-32B as trained
    "olmoe_1B_7B": OLMOE | _size(2048, 16, 16, 1024),  # OLMoE-1B-7B-0924, -0125
    # What OLMo-core calls olmoe_1B_7B is another model, which was never released.
    "olmoe_1B_7B_core": OLMO2
    | {"n_experts": 64, "n_experts_per_token": 8}
    | _size(2048, 16, 16, 1024),
    # The block of FlexOlmo-7x7B: OLMo 2's, with 7 experts of which a token takes 5.
    "flex_olmo_7x7B": OLMO2 | {"n_experts": 7, "n_experts_per_token": 5} | SIZES["7B"],
    "olmo3_7B_hf": OLMO3 | SIZES["7B"] | LONG_CONTEXT | HF_TABLE,  # ... as Hugging Face has it
    "olmo3_32B_hf": OLMO3 | SIZES["32B"] | LONG_CONTEXT | HF_TABLE,
}

# --- tests ----------------------------------------------------------------------------------------

TINY: Preset = {
    "vocab_size": 512,
    "max_seq_len": 64,
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 4,
    "head_dim": 16,
    "d_ff": 128,
}
TINY_RUN: dict[str, Preset] = {  # 20 steps of 8 rows, for a CPU
    "data": {"paths": ("tokens.npy",), "eos_id": 0, "seq_len": 64, "global_batch_size": 8 * 64},
    "optim": {"lr": 1e-3, "schedule": {"name": "cos_with_warmup", "warmup": 2}},
    "train": {"duration": 20, "duration_unit": "steps"},
    "compute": {"dtype": "float32", "remat": "none"},
    "checkpoint": {"interval": 10},
    "log": {"interval": 1},
}

# --- what the runs of a family share --------------------------------------------------------------

OLMO1_RUN: dict[str, Preset] = {  # trained with allenai/OLMo
    "data": {"dtype": "uint16", "eos_id": 50_279, "order": "legacy", "seed": 6198},
    "optim": {
        "name": "adamw",
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "no_decay": ("embed",),
        "max_grad_norm": 1.0,
    },
    # OLMo: the mean over valid labels of equal micro-batches, here one mean over the global batch.
    "train": {"seed": 6198, "z_loss": None, "loss_normalization": "global_tokens"},
}
OLMOE_RUN: dict[str, Preset] = {  # trained with a branch of allenai/OLMo, before its v0.4.0
    "data": OLMO1_RUN["data"] | {"seq_len": 4096},
    "optim": OLMO1_RUN["optim"] | {"eps": 1e-8, "no_decay": ()},
    "train": OLMO1_RUN["train"]
    | {"load_balancing_loss": 0.01, "router_z_loss": 0.001, "router_loss_form": "olmoe"},
}
OLMO2_RUN: dict[str, Preset] = {  # 1B, 7B, 13B: trained with allenai/OLMo from v0.4.0 on
    "data": {
        "dtype": "uint32",
        "eos_id": 100_257,
        "order": "legacy",
        "seed": 6198,
        "seq_len": 4096,
        "instance_filter": True,
    },
    "optim": OLMO1_RUN["optim"] | {"eps": 1e-8},
    # OLMo: the configs say z-loss 1e-5 in a field that the trainer never reads; it used 1e-4.
    # Its loss is divided by all positions, masked rows and the last column included.
    "train": {"seed": 6198, "z_loss": 1e-4, "loss_normalization": "legacy_positions"},
}
CORE_RUN: dict[str, Preset] = {  # OLMo 2 32B and Olmo 3: trained with allenai/OLMo-core
    "data": {"dtype": "uint32", "eos_id": 100_257, "order": "core", "seed": 34_521},
    "optim": OLMO2_RUN["optim"]
    | {"name": "skip_step_adamw", "skip_window": 128, "skip_sigma": 6.0},
    "train": {"seed": 0, "z_loss": 1e-5, "loss_normalization": "per_rank_tokens"},
}


def ladder(n_params: int, batch: int, multiple: int = 4) -> dict[str, Preset]:
    """The recipe of OLMo-core's scaling ladder, to be laid over CORE_RUN.

    The learning rate is held in periods that end at 0.5, 1, 2, .. `multiple` times 20 tokens per
    parameter; each ends with a linear decay over its last tenth, and a checkpoint is kept before
    and after every decay.

    Args:
      n_params: parameters without the input embedding.
      batch: tokens per step, a round number near 327,680 (n_params / 108e6)^(2/3).
      multiple: a power of two.
    Source: OLMo-core 2.6.0, model_ladder/wsds_chinchilla_run_configurator.py; arXiv 2410.05192.
    """
    multiples = [0.5 * 2**i for i in range(multiple.bit_length() + 1)]
    ends = [batch * round(int(20 * n_params * m) / batch) for m in multiples]
    periods = [end - start for start, end in pairwise([0, *ends])]
    before_decay = [end - round(0.1 * n) for end, n in zip(ends, periods, strict=True)]
    n_steps = ends[-1] // batch
    return {
        "data": {"global_batch_size": batch, "instance_filter": True},
        "optim": {
            "lr": 0.0047 * (n_params / 108e6) ** (-1 / 3) / 2,
            "beta2": 0.95 if batch >= 524_288 else 0.99,
            "schedule": {
                "name": "wsds",
                "unit": "tokens",
                "warmup": n_params,
                "decay_fraction": 0.1,
                "period_lengths": tuple(periods),
            },
        },
        # A fixed number of ranks: rows without loss weigh the same on any number of devices.
        "train": {"duration": ends[-1], "duration_unit": "tokens", "loss_ranks": 8},
        "checkpoint": {
            "interval": n_steps,
            "ephemeral_interval": 1000,
            "fixed_steps": tuple(sorted(tokens // batch for tokens in before_decay + ends)),
        },
    }
