"""Optimizers of Optax: each as if the model had no stacks, sharded, resumed, or refused by name."""

import jax
import jax.numpy as jnp
import made
import numpy as np
import optax
import pytest
import runs
from test_step import make_batch, make_config

from olmo_jax.config.model import ModelConfig
from olmo_jax.config.options import ConfigError, Pairs
from olmo_jax.config.parameters import table
from olmo_jax.config.training import OptimConfig
from olmo_jax.nn import transformer
from olmo_jax.parallel import sharding
from olmo_jax.training import optim, optim_optax

SMALL = ModelConfig(
    vocab_size=40, d_model=24, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32
)
EXPERTS = ModelConfig(
    vocab_size=40, d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32,
    n_experts=4, n_experts_per_token=2,
)  # fmt: skip
ROWS = table(SMALL)


def draw(seed, model=SMALL):
    like = transformer.abstract_params(model)
    leaves, structure = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def alone(tree, n_layers):
    """Each layer's parameters as leaves of their own."""
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(n_layers)]
    return {**tree, "layers": layers}


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("lion", {"b1": 0.8}, lambda: optax.lion(1.0, b1=0.8, weight_decay=0.0)),
        ("sgd", {"momentum": 0.9}, lambda: optax.sgd(1.0, momentum=0.9)),
        ("adafactor", {"min_dim_size_to_factor": 4},
         lambda: optax.adafactor(1.0, min_dim_size_to_factor=4)),
    ],
)  # fmt: skip
def test_each_layer_is_updated_as_optax_would_update_it_alone(name, options, theirs):
    ours, params = optim_optax.transformation(name, options, ROWS), draw(0)
    twin, n = theirs(), SMALL.n_layers
    state, twin_state = ours.init(params), twin.init(alone(params, n))
    for seed in (1, 2):
        updates, state = ours.update(draw(seed), state, params)
        want, twin_state = twin.update(alone(draw(seed), n), twin_state, alone(params, n))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7),
            alone(updates, n), want,
        )  # fmt: skip


def test_muon_orthogonalizes_matrices_from_inputs_to_outputs():
    options = {"beta": 0.9, "ns_steps": 30, "ns_coeffs": "dion"}
    ours, params, grads = optim_optax.transformation("muon", options, ROWS), draw(0), draw(1)
    updates, _ = ours.update(grads, ours.init(params), params)
    for name, n_inputs in (("wq", 24), ("wk", 24), ("wo", 16)):
        for i in range(SMALL.n_layers):
            gradient = np.asarray(grads["layers"]["attn"][name][i]).reshape(n_inputs, -1)
            u, _, v = np.linalg.svd(gradient, full_matrices=False)
            scale = max(1.0, gradient.shape[1] / n_inputs) ** 0.5
            got = np.asarray(updates["layers"]["attn"][name][i]).reshape(n_inputs, -1)
            np.testing.assert_allclose(got, -scale * (u @ v), atol=0.03)
    adam = optax.adamw(1.0, weight_decay=0.0, nesterov=True, eps=1e-8)
    rest = {key: params[key] for key in ("embed", "lm_head", "final_norm")}
    theirs, _ = adam.update({key: grads[key] for key in rest}, adam.init(rest), rest)
    for key in rest:
        np.testing.assert_allclose(updates[key], theirs[key], rtol=1e-5)


def test_muon_takes_each_expert_alone_and_leaves_routers_to_adam():
    rows = table(EXPERTS)
    ours, params, grads = (
        optim_optax.transformation("muon", {}, rows),
        draw(0, EXPERTS),
        draw(1, EXPERTS),
    )
    updates, _ = ours.update(grads, ours.init(params), params)
    one = optax.contrib.muon(1.0)
    expert = grads["layers"]["moe"]["w_down"][1, 2]
    want, _ = one.update({"w": expert}, one.init({"w": expert}), {"w": expert})
    np.testing.assert_allclose(updates["layers"]["moe"]["w_down"][1, 2], want["w"], atol=1e-5)
    adam = optax.adamw(1.0, weight_decay=0.0, nesterov=True)
    router = grads["layers"]["moe"]["router"]
    want, _ = adam.update(router, adam.init(router), router)
    np.testing.assert_allclose(updates["layers"]["moe"]["router"], want, rtol=1e-5)


@pytest.mark.parametrize("name", optim_optax.TESTED)
def test_a_step_that_must_not_be_taken_changes_nothing(name):
    cfg = OptimConfig(name=name, lr=1e-2)
    params = draw(0)
    state = optim.init(cfg, params, ROWS)
    step_ = jax.jit(lambda p, s, g, loss: optim.update(cfg, g, s, p, 1e-2, 1.0, loss, True, ROWS))
    new, new_state, _, taken = step_(params, state, draw(1), jnp.float32(jnp.nan))
    assert not taken
    jax.tree.map(np.testing.assert_array_equal, (new, new_state), (params, state))
    new, _, _, taken = step_(params, state, draw(1), jnp.float32(1.0))
    assert taken
    assert all(
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (new, params)), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "options", "low", "high"),
    [("sgd", {}, 0, 0), ("sgd", {"momentum": 0.9}, 1, 1), ("lion", {}, 1, 1.01),
     ("adafactor", {"min_dim_size_to_factor": 4}, 0.1, 0.5)],
)  # fmt: skip
def test_the_size_of_the_state_is_known_before_a_run(name, options, low, high):
    cfg = OptimConfig(name=name, options=Pairs(options.items()))
    assert low <= optim.moments(cfg, ROWS) <= high
    line = f"{name} of Optax, {optim.moments(cfg, ROWS):.2f} numbers for each parameter"
    assert optim.describe_groups(cfg, draw(0), ROWS).splitlines()[0] == line
    assert optim.moments(OptimConfig(), ROWS) == 2


def test_weight_decay_is_that_of_all_optimizers():
    cfg = OptimConfig(name="sgd", weight_decay=0.5, no_decay=("embed", "*norm"), max_grad_norm=None)
    params = draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optim.init(cfg, params, ROWS)
    new, *_ = optim.update(cfg, zeros, state, params, 0.1, jnp.inf, jnp.float32(1), True, ROWS)
    np.testing.assert_allclose(new["lm_head"], 0.95 * params["lm_head"], rtol=1e-6)
    np.testing.assert_array_equal(new["embed"], params["embed"])
    np.testing.assert_array_equal(new["layers"]["attn_norm"], params["layers"]["attn_norm"])


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("lbfgs", {}, "config.optim.name=lbfgs: it needs the loss again, at other parameters"),
        ("sophia", {}, "it needs the loss again"),
        ("schedule_free_adamw", {}, "it needs other parameters for evaluations"),
        ("prodigy", {}, "it needs all parameters at once"),
        ("adamv", {}, "config.optim.name='adamv': need one of adamw, skip_step_adamw, muon, lion"),
        ("chain", {}, "need one of"),
        ("lion", {"b3": 1}, "config.optim.options.b3: lion of Optax has no such option; it has b1"),
        ("lion", {"weight_decay": 1}, "options.weight_decay: set optim.weight_decay instead"),
        ("muon", {"ns_coeffs": "none such"}, "options: muon of Optax: Unknown ns_coeff"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name, options, line):
    with pytest.raises(ConfigError) as refused:
        optim_optax.transformation(name, options, ROWS)
    assert line in refused.value.problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_sharded_equals_single(name):
    def two_steps(mesh):
        config = make_config(mesh=mesh)
        optimizer = OptimConfig(name=name, lr=1e-2, options=Pairs())
        config = config.__class__(**{**vars(config), "optim": optimizer})
        n = int(np.prod([max(1, v) for v in (mesh or {"fsdp": 1}).values()]))
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:n])
        state, update = made.fresh_state(config, mesh), made.make_update(config, mesh)
        for _ in range(2):
            arrays = sharding.to_global(make_batch(), mesh, 8)
            state, _ = update(state, arrays, np.float32(1e-2), np.float32(1.0))
        return jax.device_get(state.params), made.state_shapes(config, mesh)

    one, _ = two_steps({"fsdp": 1})
    many, shapes = two_steps({"fsdp": 2, "tensor": 2, "data": 2})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one, many)
    if name == "muon":
        moment = jax.tree.leaves(shapes.opt_state["optax"]["layers"]["mlp"]["w_up"])
        like = shapes.params["layers"]["mlp"]["w_up"].sharding
        assert any(leaf.sharding == like for leaf in moment)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    tokens = runs.write_tokens(tmp_path / "tokens.npy")
    options = ["optim.name=muon", "optim.options.ns_steps=3", "optim.lr=0.02",
               "optim.options.adam_learning_rate=0.15", f"data.paths={tokens}",
               "log.tensorboard=false", "checkpoint.step0=false"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.run(*options, f"dir={whole}", "train.duration=6").code == 0
    result = runs.run(*options, f"dir={parts}", "train.duration=6", "train.hard_stop=3")
    assert result.code == 0
    assert "muon of Optax, 1." in result.out
    assert runs.run(*options, f"dir={parts}", "train.duration=6").code == 0
    assert runs.arrays(whole / "checkpoints/step6") == runs.arrays(parts / "checkpoints/step6")
    refused = runs.run(*options, f"dir={parts}", "train.duration=9", "optim.name=lion")
    assert (
        "config.optim.name='lion', but the checkpoint was trained with 'muon'" in refused.errors[0]
    )
