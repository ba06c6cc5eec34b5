"""config.json: every field is read, fixed, harmless or refused."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import transformers
from hf import COMMON, ROPE

from olmo_jax import files, presets
from olmo_jax.checkpoints import checkpointer, storage
from olmo_jax.checkpoints.formats import hf_config
from olmo_jax.config import changes
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.run import Config
from olmo_jax.config.text import to_dict
from olmo_jax.config.training import CheckpointConfig
from olmo_jax.nn import rope
from olmo_jax.training import start
from olmo_jax.training.origin import find_origin


def saved(name: str, **options) -> dict:
    """What transformers writes for a config."""
    config = getattr(transformers, f"{name}Config")(**COMMON | options)
    config.architectures = [f"{name}ForCausalLM"]
    return json.loads(config.to_json_string())


def old(name: str = "Olmo3", **options) -> dict:
    """A config.json as the released models have it."""
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "rope_theta": 500_000.0,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        **COMMON,
        **(dict(sliding_window=5) if name == "Olmo3" else {}),
        **options,
    }


def inverse_frequencies(config: dict, kind: str) -> tuple[np.ndarray, float]:
    """Those of transformers' own rotary module."""
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    name = type(theirs).__name__.removesuffix("Config")
    module = getattr(transformers.models, name.lower())
    module = getattr(getattr(module, f"modeling_{name.lower()}"), f"{name}RotaryEmbedding")(theirs)
    if name != "Olmo3":
        return module.inv_freq.numpy(), module.attention_scaling
    found = getattr(module, f"{kind}_attention_inv_freq")
    return found.numpy(), getattr(module, f"{kind}_attention_attention_scaling")


def test_a_released_config_is_the_preset():
    config = {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0",
        "use_cache": False,
        "vocab_size": 100278,
    }
    want = ModelConfig(
        **presets.MODELS["olmo3_7B_hf"]
        | {"padded_vocab_size": None, "yarn_attention_factor": 1.2079441541679836}
    )
    assert hf_config.read(config, "config.json") == want
    assert hf_config.token_ids(config) == {
        "bos_token_id": None,
        "eos_token_id": 100257,
        "pad_token_id": 100277,
    }


@pytest.mark.parametrize("name", presets.MODELS)
def test_every_preset_is_the_same_after_the_way_out_and_in(name):
    model = ModelConfig(**presets.MODELS[name])
    config = hf_config.write(model, {}, "bfloat16")
    back = hf_config.read(json.loads(json.dumps(config)), "config.json")
    same = dict(
        init="normal",  # how training began is not said there
        padded_vocab_size=None,
        yarn_attention_factor=1.2079441541679836 if model.yarn_factor else None,
    )
    assert vars(back) == vars(model) | same
    found = changes.between({"model": to_dict(back)}, {"model": to_dict(model)})
    changes.refuse(found, ["model.padded_vocab_size"])  # rows that training may add


def test_eps_and_theta_are_read_and_never_taken_from_defaults():
    """Olmo2's defaults in transformers are 1e-5 and 10,000; the released models have others."""
    model = hf_config.read(old("Olmo2"), "config.json")
    assert (model.norm_eps, model.rope_theta) == (1e-6, 500_000.0)
    for key in ("rms_norm_eps", "rope_theta", "hidden_size", "max_position_embeddings"):
        config = old("Olmo2")
        del config[key]
        with pytest.raises(ValueError, match=f"{key} is missing"):
            hf_config.read(config, "config.json")


@pytest.mark.parametrize("form", ["old", "new", "exported"])
def test_yarn_is_on_full_layers_only_and_is_not_lost(form):
    config = old(rope_scaling=ROPE)
    if form == "new":
        config = saved("Olmo3", **{k: v for k, v in config.items() if k not in COMMON})
    model = hf_config.read(config, "config.json")
    assert (model.yarn_factor, model.yarn_attention_factor) == (8.0, ROPE["attention_factor"])
    if form == "exported":
        config = hf_config.write(model, {"pad_token_id": 1, "eos_token_id": 2}, "float32")
    for kind in ("full", "sliding"):
        inverse, factor = rope.frequencies(model, kind)
        want, want_factor = inverse_frequencies(config, kind)
        assert np.allclose(inverse, want, rtol=1e-6)
        assert factor == pytest.approx(want_factor, abs=1e-12)
    assert not np.allclose(
        rope.frequencies(model, "full")[0], rope.frequencies(model, "sliding")[0]
    )


def test_another_theta_reaches_all_layers_of_the_exported_config():
    """In the old form transformers 5 gives sliding layers 500,000, whatever rope_theta says."""
    model = ModelConfig(**presets.MODELS["olmo3_190M"] | {"rope_theta": 70_000.0})
    config = hf_config.write(model, {}, "float32")
    for kind in ("full", "sliding"):
        assert np.allclose(inverse_frequencies(config, kind)[0], rope.frequencies(model, kind)[0])
    assert hf_config.read(config, "config.json").rope_theta == 70_000.0


# Each spelling of a rotary embedding, in parts that are put together in all ways.
SHORT = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192)
THETAS = (None, 5e5, 1e6)
OLDEST = {"type" if key == "rope_type" else key: value for key, value in ROPE.items()}
SCALINGS = (None, {}, SHORT, ROPE, OLDEST, {"type": "default"})
PLAIN = [{"rope_type": "default"} | ({"rope_theta": t} if t else {}) for t in THETAS]
ONE_SETS = [
    *PLAIN,
    *(plain | SHORT for plain in PLAIN),
    ROPE | {"rope_theta": 1e6, "type": "default"},
    {"type": "yarn", "factor": 8.0},
]  # fmt: skip
SETS = [
    None,
    {},
    *ONE_SETS,
    *({"full_attention": one} for one in ONE_SETS),
    *({"sliding_attention": plain} for plain in PLAIN),
    *({"full_attention": one, "sliding_attention": None} for one in ONE_SETS),
    *({"full_attention": one, "sliding_attention": two} for one in ONE_SETS for two in PLAIN),
]


@pytest.mark.parametrize("name", ["Olmo2", "Olmo3"])
def test_any_spelling_of_the_rotary_embedding_is_transformers_or_refused(name):
    """P42: files that transformers 5 reads as another model than the one that wrote them did."""
    n_read = n_refused = 0
    for theta, old_set, new_set in itertools.product(THETAS, SCALINGS, SETS):
        parts = dict(rope_theta=theta, rope_scaling=old_set, rope_parameters=new_set)
        config = {k: v for k, v in (old(name) | parts).items() if v is not None}
        before = copy.deepcopy(config)
        try:
            model = hf_config.read(config, "config.json")
        except ValueError:
            n_refused += 1
            continue
        assert config == before
        n_read += 1
        for kind in set(model.layer_kinds):
            inverse, factor = rope.frequencies(model, kind)
            want, want_factor = inverse_frequencies(config, kind)
            assert np.allclose(inverse, want, rtol=1e-6), parts
            assert factor == pytest.approx(want_factor, abs=1e-12), parts
    assert n_read > 50
    assert n_refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(rope_theta=1e6),
            r"^config.json: rope_theta=1000000.0 goes to some layers only in transformers 5, which"
            r" takes 500000.0 for the others, and to all in older ones: write it in rope_parameters"
            r", under full_attention and sliding_attention$",
        ),
        (
            dict(rope_theta=None, rope_parameters=ROPE | {"rope_theta": 1e6}),
            r"^config.json: rope_parameters={.*}: Olmo3ForCausalLM needs one set under",
        ),
        (
            dict(rope_theta=1e6, rope_parameters={"full_attention": ROPE | {"rope_theta": 1e6}}),
            r"^config.json: rope_theta=1000000.0 goes to some layers only in transformers 5",
        ),
        (
            dict(rope_theta=None, rope_parameters={"sliding_attention": PLAIN[2]}),
            r"^config.json: rope_theta=1000000.0 goes to some layers only in transformers 5",
        ),
        (
            dict(rope_scaling=OLDEST),
            "^config.json: rope_scaling has type=yarn, which transformers 5 passes over in Olmo 3:"
            " write rope_type$",
        ),
    ],
)  # fmt: skip
def test_old_spellings_that_give_other_models_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.read({k: v for k, v in (old() | change).items() if v is not None}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_theta=10_000.0), "rope_theta=10000.0 goes to some layers only"),
        (dict(rope_parameters=ROPE | {"rope_theta": 5e5}), "needs one set under full_attention"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type='linear'; known"),
        (dict(rope_scaling=ROPE | {"llama_factor": 3}), "rotary embedding: unknown llama_factor"),
        (dict(rope_scaling=ROPE | {"truncate": False}), "truncate=False"),
        (dict(rope_scaling={"rope_type": "yarn"}), "YaRN has no factor"),
        (dict(rope_theta=None), "rope_theta is missing"),
        (
            dict(
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            ),
            "rope_theta is at once 10000.0, 500000.0",
        ),
        (
            dict(
                rope_parameters={
                    "full_attention": ROPE | {"rope_theta": 5e5},
                    "sliding_attention": ROPE | {"rope_theta": 5e5},
                }
            ),
            "sliding_attention is .* need rope_type default",
        ),
        (dict(layer_types=["full_attention"] * 3), "layer_types has 3 entries for 4 layers"),
        (dict(layer_types=["full_attention"] * 3 + ["linear"]), "layer_types has linear"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', but OLMo models have 'silu'"),
        (dict(attention_bias=True), "attention_bias=True, but OLMo models have False"),
        (dict(attention_dropout=0.1), "attention_dropout=0.1"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(clip_qkv=8.0), "clip_qkv=8.0 is no field of Olmo3ForCausalLM"),
        (
            dict(quantization_config={"bits": 4}),
            "quantization_config=.* is no field of .*: take the weights before they were quantized",
        ),
        (dict(logit_scale=2.0), "logit_scale=2.0 is no field"),
        (dict(sliding_window=None), "sliding_window is missing"),
        (dict(architectures=["Olmo2ForCausalLM"]), "is none of OlmoForCausalLM"),
        (dict(architectures=["LlamaForCausalLM"], model_type="llama"), "Llama.* is none of"),
    ],
)
def test_what_would_change_the_function_unseen_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        hf_config.read(old() | change, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_experts_per_tok=9), "num_experts_per_tok=9 is above num_experts=5$"),
        (dict(num_experts_per_tok=0), "num_experts_per_tok=0: need a positive whole number$"),
        (dict(num_experts_per_tok=True), "num_experts_per_tok=True: need a positive whole number$"),
        (dict(num_experts="5"), "num_experts='5': need a positive whole number$"),
        (dict(num_experts=-1), "num_experts=-1: need a positive whole number$"),
        (dict(num_experts=None), "^config.json: num_experts is missing$"),
        (dict(norm_topk_prob="yes"), "norm_topk_prob='yes': need true or false$"),
        (dict(rms_norm_eps=0), "rms_norm_eps=0: need a positive number$"),
        (dict(clip_qkv=8.0), "clip_qkv=8.0 is no field of OlmoeForCausalLM that is known here$"),
    ],
)
def test_wrong_fields_of_experts_are_named_alone(change, message):
    theirs = transformers.OlmoeConfig(num_experts=5, num_experts_per_tok=3).to_dict()
    config = theirs | {"architectures": ["OlmoeForCausalLM"]}
    assert hf_config.read(config, "config.json").n_experts_per_token == 3
    with pytest.raises(ValueError, match=message):
        hf_config.read(config | change, "config.json")


def test_a_known_family_that_is_not_here_yet_is_named():
    config = {"architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid"}
    with pytest.raises(ValueError, match="OlmoHybridForCausalLM is known, but this version"):
        hf_config.read(config, "config.json")


def test_the_marks_of_other_tools_change_nothing():
    marks = {"unsloth_version": "2025.9.1", "unsloth_fixed": True, "transformers_version": "4.57"}
    assert hf_config.read(old() | marks, "config.json") == hf_config.read(old(), "config.json")


def test_an_old_theta_is_no_question_where_all_layers_are_full():
    config = old(rope_theta=10_000.0, layer_types=["full_attention"] * 4)
    assert hf_config.read(config, "config.json").rope_theta == 10_000.0


def test_depths_that_are_no_multiple_of_four_slide_as_in_transformers():
    config = old(num_hidden_layers=6)
    theirs = transformers.Olmo3Config(**{k: v for k, v in config.items() if k != "architectures"})
    model = hf_config.read(config, "config.json")
    assert [f"{kind}_attention" for kind in model.layer_kinds] == theirs.layer_types


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_position="before"), "norm_position='before'"),
        (dict(qk_norm="none"), "qk_norm='none'"),
        (dict(clip_qkv=8.0), "clip_qkv=8.0"),
        (dict(norm="nonparametric"), "norm_position='after'"),
    ],
)
def test_a_model_that_hugging_face_has_not_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f"no Hugging Face model is like this one.*{message}"):
        hf_config.write(ModelConfig(**change), {}, "float32")


def test_head_dim_is_written_where_it_does_not_follow():
    model = ModelConfig(d_model=64, n_heads=4, n_kv_heads=4, head_dim=32, d_ff=48, n_layers=4)
    config = hf_config.write(model, {"pad_token_id": 1}, "float32")
    assert config["head_dim"] == 32
    assert hf_config.read(config, "config.json") == model
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config | {"vocab_size": 97})
    )
    assert theirs.model.layers[0].self_attn.q_proj.weight.shape == torch.Size([128, 64])


def test_yarn_that_came_back_from_hugging_face_starts_a_run_with_the_config_that_left(tmp_path):
    """Hugging Face writes the factor on cos and sin out, the config leaves it to follow."""
    model = ModelConfig(**presets.MODELS["olmo3_7B_long"] | {"padded_vocab_size": None})
    back = to_dict(hf_config.read(hf_config.write(model, {}, "float32"), "config.json"))
    assert back["yarn_attention_factor"] == 1.2079441541679836
    meta = {"model": back, "config": {"model": back}}
    storage.ArrayWriter(files.path(tmp_path / "ours"), {}).commit(meta)  # as to_jax writes it
    options = CheckpointConfig(load_path=str(tmp_path / "ours"), load_optimizer=False)
    config = Config(dir=str(tmp_path / "run"), model=model, checkpoint=options)
    run = checkpointer.Checkpointer(config.checkpoint, config.run_dir)
    source = find_origin(config.checkpoint, config.model, run)
    assert start.first_step(source, to_dict(config), ()) == 0
    other = dataclasses.replace(config, model=dataclasses.replace(model, yarn_factor=4.0))
    with pytest.raises(ValueError, match=r"^config\.model\.yarn_factor=4\.0, but"):
        start.first_step(source, to_dict(other), ())
