"""OLMo-core's checkpoints: read by us, judged by OLMo-core itself and by transformers."""

import copy
import dataclasses
import json
import pathlib
import types
import warnings

import jax
import made
import numpy as np
import pytest
import web

torch = pytest.importorskip("torch")
import ai2
import hf
import torch.distributed.checkpoint as dist_cp
from short_runs import BATCHES, assert_goes_on

from olmo_jax import (
    files,
    presets,
)
from olmo_jax.checkpoints import (
    conversion,
    layout,
    storage,
)
from olmo_jax.checkpoints.formats import (
    folders,
    olmo_core,
    olmo_core_config,
)
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.config.model import (
    MeshConfig,
    ModelConfig,
)
from olmo_jax.config.run import from_dict
from olmo_jax.config.training import CheckpointConfig, OptimConfig
from olmo_jax.parallel import sharding
from olmo_jax.training import optim
from olmo_jax.training.origin import find_origin
from olmo_jax.training.state import TrainState

SCRIPT = pathlib.Path(__file__).with_name("train_olmo_core.py")
KEYS = {
    "model.embed_tokens": "embeddings",
    "model.layers.": "blocks.",
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out",
    "self_attn.": "attention.",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
    "model.norm": "lm_head.norm",
}


def core_key(key: str) -> str:
    """OLMo-core's name of a Hugging Face parameter."""
    if key == "lm_head.weight":
        return "lm_head.w_out.weight"
    for theirs, ours in KEYS.items():
        key = key.replace(theirs, ours)
    return key


NORM = {"name": "rms", "eps": 1e-6, "bias": False}
CONFIG = {
    "model": {
        "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
        "name": "default",
        "d_model": 64,
        "vocab_size": 97,
        "n_layers": 4,
        "dtype": "float32",
        "init_method": "normal",
        "init_seed": 0,
        "init_std": 0.02,
        "block": {
            "name": "reordered_norm",
            "layer_norm": NORM,
            "attention": {
                "name": "default",
                "n_heads": 4,
                "n_kv_heads": 2,
                "bias": False,
                "rope": {"name": "default", "theta": 500_000, "full_precision": True},
                "qk_norm": NORM,
                "use_flash": True,
                "dtype": "float32",
            },
            "feed_forward": {"name": "default", "hidden_size": 48, "bias": False},
        },
        "lm_head": {"name": "default", "bias": False, "layer_norm": NORM},
    },
    "dataset": {"sequence_length": 32, "tokenizer": {"eos_token_id": 2, "pad_token_id": 1}},
    "train_module": {
        "optim": {
            "_CLASS_": "olmo_core.optim.adamw.SkipStepAdamWConfig",
            "lr": 3e-4,
            "betas": [0.9, 0.95],
            "rolling_interval_length": 16,
        }
    },
}


def config_with(path: str, value) -> dict:
    """CONFIG with one option at another value, or without it."""
    config = copy.deepcopy(CONFIG)
    *groups, last = path.split(".")
    at = config
    for group in groups:
        at = at[group]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return config


def save(folder: pathlib.Path, state: dict, config: dict = CONFIG) -> str:
    """A checkpoint as OLMo-core lays it out, of any state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants a process group
        dist_cp.save(state, checkpoint_id=folder / "model_and_optim", no_dist=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def grouped():
    """A random OLMo 2 with grouped heads: its state under OLMo-core's names, its params of ours."""
    model, config, params = hf.random_model("olmo2 grouped")
    state = {core_key(key): value for key, value in model.state_dict().items()}
    return state, config, params


def adam(state: dict, step: float = 3.0) -> dict:
    """A made-up state of Adam, different for each parameter and moment."""
    return {
        key: {"exp_avg": 2 * p, "exp_avg_sq": p * p, "step": torch.tensor(step)}
        for key, p in state.items()
    }


def read_all(weights, prefix: str) -> dict:
    return {k: weights.read(k) for k in weights.leaves if k.startswith(prefix)}


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "", "module."])
def test_every_parameter_is_where_it_belongs(tmp_path, grouped, prefix):
    state, config, params = grouped
    src = save(tmp_path / "step3", {prefix + key: value for key, value in state.items()})
    assert olmo_core.recognises(src)
    weights = olmo_core.read(src)
    want = {f"params/{name}": leaf for name, leaf in storage.names(params).items()}
    assert weights.leaves.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(weights.read(name), value)
    assert weights.line == "OLMo-core, 47 tensors in 1 file"
    assert weights.meta["token_ids"] == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1}
    differing = {"max_seq_len"}  # of the config's sequence_length
    for key, value in vars(config).items():
        assert key in differing or getattr(weights.model, key) == value, key


def test_any_part_of_a_leaf_is_read(tmp_path, grouped):
    state, _, params = grouped
    weights = olmo_core.read(save(tmp_path / "step3", {"model": state}))
    rng = np.random.default_rng(0)
    for name, value in storage.names(params).items():
        for _ in range(4):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in value.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            part = weights.read(f"params/{name}", index)
            np.testing.assert_array_equal(part, np.asarray(value)[index])
            assert part.flags.c_contiguous
            assert part.flags.aligned


def test_bfloat16_weights_keep_their_bits(tmp_path, grouped):
    state = {key: value.bfloat16() for key, value in grouped[0].items()}
    weights = olmo_core.read(save(tmp_path / "step3", {"model": state}))
    found = weights.read("params/layers/mlp/w_gate")
    assert found.dtype == jax.numpy.bfloat16
    assert weights.meta["dtype"] == "bfloat16"
    want = state["blocks.2.feed_forward.w1.weight"].T.contiguous().view(torch.int16).numpy()
    np.testing.assert_array_equal(found[2].view(np.int16), want)


def test_fused_projections_are_q_then_k_then_v(tmp_path, grouped):
    state, _, params = grouped
    fused = {key: v for key, v in state.items() if not key.endswith(("w_q.weight", "w_k.weight"))}
    for i in range(4):
        names = [f"blocks.{i}.attention.w_{x}.weight" for x in "qkv"]
        fused[f"blocks.{i}.attention.w_qkv.weight"] = torch.cat([state[name] for name in names])
        del fused[names[2]]
    config = config_with("model.block.attention.name", "fused")
    weights = olmo_core.read(save(tmp_path / "step3", {"model": fused}, config))
    for x in "qkv":
        found = weights.read(f"params/layers/attn/w{x}")
        np.testing.assert_array_equal(found, params["layers"]["attn"][f"w{x}"])
    part = weights.read("params/layers/attn/wk", np.s_[2:3, 5:9, 1:2, 3:11])
    np.testing.assert_array_equal(part, params["layers"]["attn"]["wk"][2:3, 5:9, 1:2, 3:11])


def test_a_checkpoint_of_weights_only_lies_beside_its_config(tmp_path, grouped):
    src = save(tmp_path / "step3", {"model": grouped[0]})
    for path in (tmp_path / "step3" / "model_and_optim").iterdir():
        path.rename(tmp_path / "step3" / path.name)
    weights = olmo_core.read(src)
    np.testing.assert_array_equal(weights.read("params/embed"), grouped[2]["embed"])
    with pytest.raises(ValueError, match=r"holds weights only: there is no optim\.state"):
        olmo_core.read(src, optimizer=True)


# --- optimizer ------------------------------------------------------------------------------------


def test_the_second_table_of_a_tied_model_must_be_the_first(tmp_path, grouped):
    state = grouped[0] | {"lm_head.w_out.weight": grouped[0]["embeddings.weight"].clone()}
    config = config_with("model.tie_word_embeddings", True)
    weights = olmo_core.read(save(tmp_path / "same", {"model": state}, config))
    assert weights.model.tie_embeddings
    assert "params/lm_head" not in weights.leaves
    state["lm_head.w_out.weight"][90, 5] += 1
    src = save(tmp_path / "other", {"model": state}, config)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is set, but .* differ"):
        olmo_core.read(src)


@pytest.mark.parametrize("flat", [False, True])
def test_moments_lie_like_their_parameters(tmp_path, grouped, flat):
    state, _, params = grouped
    moments = adam(state)
    groups = [{"params": list(state), "lr": 0.1, "betas": (0.9, 0.95)}]
    unflat = {"state": moments, "param_groups": groups}
    flattened = {
        f"state.{key}.{name}": x for key, value in moments.items() for name, x in value.items()
    } | {f"param_groups.{key}.lr": 0.1 for key in state}
    src = save(tmp_path / "step3", {"model": state, "optim": flattened if flat else unflat})
    weights = olmo_core.read(src, optimizer=True)
    for name, value in storage.names(params).items():
        np.testing.assert_array_equal(weights.read(f"opt_state/mu/{name}"), 2 * value)
        np.testing.assert_array_equal(weights.read(f"opt_state/nu/{name}"), value * value)
    assert int(weights.read("step")) == weights.meta["step"] == 3
    assert weights.line.endswith("with the optimizer after 3 steps")


def test_the_state_is_the_tree_that_training_has(tmp_path, grouped):
    state = grouped[0]
    optimizer = {"state": adam(state)}
    weights = olmo_core.read(
        save(tmp_path / "step3", {"model": state, "optim": optimizer}), optimizer=True
    )
    config = OptimConfig(name="skip_step_adamw", skip_window=16)
    want = jax.eval_shape(lambda: optim.init(config, grouped[2]))
    found = {k: v for k, v in weights.leaves.items() if k.startswith("opt_state/")}
    assert found == {f"opt_state/{k}": v for k, v in storage.names(want).items()}
    assert weights.leaves["step"] == jax.ShapeDtypeStruct((), np.int32)
    assert from_dict(weights.meta["config"]).optim.skip_window == 16


def test_a_run_whose_adam_step_stood_still_is_told_apart(tmp_path, grouped):
    state = {"model": grouped[0], "optim": {"state": adam(grouped[0], step=0.0)}}
    src = save(tmp_path / "step3", state)
    with pytest.raises(FileNotFoundError, match=r"train/rank0\.pt, which has the step, is missing"):
        olmo_core.read(src, optimizer=True)
    (tmp_path / "step3" / "train").mkdir()
    torch.save({"global_step": 9}, tmp_path / "step3" / "train" / "rank0.pt")
    weights = olmo_core.read(src, optimizer=True)
    assert (int(weights.read("step")), int(weights.read("opt_state/count"))) == (9, 0)
    assert from_dict(weights.meta["config"]).optim.freeze_adam_step
    assert weights.line.endswith("go on with optim.freeze_adam_step=True")


def test_moments_in_bfloat16_become_float32(tmp_path, grouped):
    moments = adam(grouped[0])
    for state in moments.values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    src = save(tmp_path / "step3", {"model": grouped[0], "optim": {"state": moments}})
    weights = olmo_core.read(src, optimizer=True)
    want = moments["embeddings.weight"]["exp_avg"].float().numpy()
    np.testing.assert_array_equal(weights.read("opt_state/mu/embed"), want)
    assert {leaf.dtype for name, leaf in weights.leaves.items() if "/mu/" in name} == {
        np.dtype(np.float32)
    }


def test_a_converted_checkpoint_is_what_training_restores(tmp_path, grouped):
    state, _, params = grouped
    src = save(tmp_path / "step3", {"model": state, "optim": {"state": adam(state)}})
    conversion.to_jax(src, str(tmp_path / "ours"), optimizer=True, say=lambda line: None)
    folder = files.path(str(tmp_path / "ours"))
    config = from_dict(layout.read_meta(folder)["config"])
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    restored = storage.restore(folder, made.state_shapes(config, mesh))
    assert int(restored.step) == int(restored.opt_state["count"]) == 3
    np.testing.assert_array_equal(restored.params["lm_head"], params["lm_head"])
    w_up = params["layers"]["mlp"]["w_up"]
    np.testing.assert_array_equal(restored.opt_state["mu"]["layers"]["mlp"]["w_up"], 2 * w_up)
    options = CheckpointConfig(load_path=src, load_position=True)
    new_run = types.SimpleNamespace(latest=lambda: None)
    origin = find_origin(options, config.model, new_run)
    assert (origin.parts, origin.step()) == (("params", "opt_state", "step"), 3)
    assert "position" not in origin.meta  # nor in what was saved here
    direct = TrainState(**origin.load(made.state_shapes(config, mesh)))
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(direct), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)


# --- behind https ---------------------------------------------------------------------------------


def test_a_folder_on_a_web_server_is_read_by_ranges(tmp_path, grouped, monkeypatch):
    state, _, params = grouped
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.001)
    save(tmp_path / "step3", {"model": state, "optim": {"state": adam(state)}})
    size = (tmp_path / "step3" / "model_and_optim" / "__0_0.distcp").stat().st_size
    with web.serving(tmp_path) as server:
        server.faults = ["503", "cut", ""] * 20
        weights = olmo_core.read(f"{server.url}/step3", optimizer=True)
        assert int(weights.read("step")) == 3
        before = server.n_bytes
        for name in ("embed", "layers/attn/wq", "layers/mlp/w_down"):
            want = np.asarray(storage.names(params)[name])
            np.testing.assert_array_equal(weights.read(f"params/{name}"), want)
        assert server.n_bytes - before < size / 2


def test_its_kind_is_recognised_here_and_behind_https(tmp_path, grouped):
    src = save(tmp_path / "step3", {"model": grouped[0]})
    with web.serving(tmp_path) as server:
        for name in (src, f"{server.url}/step3", f"{server.url}/step3/"):
            assert open_weights(name).line == "OLMo-core, 47 tensors in 1 file"


def test_nothing_at_an_address_is_no_checkpoint(tmp_path):
    with web.serving(tmp_path) as server:
        assert not olmo_core.recognises(f"{server.url}/step3")


# --- configs --------------------------------------------------------------------------------------


def test_a_window_pattern_becomes_the_kind_of_every_layer():
    window = {
        "pattern": [8, 8, 8, -1],
        "force_full_attention_on_first_layer": False,
        "force_full_attention_on_last_layer": True,
    }
    config = config_with("model.block.attention.sliding_window", window)
    model, _ = olmo_core_config.read(config, "c")
    assert (model.window, model.layer_types) == (8, ("sliding",) * 3 + ("full",))
    config["model"]["n_layers"] = 6
    model, _ = olmo_core_config.read(config, "c")
    kinds = ("sliding", "sliding", "sliding", "full", "sliding", "full")
    assert model.layer_kinds == kinds
    window["force_full_attention_on_first_layer"] = True  # the pattern then begins behind it
    config["model"]["block"]["attention"]["sliding_window"] = window
    model, _ = olmo_core_config.read(config, "c")
    assert model.layer_kinds == ("full", "sliding", "sliding", "sliding", "full", "full")


def test_pre_norm_and_models_without_norm_weights_are_understood():
    config = config_with("model.block.name", "default")
    plain = {"name": "default", "elementwise_affine": False}
    del config["model"]["block"]["attention"]["qk_norm"]
    config["model"]["block"]["layer_norm"] = config["model"]["lm_head"]["layer_norm"] = plain
    model, _ = olmo_core_config.read(config, "c")
    assert (model.norm, model.norm_eps) == ("nonparametric", 1e-5)
    assert (model.norm_position, model.qk_norm) == ("before", "none")


def test_clipping_head_size_and_theta_are_carried():
    config = config_with("model.block.attention.clip_qkv", 8.0)
    config["model"]["block"]["attention"] |= {"head_dim": 24}
    config["model"]["block"]["attention"]["rope"]["theta"] = 10_000
    model, _ = olmo_core_config.read(config, "c")
    assert (model.clip_qkv, model.head_dim, model.rope_theta) == (8.0, 24, 10_000.0)


YARN = {
    "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
    "factor": 8.0,
    "old_context_len": 8192,
}
REFUSED = {
    "model.name": ("normalized", r"model\.name is 'normalized'"),
    "model.embed_scale": (8.0, r"model\.embed_scale is 8\.0"),
    "model.embedding_norm": (NORM, r"model\.embedding_norm"),
    "model.new_option": (3, r"model\.new_option is 3; olmo_jax does not know this option"),
    "model.block.name": ("peri_norm", r"block\.name is 'peri_norm'"),
    "model.block.dropout": (0.1, r"block\.dropout is 0\.1"),
    "model.block.feed_forward_moe": ({"num_experts": 8}, r"block\.feed_forward_moe"),
    "model.block.feed_forward.activation": ("gelu_tanh", r"feed_forward\.activation"),
    "model.block.feed_forward.bias": (None, r"feed_forward\.bias is True; olmo_jax has only False"),
    "model.block.attention.bias": (None, r"attention\.bias is True"),
    "model.block.attention.gate": ({"granularity": "headwise"}, r"attention\.gate"),
    "model.block.attention.name": ("normalized", r"attention\.name is 'normalized'"),
    "model.block.attention.use_head_qk_norm": (True, r"use_head_qk_norm is True"),
    "model.block.attention.qk_norm": (NORM | {"eps": 1e-5}, r"qk_norm is not like layer_norm"),
    "model.block.attention.rope": (None, r"attention\.rope is missing"),
    "model.block.attention.rope.name": ("complex", r"rope\.name is 'complex'"),
    "model.block.attention.rope.no_global_rope": (True, r"no_global_rope is True"),
    "model.block.attention.rope.scaling": (
        {"_CLASS_": "olmo_core.nn.rope.PIRoPEScalingConfig", "factor": 2.0},
        r"rope\.scaling is 'PIRoPEScalingConfig'; olmo_jax has only YaRN",
    ),
    "model.block.layer_norm": (NORM | {"bias": True}, r"layer_norm\.bias is True"),
    "model.block.layer_norm.name": ("l2_norm", r"layer_norm\.name is 'l2_norm'"),
    "model.lm_head.bias": (True, r"lm_head\.bias is True"),
    "model.lm_head.layer_norm": (NORM | {"eps": 1e-5}, r"lm_head\.layer_norm is"),
    "model.vocab_size": (None, r"model\.vocab_size is missing"),
    "model.block": ([], r"model\.block: found \[\], need a group of options"),
}  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_an_option_that_changes_the_function_is_refused_by_name(path):
    value, message = REFUSED[path]
    with pytest.raises(ValueError, match=message) as error:
        olmo_core_config.read(config_with(path, value), "step3/config.json")
    assert str(error.value).startswith("step3/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, {"load_balancing_loss": 0.01}),
        (
            {"lb_loss_weight": 0.1, "z_loss_weight": 0.001, "scale_loss_by_num_layers": False},
            {"load_balancing_loss": 0.4, "router_z_loss": 0.004},
        ),
        ({"lb_loss_weight": 0.0, "z_loss_weight": None}, {}),  # as if it were not there
    ],
)
def test_the_losses_of_routers_are_carried(weights, expected):
    config = config_with("model.block.feed_forward_moe", {"num_experts": 8} | weights)
    model = ModelConfig(n_layers=4, n_experts=8)
    found = olmo_core_config.train(config, model, "c")
    assert found == {"router_loss_form": "olmo_core"} | expected


def test_layers_that_differ_in_more_than_their_window_are_refused():
    config = copy.deepcopy(CONFIG)
    other = copy.deepcopy(config["model"]["block"])
    other["feed_forward"]["hidden_size"] = 64
    config["model"]["block_overrides"] = {"2": other}
    with pytest.raises(ValueError, match="layer 2 differs from the first in d_ff"):
        olmo_core_config.read(config, "c")


def test_yarn_on_sliding_layers_is_refused():
    window = {"pattern": [8, -1], "force_full_attention_on_first_layer": False}
    config = config_with("model.block.attention.sliding_window", window)
    config["model"]["block"]["attention"]["rope"] = {"theta": 500_000, "scaling": YARN}
    with pytest.raises(ValueError, match="scales all full layers alike, and no sliding ones"):
        olmo_core_config.read(config, "c")


def test_yarn_where_its_formulas_differ_is_refused():
    config = config_with("model.block.attention.rope.scaling", YARN | {"old_context_len": 2**22})
    with pytest.raises(ValueError, match="the ramp ends at dimension 9 of 8"):
        olmo_core_config.read(config, "c")


# --- checkpoints that cannot be right -------------------------------------------------------------


def broken(state: dict, how: str) -> dict:
    state = dict(state)
    if how == "missing":
        del state["blocks.1.attention.w_k.weight"]
    elif how == "extra":
        state["blocks.4.attention.w_k.weight"] = state["blocks.1.attention.w_k.weight"]
    elif how == "shape":
        state["blocks.2.feed_forward.w2.weight"] = torch.zeros(64, 40)
    elif how == "dtype":
        state["blocks.3.attention_norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing model\.blocks\.1\.attention\.w_k\.weight"),
        ("extra", r"left over model\.blocks\.4\.attention\.w_k\.weight"),
        ("shape", r"blocks\.2\.feed_forward\.w2\.weight has shape \[64, 40\], need \[64, 48\]"),
        ("dtype", r"blocks\.0\.attention_norm\.weight is float32; .*3.*is bfloat16"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(tmp_path, grouped, how, message):
    src = save(tmp_path / "step3", {"model": broken(grouped[0], how)})
    with pytest.raises(ValueError, match=message) as error:
        olmo_core.read(src)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("embeddings.weight"),
            r"missing optim\.state\.embeddings\.weight\.exp_avg",
        ),
        (
            lambda s: s["embeddings.weight"].update(step=torch.tensor(4.0)),
            "need one number of steps",
        ),
        (lambda s: s["embeddings.weight"].update(exp_inf=torch.ones(2)), "is no state of Adam"),
    ],
)
def test_optimizer_state_that_cannot_be_right_is_named(tmp_path, grouped, change, message):
    moments = adam(grouped[0])
    change(moments)
    src = save(tmp_path / "step3", {"model": grouped[0], "optim": {"state": moments}})
    with pytest.raises(ValueError, match=message):
        olmo_core.read(src, optimizer=True)


def test_another_optimizer_is_refused_by_name(tmp_path, grouped):
    config = config_with("train_module.optim._CLASS_", "olmo_core.optim.lion.LionConfig")
    state = {"model": grouped[0], "optim": {"state": adam(grouped[0])}}
    with pytest.raises(ValueError, match="the optimizer is LionConfig"):
        olmo_core.read(save(tmp_path / "step3", state, config), optimizer=True)


def test_a_missing_shard_is_named(tmp_path, grouped):
    src = save(tmp_path / "step3", {"model": grouped[0]})
    (tmp_path / "step3" / "model_and_optim" / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_and_optim/__0_0\.distcp is missing"):
        olmo_core.read(src)


def test_a_truncated_shard_is_named(tmp_path, grouped):
    src = save(tmp_path / "step3", {"model": grouped[0]})
    path = tmp_path / "step3" / "model_and_optim" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated: 50,000 bytes of at least"):
        olmo_core.read(src)


def test_a_damaged_config_is_named(tmp_path, grouped):
    src = save(tmp_path / "step3", {"model": grouped[0]})
    (tmp_path / "step3" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"step3/config\.json is no JSON"):
        olmo_core.read(src)


# --- Ai2's own code as judge ----------------------------------------------------------------------


@pytest.mark.slow
def test_what_two_processes_of_olmo_core_saved_is_put_together(tmp_path, ai2_packages):
    packages = ai2.install("olmo-core-3", ai2_packages)
    ai2.run(SCRIPT.with_name("shard_olmo_core.py"), packages, str(tmp_path))
    files = {path.name[:4] for path in (tmp_path / "model_and_optim").glob("*.distcp")}
    assert files == {"__0_", "__1_"}
    weights = olmo_core.read(str(tmp_path), optimizer=True)
    assert int(weights.read("opt_state/count")) == 2
    with np.load(tmp_path / "whole.npz") as whole:
        for tree, ending in (("params", ""), ("opt_state/mu", ".exp_avg")):
            embed = weights.read(f"{tree}/embed")
            np.testing.assert_array_equal(embed, whole[f"embeddings.weight{ending}"])
            for name, theirs in (("mlp/w_down", "feed_forward.w2"), ("attn/wk", "attention.w_k")):
                want = whole[f"blocks.2.{theirs}.weight{ending}"].T
                found = weights.read(f"{tree}/layers/{name}")[2]
                np.testing.assert_array_equal(found.reshape(want.shape), want)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["olmo-core-3", "olmo-core-2"])
def test_every_preset_of_olmo_core_is_the_model_that_we_have(ai2_packages, package):
    known = [name for name in presets.MODELS if name.startswith(("olmo2", "olmo3"))]
    known += ["olmoe_1B_7B"]
    known = [name for name in known if not name.endswith("_hf")]
    folder = ai2.install(package, ai2_packages)
    script = SCRIPT.with_name("olmo_core_presets.py")
    configs = ai2.run(script, folder, str(presets.OLMO2["vocab_size"]), *known)
    assert len(configs) == 32
    for name, config in configs.items():
        model, is_fused = olmo_core_config.read(config, name)
        ours = "olmoe_1B_7B_core" if name == "olmoe_1B_7B" else name  # not the released one
        want = ModelConfig(**presets.MODELS[ours])
        assert dataclasses.replace(model, max_seq_len=want.max_seq_len) == want, name
        assert not is_fused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "model", "optimizer"),
    [
        ("olmo-core-3", "olmo2 fused", "skip_step_adamw"),
        ("olmo-core-2", "olmo3", "adamw"),
        ("olmo-core-3", "olmoe", "adamw"),
        # Both packages and optimizers are above; these differ in the model, which others compare.
        pytest.param("olmo-core-3", "olmo2 tied", "adamw", marks=pytest.mark.by_hand),
        pytest.param(
            "olmo-core-2", "olmoe renormalised", "skip_step_adamw", marks=pytest.mark.by_hand
        ),
    ],
)
def test_a_forked_run_goes_on_as_olmo_core_does(tmp_path, ai2_packages, package, model, optimizer):
    np.save(tmp_path / "batches.npy", BATCHES)
    packages = ai2.install(package, ai2_packages)
    want = ai2.run(SCRIPT, packages, str(tmp_path), model, optimizer)
    weights = olmo_core.read(str(tmp_path / "step3"), optimizer=True)
    assert weights.meta["position"]["epoch"] == 1
    config = from_dict(weights.meta["config"])
    assert (config.optim.name, config.optim.lr) == (optimizer, 1e-2)
    assert bool(config.train.load_balancing_loss) == bool(config.model.n_experts)
    assert_goes_on(weights, want, str(tmp_path / "step3"), tmp_path)
