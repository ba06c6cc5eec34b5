"""FLOPs, parameter counts and memory by formula, against OLMo-core's own numbers."""

import dataclasses
import json
import subprocess
import sys

import pytest

from olmo_jax.config import costs
from olmo_jax.config.model import ModelConfig


def model(d_model, n_layers, n_heads, d_ff, **options) -> ModelConfig:
    options = {"n_kv_heads": n_heads, "head_dim": d_model // n_heads, **options}
    return ModelConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, **options
    )  # fmt: skip


OLMO2 = {
    "olmo2_30M": model(256, 4, 8, 768),
    "olmo2_190M": model(768, 12, 12, 3072),
    "olmo2_370M": model(1024, 16, 16, 4096),
    "olmo2_1B_v2": model(2048, 16, 16, 8192),
    "olmo2_7B": model(4096, 32, 32, 11008),
    "olmo2_13B": model(5120, 40, 40, 13824),
    "olmo2_32B": model(5120, 64, 40, 27648, n_kv_heads=8),
}
PATTERN = {"layer_types": ("sliding",) * 3 + ("full",), "window": 4096}
OLMO3 = {
    name.replace("olmo2", "olmo3").removesuffix("_v2"): dataclasses.replace(m, **PATTERN)
    for name, m in OLMO2.items()
    if name not in ("olmo2_30M", "olmo2_13B")
}
MODELS = OLMO2 | OLMO3


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/train_math.json").read_text())["flops_per_token"]["models"]


def test_flops_and_counts_equal_olmo_core_to_the_last_unit(golden):
    dense = set(golden) - {"olmoe_1B_7B"}
    assert dense == set(MODELS)
    for name in dense:
        expected, counts = golden[name], costs.n_params(MODELS[name])
        assert counts.total == expected["num_params"]
        assert counts.non_embedding == expected["num_non_embedding_params"]
        for seq_len, value in expected["flops_per_token_core_3"].items():
            assert costs.flops_per_token(MODELS[name], int(seq_len)) == value
        for seq_len, value in expected["flops_per_token"].items():
            assert costs.flops_per_token_core2(MODELS[name], int(seq_len)) == value


OLMO1 = {"vocab_size": 50304, "norm": "nonparametric", "qk_norm": "none"}


@pytest.mark.parametrize(
    ("config", "total", "non_embedding", "core"),
    [
        (model(2048, 16, 16, 8192, tie_embeddings=True, **OLMO1), 1176764416, 1073741824, None),
        (model(2048, 16, 16, 8192, **OLMO1), 1279787008, 1176764416, 1073741824),
        (model(4096, 32, 32, 11008, **OLMO1), 6888095744, 6682050560, 6476005376),
        (OLMO2["olmo2_1B_v2"], 1484916736, 1279395840, 1073874944),
        (OLMO2["olmo2_32B"], 32234279936, 31720477696, 31206675456),
        (
            dataclasses.replace(OLMO3["olmo3_7B"], vocab_size=100278),
            7298011136, 6887272448, 6476533760,
        ),
        (
            dataclasses.replace(
                OLMO3["olmo3_7B"], vocab_size=100278, padded_vocab_size=100352
            ),
            7298617344, 6887575552, 6476533760,
        ),
    ],
)  # fmt: skip
def test_counts_equal_the_released_models(config, total, non_embedding, core):
    assert costs.n_params(config) == costs.ParameterCounts(
        total, non_embedding, core or non_embedding
    )


def test_a_tied_head_costs_as_much_as_one_of_its_own():
    tied = model(2048, 16, 16, 8192, tie_embeddings=True, **OLMO1)
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert costs.flops_per_token(tied, 2048) == costs.flops_per_token(untied, 2048)


def test_attention_counts_the_pairs_of_the_mask():
    config = model(8, 3, 2, 8, layer_types=("sliding", "full", "full"), window=3)
    seq_len = 7
    seen = [(q - k < 3, True, True) for q in range(seq_len) for k in range(q + 1)]
    pairs = [sum(layer) for layer in zip(*seen, strict=True)]
    without = dataclasses.replace(config, n_heads=0)  # no such model; only its pairs are gone
    extra = costs.flops_per_token(config, seq_len) - costs.flops_per_token(without, seq_len)
    weights = costs.n_params(config).core - costs.n_params(without).core
    assert extra - 6 * weights == sum(12 * 2 * 4 * p // seq_len for p in pairs)


def test_a_window_as_long_as_the_row_is_full_attention():
    full = OLMO2["olmo2_7B"]
    for seq_len in (1024, 4096):
        sliding = OLMO3["olmo3_7B"]
        assert costs.flops_per_token(sliding, seq_len) == costs.flops_per_token(full, seq_len)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA GH200 144G HBM3e", 989.5e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("AMD Instinct MI300X", 1307.4e12),
        ("AMD Instinct MI250X", 383e12 / 2),
        # A guess would be worse than no figure.
        ("cpu", None),
        ("", None),
        ("TPU v9", None),
        ("TPU v5 lite pro", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA B200 MIG 1g.23gb", None),
        ("NVIDIA L40S", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_the_named_chip_and_of_no_other(kind, peak):
    assert costs.peak_flops(kind) == peak


def test_state_of_one_device_is_sixteen_bytes_per_parameter():
    config = OLMO2["olmo2_1B_v2"]
    total = costs.n_params(config).total
    one = costs.state_bytes(config, {})
    assert one == costs.StateBytes(4 * total, 8 * total, 4 * total)
    assert one.total == 16 * total
    assert costs.state_bytes(config, {}, "bfloat16").gradients == 2 * total


def test_fsdp_divides_matrices_and_tensor_divides_what_it_should():
    config = model(64, 2, 4, 128, n_kv_heads=2, vocab_size=256)
    embed, norms = 2 * 256 * 64, (2 * 2 + 1) * 64
    attention, mlp, qk = 2 * 64 * (4 + 2) * 16 * 2, 2 * 3 * 64 * 128, 2 * (4 + 2) * 16
    matrices = embed + attention + mlp
    assert costs.n_params(config).total == matrices + norms + qk

    def params(**mesh_shape):
        return costs.state_bytes(config, mesh_shape).params / 4

    assert params(fsdp=8) == matrices / 8 + norms + qk
    assert params(tensor=2) == (matrices + qk) / 2 + norms
    assert params(fsdp=4, tensor=2) == matrices / 8 + qk / 2 + norms
    assert params(data=8, context=4) == matrices + norms + qk


def test_sizing_needs_no_jax():
    code = "import sys, olmo_jax.config.costs; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
