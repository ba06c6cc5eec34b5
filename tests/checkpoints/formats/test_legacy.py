"""Checkpoints of OLMo's first trainer: read by us, judged by its own code and by transformers."""

import base64
import pathlib
import pickle

import numpy as np
import pytest
import web
import yaml

torch = pytest.importorskip("torch")
import ai2
import hf
import safetensors.torch
from short_runs import BATCHES, assert_goes_on

from olmo_jax import presets
from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats import (
    folders,
    legacy,
)
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.run import from_dict

SCRIPT = pathlib.Path(__file__).with_name("train_olmo.py")
MODEL = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 4,
    "mlp_hidden_size": 96,
    "activation_type": "swiglu",
    "block_type": "sequential",
    "block_group_size": 1,
    "alibi": False,
    "rope": True,
    "flash_attention": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "max_sequence_length": 65536,
    "vocab_size": 95,
    "embedding_size": 97,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "init_device": "cuda",
    "init_fn": "normal",
    "init_std": 0.02,
    "init_cutoff_factor": 3,
}
OLMO1 = {"layer_norm_type": "default", "layer_norm_with_affine": False, "weight_tying": False}
OLMO2 = {
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-6,
    "attention_layer_norm": True,
    "attention_layer_norm_with_affine": True,
    "norm_after": True,
    "weight_tying": False,
    "rope_theta": 500_000,
}
OLMOE = {  # branch Muennighoff/MoE, as in its released configs
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": True,
    "attention_layer_norm_with_affine": True,
    "weight_tying": False,
    "block_type": "moe",
    "moe_num_experts": 8,
    "moe_top_k": 3,
    "moe_dropless": True,
    "moe_mlp_impl": "sparse",
    "moe_zloss_weight": 0.001,
    "moe_loss_weight": 0.01,
}
# tests/hf.py's name of a random model -> what OLMo's config says of it.
CONFIGS = {
    "olmo1 tied": MODEL | OLMO1 | {"weight_tying": True},
    "olmo1 clipped": MODEL | OLMO1 | {"clip_qkv": 0.7},
    "olmo2": MODEL | OLMO2,
    "olmo2 grouped": MODEL | OLMO2 | {"n_kv_heads": 2},
    "olmoe": MODEL | OLMOE,
}


def megablocks(state: dict, prefix: str) -> dict:
    """A layer's experts as megablocks has them: (act(x w1ᵀ) * (x v1ᵀ)) w2, stacked by rows."""
    gate, up = state[f"{prefix}experts.gate_up_proj"].chunk(2, dim=1)
    down = state[f"{prefix}experts.down_proj"].transpose(1, 2)
    return {
        "router.layer.weight": state[f"{prefix}gate.weight"],
        "experts.mlp.w1": gate.flatten(0, 1),
        "experts.mlp.v1": up.flatten(0, 1),
        "experts.mlp.w2": down.flatten(0, 1),
    }


def legacy_state(state: dict, is_tied: bool) -> dict:
    """Hugging Face's tensors as OLMo has them: q, k and v in one, up before gate in another."""
    is_moe = "model.layers.0.mlp.gate.weight" in state
    found = {"transformer.wte.weight": state["model.embed_tokens.weight"]}
    for i in range(4):
        theirs, ours = f"model.layers.{i}.", f"transformer.blocks.{i}."
        attn = [state[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv"]
        found[f"{ours}att_proj.weight"] = torch.cat(attn)
        found[f"{ours}attn_out.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        if is_moe:
            found |= {
                f"{ours}ffn.{key}": w for key, w in megablocks(state, f"{theirs}mlp.").items()
            }
        else:
            mlp = [state[f"{theirs}mlp.{x}_proj.weight"] for x in ("up", "gate")]
            found[f"{ours}ff_proj.weight"] = torch.cat(mlp)
            found[f"{ours}ff_out.weight"] = state[f"{theirs}mlp.down_proj.weight"]
        norms = {
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
            "attn_norm": "post_attention_layernorm",
            "ff_norm": "post_feedforward_layernorm",
        }
        if is_moe:  # norms before the sub-layers
            norms |= {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
        for name, key in norms.items():
            if f"{theirs}{key}.weight" in state:
                found[f"{ours}{name}.weight"] = state[f"{theirs}{key}.weight"]
    if "model.norm.weight" in state:
        found["transformer.ln_f.weight"] = state["model.norm.weight"]
    if not is_tied:
        found["transformer.ff_out.weight"] = state["lm_head.weight"]
    return {key: value.clone() for key, value in found.items()}


def save(folder: pathlib.Path, state: dict, model: dict, **optimizer) -> str:
    folder.mkdir(exist_ok=True)
    config = {"model": model, "optimizer": {"name": "adamw", "eps": 1e-5} | optimizer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / "model.pt")
    return str(folder)


def save_optimizer(folder: pathlib.Path, state: dict, *, by_number: bool, prefix: str = "") -> None:
    """Adam's state in one of the two forms that OLMo wrote, and the trainer's."""
    names = [prefix + key for key in state]
    moments = [
        {"exp_avg": 2 * p, "exp_avg_sq": p * p, "step": torch.tensor(3.0)} for p in state.values()
    ]
    keys = list(range(len(names))) if by_number else names
    groups = [{"params": keys, "param_names": names, "lr": 0.1, "sharded": True}]
    torch.save(
        {"state": dict(zip(keys, moments, strict=True)), "param_groups": groups},
        folder / "optim.pt",
    )
    torch.save({"global_step": 3, "checkpoints": [folder]}, folder / "train.pt")


@pytest.fixture(scope="module")
def models():
    """Random models: OLMo's state, our config and parameters, by name."""
    found = {}
    for name, config in CONFIGS.items():
        model, ours, params = hf.random_model(name)
        found[name] = legacy_state(model.state_dict(), config["weight_tying"]), ours, params
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_where_it_belongs(tmp_path, models, name):
    state, config, params = models[name]
    src = save(tmp_path / "step3-unsharded", state, CONFIGS[name])
    assert legacy.recognises(src)
    weights = legacy.read(src)
    want = {f"params/{key}": leaf for key, leaf in storage.names(params).items()}
    assert weights.leaves.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(weights.read(key), value)
    assert weights.model == config
    assert weights.meta["token_ids"] == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}


def test_att_proj_is_q_then_k_then_v_and_ff_proj_up_then_gate(tmp_path, models):
    state, _, _ = models["olmo2 grouped"]
    rows = {key: torch.zeros_like(value) for key, value in state.items()}
    rows["transformer.blocks.1.att_proj.weight"] += torch.arange(128.0)[:, None]
    rows["transformer.blocks.1.ff_proj.weight"] += torch.arange(96.0)[:, None]
    weights = legacy.read(save(tmp_path / "step3", rows, CONFIGS["olmo2 grouped"]))
    starts = {"attn/wq": 0, "attn/wk": 64, "attn/wv": 96, "mlp/w_up": 0, "mlp/w_gate": 48}
    for name, start in starts.items():
        column = weights.read(f"params/layers/{name}")[1, 0].reshape(-1)
        np.testing.assert_array_equal(column, start + np.arange(len(column)))


def test_any_part_of_a_leaf_is_read(tmp_path, models):
    state, _, params = models["olmo2 grouped"]
    weights = legacy.read(save(tmp_path / "step3", state, CONFIGS["olmo2 grouped"]))
    rng = np.random.default_rng(0)
    for name, value in storage.names(params).items():
        for _ in range(4):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in value.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            part = weights.read(f"params/{name}", index)
            np.testing.assert_array_equal(part, np.asarray(value)[index])


@pytest.mark.parametrize("form", ["olmo", "plain"])
def test_safetensors_with_hidden_names_are_read(tmp_path, models, form):
    state, _, params = models["olmo2 grouped"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2 grouped"])
    (tmp_path / "step3" / "model.pt").write_bytes(b"older")  # OLMo takes the other too
    hide = lambda key: base64.urlsafe_b64encode(pickle.dumps(((key,), False))).decode()  # noqa: E731
    named = {hide(key) if form == "olmo" else key: value for key, value in state.items()}
    safetensors.torch.save_file(named, tmp_path / "step3" / "model.safetensors")
    weights = legacy.read(src)
    np.testing.assert_array_equal(
        weights.read("params/layers/mlp/w_gate"), params["layers"]["mlp"]["w_gate"]
    )


@pytest.mark.parametrize("by_number", [True, False])
@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module."])
def test_moments_lie_like_their_parameters(tmp_path, models, by_number, prefix):
    state, _, params = models["olmo2 grouped"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2 grouped"])
    save_optimizer(tmp_path / "step3", state, by_number=by_number, prefix=prefix)
    weights = legacy.read(src, optimizer=True)
    for name, value in storage.names(params).items():
        np.testing.assert_array_equal(weights.read(f"opt_state/mu/{name}"), 2 * value)
        np.testing.assert_array_equal(weights.read(f"opt_state/nu/{name}"), value * value)
    assert int(weights.read("step")) == int(weights.read("opt_state/count")) == 3
    assert from_dict(weights.meta["config"]).optim.eps == 1e-5


def test_a_folder_on_a_web_server_is_read_by_ranges(tmp_path, models, monkeypatch):
    state, _, params = models["olmo2 grouped"]
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.001)
    save(tmp_path / "step3", state, CONFIGS["olmo2 grouped"])
    with web.serving(tmp_path) as server:
        server.faults = ["cut", "503", ""] * 20
        weights = legacy.read(f"{server.url}/step3")
        before = server.n_bytes
        found = weights.read("params/layers/attn/wk", np.s_[2:3, 0:64, 0:2, 0:16])
        np.testing.assert_array_equal(found, params["layers"]["attn"]["wk"][2:3])
        assert server.n_bytes - before < 80_000  # of 300,000: one part of one tensor


def test_its_kind_is_recognised_here_and_behind_https(tmp_path, models):
    src = save(tmp_path / "step3", models["olmo2"][0], CONFIGS["olmo2"])
    with web.serving(tmp_path) as server:
        for name in (src, f"{server.url}/step3"):
            assert open_weights(name).line == "OLMo (config.yaml), 35 tensors in model.pt"


REFUSED = {
    "block_type": ("llama", r"model\.block_type is 'llama'"),
    "block_group_size": (4, r"block_group_size is 4"),
    "activation_type": ("gelu", r"activation_type is 'gelu'"),
    "alibi": (True, r"alibi is True"),
    "rope": (False, r"rope is False"),
    "include_bias": (True, r"include_bias is True; olmo_jax has no biases"),
    "residual_dropout": (0.1, r"residual_dropout is 0\.1"),
    "scale_logits": (True, r"scale_logits is True"),
    "layer_norm_type": ("default", r"layer_norm_type 'default' with layer_norm_with_affine True"),
    "layer_norm_with_affine": (False, r"layer_norm_type 'rms' with layer_norm_with_affine False"),
    "attention_layer_norm_with_affine": (False, r"attention_layer_norm: olmo_jax has only RMSNorm"),
    "moe_num_experts": (8, r"moe_num_experts is 8; olmo_jax does not know this option"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_changes_the_function_is_refused_by_name(option):
    value, message = REFUSED[option]
    config = {"model": CONFIGS["olmo2"] | {option: value}}
    with pytest.raises(ValueError, match=message) as error:
        legacy.read_config(config, "step3/config.yaml")
    assert str(error.value).startswith("step3/config.yaml: ")
    assert "\n" not in str(error.value)


# The model sections of the configs that Ai2 published, but for what is the same in all of them.
NEOX = dict(
    vocab_size=50_280, embedding_size=50_304, eos_token_id=50_279, multi_query_attention=False
)
PLAIN = dict(attention_layer_norm_with_affine=False, multi_query_attention=False)
OFFICIAL1 = OLMO1 | NEOX | PLAIN | {"init_fn": "mitchell"}
DOLMA2 = dict(
    vocab_size=100_278, embedding_size=100_352, eos_token_id=100_257, layer_norm_eps="1e-6"
)
LARGE = dict(d_model=4096, n_heads=32, n_layers=32, mlp_hidden_size=22_016)
OFFICIAL = {
    "olmo1_1B": OFFICIAL1
    | dict(d_model=2048, n_heads=16, n_layers=16, mlp_ratio=8, mlp_hidden_size=None)
    | dict(weight_tying=True, max_sequence_length=2048),
    "olmo1_7B": OFFICIAL1 | LARGE | dict(max_sequence_length=2048),
    "olmo1_7B_0424": OFFICIAL1 | LARGE | dict(max_sequence_length=4096, clip_qkv=8.0),
    "olmo2_7B": OLMO2 | DOLMA2 | LARGE | dict(max_sequence_length=4096, layer_norm_eps="1e-6"),
    "olmoe_1B_7B": OLMOE
    | dict(vocab_size=50280, embedding_size=50304, d_model=2048, n_heads=16, n_layers=16)
    | dict(mlp_hidden_size=None, mlp_ratio=1, max_sequence_length=4096)
    | dict(moe_num_experts=64, moe_top_k=8),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_published_config_is_the_preset_that_we_have(name):
    found = legacy.read_config({"model": MODEL | OFFICIAL[name]}, "config.yaml")
    assert found == ModelConfig(**presets.MODELS[name])


def test_numbers_without_a_point_are_numbers(tmp_path, models):
    state, _, _ = models["olmo2"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2"])
    text = (tmp_path / "step3" / "config.yaml").read_text()
    assert "eps: 1.0e-05" in text
    (tmp_path / "step3" / "config.yaml").write_text(text.replace("1.0e-05", "1e-5"))
    save_optimizer(tmp_path / "step3", state, by_number=True)
    weights = legacy.read(src, optimizer=True)
    optim = from_dict(weights.meta["config"]).optim
    assert (optim.eps, optim.lr, optim.weight_decay) == (1e-5, 1e-4, 0.01)


def test_mlp_ratio_counts_gate_and_up_together():
    model = {k: v for k, v in CONFIGS["olmo2"].items() if k != "mlp_hidden_size"}
    assert legacy.read_config({"model": model | {"mlp_ratio": 8}}, "c").d_ff == 256


def test_an_olmo_2_checkpoint_with_the_config_of_olmo_1_is_refused(tmp_path, models):
    src = save(tmp_path / "step3", models["olmo2"][0], CONFIGS["olmo1 clipped"])
    with pytest.raises(ValueError, match=r"left over transformer\.blocks\.0\.q_norm\.weight"):
        legacy.read(src)


def test_two_tables_of_a_tied_model_are_refused(tmp_path, models):
    state, _, _ = models["olmo1 tied"]
    both = state | {"transformer.ff_out.weight": state["transformer.wte.weight"] + 1}
    src = save(tmp_path / "step3", both, CONFIGS["olmo1 tied"])
    with pytest.raises(ValueError, match=r"left over transformer\.ff_out\.weight"):
        legacy.read(src)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("transformer.blocks.1.att_proj.weight", None, r"missing .*blocks\.1\.att_proj\.weight"),
        ("transformer.blocks.2.ff_proj.weight", (90, 64), r"has shape \[90, 64\], need \[96, 64\]"),
        ("transformer.ff_out.weight", None, r"missing transformer\.ff_out\.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(tmp_path, models, key, value, message):
    state = dict(models["olmo2"][0])
    state.pop(key)
    state |= {key: torch.zeros(value)} if value else {}
    with pytest.raises(ValueError, match=message) as error:
        legacy.read(save(tmp_path / "step3", state, CONFIGS["olmo2"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.pt", "optim.pt", "train.pt"])
def test_a_missing_file_is_named(tmp_path, models, file):
    state, _, _ = models["olmo2"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2"])
    save_optimizer(tmp_path / "step3", state, by_number=True)
    (tmp_path / "step3" / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.replace(".", r"\.")):
        legacy.read(src, optimizer=True)


def test_a_truncated_file_is_named(tmp_path, models):
    src = save(tmp_path / "step3", models["olmo2"][0], CONFIGS["olmo2"])
    path = tmp_path / "step3" / "model.pt"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"step3/model\.pt is damaged, truncated"):
        legacy.read(src)


def test_lion_is_refused_by_name(tmp_path, models):
    state, _, _ = models["olmo2"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2"], name="lionw")
    save_optimizer(tmp_path / "step3", state, by_number=True)
    with pytest.raises(ValueError, match="the optimizer is lionw"):
        legacy.read(src, optimizer=True)


def test_optimizer_state_without_names_is_refused(tmp_path, models):
    state, _, _ = models["olmo2"]
    src = save(tmp_path / "step3", state, CONFIGS["olmo2"])
    save_optimizer(tmp_path / "step3", state, by_number=True)
    torch.save(
        {"state": {0: {}}, "param_groups": [{"params": [0]}]}, tmp_path / "step3" / "optim.pt"
    )
    with pytest.raises(ValueError, match="param_groups say no names of their params"):
        legacy.read(src, optimizer=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("olmo1 clipped", "safetensors"),
        ("olmo2 grouped", "pt"),
        pytest.param("olmo1 tied", "pt", marks=pytest.mark.by_hand),  # its weights are compared
    ],
)
def test_a_forked_run_goes_on_as_olmo_does(tmp_path, ai2_packages, model, form):
    np.save(tmp_path / "batches.npy", BATCHES)
    packages = ai2.install("olmo", ai2_packages)
    want = ai2.run(SCRIPT, packages, str(tmp_path), model, form)
    weights = legacy.read(str(tmp_path / "step3"), optimizer=True)
    assert weights.meta["position"]["epoch"] == 0
    assert_goes_on(weights, want, str(tmp_path / "step3"), tmp_path)
