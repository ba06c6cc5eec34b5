"""The published models: shapes, switches and parameter counts; the ladder's recipe."""

import functools
import json
import math

import jax
import made
import pytest

from olmo_jax import config, presets
from olmo_jax.config import costs, parameters
from olmo_jax.config.run import validate
from olmo_jax.nn import transformer
from olmo_jax.parallel import sharding
from olmo_jax.training import schedules

# Total, non-embedding and core counts of the Hugging Face classes.
RELEASED = {
    "olmo1_1B": (1_176_764_416, 1_073_741_824, 1_073_741_824),
    "olmo1_1B_0724": (1_279_787_008, 1_176_764_416, 1_073_741_824),
    "olmo1_7B": (6_888_095_744, 6_682_050_560, 6_476_005_376),
    "olmo1_7B_0424": (6_888_095_744, 6_682_050_560, 6_476_005_376),
    "olmo1_7B_0724": (6_888_095_744, 6_682_050_560, 6_476_005_376),
    "olmoe_1B_7B": (6_919_161_856, 6_816_139_264, 6_713_116_672),
    "olmo2_1B_v2": (1_484_916_736, 1_279_395_840, 1_073_874_944),
    "olmo2_7B": (7_298_617_344, 6_887_575_552, 6_476_533_760),
    "olmo2_13B": (13_716_198_400, 13_202_396_160, 12_688_593_920),
    "olmo2_32B": (32_234_279_936, 31_720_477_696, 31_206_675_456),
    "olmo3_7B": (7_298_617_344, 6_887_575_552, 6_476_533_760),
    "olmo3_7B_long": (7_298_617_344, 6_887_575_552, 6_476_533_760),
    "olmo3_32B": (32_234_279_936, 31_720_477_696, 31_206_675_456),
    "olmo3_32B_long": (32_234_279_936, 31_720_477_696, 31_206_675_456),
}

# d_model, n_layers, n_heads, d_ff, total and core in millions as printed.
LADDER = {
    "olmo2_1M": (12, 4, 4, 256, None, None),
    "olmo2_14M": (128, 4, 8, 512, None, None),
    "olmo2_30M": (256, 4, 8, 768, "54.79", "3.41"),
    "olmo2_60M": (384, 8, 8, 1536, "95.96", "18.89"),
    "olmo2_100M": (512, 12, 8, 2048, "153.1", "50.36"),
    "olmo2_190M": (768, 12, 12, 3072, "267.4", "113.28"),
    "olmo2_370M": (1024, 16, 16, 4096, "474.0", "268.5"),
    "olmo2_600M": (1344, 16, 16, 5376, "732.3", "462.5"),
    "olmo3_600M": (1280, 16, 16, 5120, "676.4", "419.5"),
    "olmo2_760M": (1536, 16, 16, 6144, "912.4", "604.1"),
    "olmo2_1B": (2048, 18, 16, 8192, "1619.150848", None),
    "olmo2_1B_v2": (2048, 16, 16, 8192, "1484.916736", "1073.874944"),
    "olmo3_1B": (2048, 16, 16, 8192, "1484.916736", "1073.874944"),
    "olmo2_3B": (3328, 16, 16, 13_312, "3503.508736", None),
}


def model(name: str) -> config.ModelConfig:
    return config.ModelConfig(**presets.MODELS[name])


@pytest.mark.parametrize("name", RELEASED)
def test_counts_of_released_models_are_exact(name):
    counts = costs.n_params(model(name))
    assert (counts.total, counts.non_embedding, counts.core) == RELEASED[name]


def test_a_token_of_olmoe_meets_1_3b_parameters():
    active = costs.n_params(model("olmoe_1B_7B"), active=True)
    idle = 16 * 56 * 3 * 2048 * 1024  # experts that it does not take
    assert active.total == 6_919_161_856 - idle == 1_282_017_280


@pytest.mark.parametrize("name", LADDER)
def test_ladder_shapes_and_counts_are_those_of_olmo_core(name):
    d_model, n_layers, n_heads, d_ff, total, core = LADDER[name]
    m, counts = model(name), costs.n_params(model(name))
    assert (m.d_model, m.n_layers, m.n_heads, m.d_ff) == (d_model, n_layers, n_heads, d_ff)
    assert m.n_kv_heads == n_heads
    assert m.head_dim == (4 if name == "olmo2_1M" else d_model // n_heads)
    for count, printed in ((counts.total, total), (counts.core, core)):
        if printed is not None:
            digits = len(printed.split(".")[1])
            assert f"{count / 1e6:.{digits}f}" == printed


def test_feed_forward_width_follows_the_rule():
    unscaled = ("1M", "14M", "30M", "7B", "13B")
    for name, size in presets.SIZES.items():
        d = size["d_model"]
        multiple, factor = 256, 1.0 if name in unscaled else 1.5
        if name == "32B":
            multiple, factor = 512, 27_648 / (8 * d / 3)
        assert size["d_ff"] == math.ceil(int(factor * int(8 * d / 3)) / multiple) * multiple, name


def test_counts_equal_those_of_olmo_core_itself(shared):
    golden = json.loads((shared / "golden" / "train_math.json").read_text())
    counted = golden["flops_per_token"]["models"]
    dense = {name: values for name, values in counted.items() if not name.startswith("olmoe")}
    for name, values in dense.items():
        assert costs.n_params(model(name)).total == values["num_params"], name


def test_olmo3_has_every_size_of_olmo2():
    sizes = {name.removeprefix("olmo2_") for name in presets.MODELS if name.startswith("olmo2_")}
    for size in sizes - {"1B_v2"}:
        assert f"olmo3_{size}" in presets.MODELS


@pytest.mark.parametrize("name", presets.MODELS)
def test_every_model_is_a_valid_model_of_its_family(name):
    m = model(name)
    run = config.Config(
        model=m,
        data=config.FixedLength(paths=("x",), seq_len=m.max_seq_len, global_batch_size=65_536),
    )
    validate(run, 1)
    if name.startswith("olmo1"):
        assert (m.norm, m.norm_position, m.qk_norm) == ("nonparametric", "before", "none")
        assert (m.norm_eps, m.rope_theta, m.init) == (1e-5, 1e4, "mitchell")
        assert (m.vocab_size, m.vocab_rows) == (50_304, 50_304)
        assert m.layer_kinds == ("full",) * m.n_layers
        is_first = name in ("olmo1_1B", "olmo1_7B")
        assert (m.clip_qkv, m.max_seq_len) == ((None, 2048) if is_first else (8.0, 4096))
    elif name == "olmoe_1B_7B":
        assert (m.norm, m.norm_position, m.qk_norm) == ("rms", "before", "full")
        assert (m.norm_eps, m.rope_theta, m.init, m.init_std) == (1e-5, 1e4, "normal", 0.02)
        assert (m.vocab_rows, m.n_experts, m.n_experts_per_token) == (50_304, 64, 8)
        assert m.d_ff == 1024
    else:
        assert (m.norm, m.norm_position, m.qk_norm) == ("rms", "after", "full")
        assert (m.norm_eps, m.rope_theta, m.clip_qkv) == (1e-6, 5e5, None)
        assert (m.init, m.init_std) == ("normal", 0.02)
        assert m.vocab_rows == 100_352
    assert m.tie_embeddings == (name == "olmo1_1B")
    assert m.n_kv_heads == (8 if "32B" in name else m.n_heads)
    if name.startswith("olmo3"):
        for i, kind in enumerate(m.layer_kinds):
            assert kind == ("full" if (i + 1) % 4 == 0 else "sliding")
        assert m.window == 4096
        is_long = name.endswith(("_long", "_hf"))
        assert (m.yarn_factor, m.max_seq_len) == ((8.0, 65_536) if is_long else (None, 8192))
    else:
        assert (m.window, m.yarn_factor) == (None, None)


@pytest.mark.parametrize(("size", "total"), [("7B", 7_298_011_136), ("32B", 32_233_522_176)])
def test_hugging_face_tables_of_olmo3_hold_tokens_only(size, total):
    m = model(f"olmo3_{size}_hf")
    assert (m.vocab_size, m.vocab_rows) == (100_278, 100_352)
    unpadded = config.ModelConfig(
        **presets.MODELS[f"olmo3_{size}_hf"] | {"padded_vocab_size": None}
    )
    assert costs.n_params(unpadded).total == total
    assert costs.n_params(m).total == RELEASED[f"olmo3_{size}"][0]


def test_long_context_scales_like_the_released_config():
    m = model("olmo3_7B_long")
    assert (m.yarn_original_len, m.yarn_beta_fast, m.yarn_beta_slow) == (8192, 32.0, 1.0)
    assert m.yarn_attention_factor is None
    assert 0.1 * math.log(m.yarn_factor) + 1 == 1.2079441541679836


def test_applying_another_model_leaves_nothing_of_the_first():
    c = config.default()
    c.model.update(presets.MODELS["olmo1_7B_0424"])
    c.model.update(presets.MODELS["olmo3_32B_long"])
    c.model.update(presets.MODELS["olmo2_7B"])
    assert config.from_dict(c).model == model("olmo2_7B")


def test_ladder_follows_the_scaling_rule():
    n, batch = 190_354_176, 524_288
    c = config.default()
    c.update(presets.CORE_RUN)
    c.update(presets.ladder(n, batch, multiple=4))
    cfg = config.from_dict(c)
    assert cfg.optim.lr == pytest.approx(0.0047 * (n / 108e6) ** (-1 / 3) / 2, rel=1e-12)
    assert (cfg.optim.beta2, cfg.train.z_loss, cfg.optim.no_decay) == (0.95, 1e-5, ("embed",))
    assert cfg.optim.schedule.warmup == n
    ends = [sum(cfg.optim.schedule.period_lengths[: i + 1]) for i in range(4)]
    for end, multiple in zip(ends, (0.5, 1, 2, 4), strict=True):
        assert end % batch == 0
        assert abs(end - 20 * n * multiple) <= batch / 2
        assert end // batch in cfg.checkpoint.fixed_steps
        assert schedules.learning_rate(cfg.optim, end, ends[-1]) == 0.0
    assert cfg.train.duration == ends[-1]
    assert schedules.learning_rate(cfg.optim, n, ends[-1]) == pytest.approx(cfg.optim.lr)
    # Steps before a decay still have the peak.
    for step in cfg.checkpoint.fixed_steps[::2]:
        rate = schedules.learning_rate(cfg.optim, step * batch, ends[-1])
        assert rate == pytest.approx(cfg.optim.lr, rel=1e-3)
    assert presets.ladder(n, 458_752)["optim"]["beta2"] == 0.99
    assert len(presets.ladder(n, batch, multiple=1)["optim"]["schedule"]["period_lengths"]) == 2


SPLIT = {  # the mesh axis that divides each dimension
    "embed": ("tensor", "fsdp"),
    "layers/attn/wq": (None, "fsdp", "tensor", None),
    "layers/attn/wo": (None, "tensor", None, "fsdp"),
    "layers/attn/k_norm": (None, "tensor", None),
    "layers/attn_norm": (None, None),
    "layers/mlp/w_gate": (None, "fsdp", "tensor"),
    "layers/mlp/w_down": (None, "tensor", "fsdp"),
    "layers/moe/router": (None, "fsdp", None),
    "layers/moe/w_up": (None, "expert", "fsdp", "tensor"),
    "layers/moe/w_down": (None, "expert", "tensor", "fsdp"),
    "final_norm": (None,),
    "lm_head": ("fsdp", "tensor"),
}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("olmo3_32B", {"layers/attn/wk": (64, 5120, 8, 128), "lm_head": (5120, 100_352),
                       "layers/mlp/w_down": (64, 27_648, 5120), "layers/attn_norm": (64, 5120)}),
        ("olmo1_1B", {"embed": (50_304, 2048), "layers/attn/wo": (16, 16, 128, 2048)}),
        ("olmoe_1B_7B", {"layers/moe/w_gate": (16, 64, 2048, 1024),
                         "layers/moe/router": (16, 2048, 64), "layers/attn/q_norm": (16, 16, 128)}),
    ],
)  # fmt: skip
def test_shapes_and_splits_of_parameters(name, shapes):
    table = parameters.table(config.ModelConfig(**presets.MODELS[name]))
    assert {path: table[path].shape for path in shapes} == shapes
    for path in SPLIT.keys() & table.keys():
        assert tuple(sharding.spec(table[path].stored_axes)) == SPLIT[path], path


@pytest.mark.parametrize("name", ["olmo1_1B", "olmo3_7B", "olmoe_1B_7B"])
def test_the_model_fetches_all_parameters_of_the_table_and_no_other(name):
    model = transformer.Transformer(config.ModelConfig(**presets.MODELS[name] | {"n_layers": 4}))
    table = parameters.table(model.config)

    def trace(rows):
        params = parameters.nested(
            {path: jax.ShapeDtypeStruct(row.shape, "float32") for path, row in rows.items()}
        )
        tokens = jax.ShapeDtypeStruct((1, 8), "int32")
        return jax.eval_shape(functools.partial(made.logits_of, model), params, tokens)

    assert trace(table).shape == (1, 8, model.config.vocab_size)
    for path in table:
        rest = {other: row for other, row in table.items() if other != path}
        missing = "embed is missing" if path == "embed" else f"{path} is missing"
        with pytest.raises(ValueError, match=missing):
            trace(rest)
