"""The router and its losses, judged by OLMo-core's own and by plain loops."""

import dataclasses
import json
import pathlib

import ai2
import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest
import runs
from test_moe import EXPERTS, LOSSES, layer
from test_step import make_batch, make_config, run

from olmo_jax import files
from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats import hf_config
from olmo_jax.config import costs, parameters
from olmo_jax.config.model import ComputeConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import validate
from olmo_jax.config.text import to_dict
from olmo_jax.nn import moe, router, transformer
from olmo_jax.parallel import sharding
from olmo_jax.training import experts, optim
from olmo_jax.training.origin import Origin, initial_state

SCRIPT = pathlib.Path(__file__).with_name("route_olmo_core.py")
BIASED = dataclasses.replace(EXPERTS, router_bias_gamma=0.03)
CHOOSING = dataclasses.replace(EXPERTS, router="expert_choice")


def routed(x, w_router, model, bias, n_counted):
    """Choice, weights, stats and losses of a layer on tokens `[rows, seq, d_model]`."""
    tokens = x.reshape(-1, x.shape[-1])
    scores, lse = router.score(tokens, w_router)
    chosen, weights = router.choose_experts(scores, model, bias)
    stats = router.stats(jnp.bincount(chosen.reshape(-1), length=8), scores, lse)
    stats = jax.tree.map(lambda a: a[None], stats)  # one layer
    one = dataclasses.replace(model, n_layers=1, layer_types=("full",))
    config = make_config(model=one, router_loss_form="olmo_core", **LOSSES)
    loss, parts = experts.router(stats, len(tokens), n_counted, model, config.train, 1)
    return loss, (
        chosen,
        weights,
        parts,
        experts.metrics(config.model, config.train, parts)
        | {"train/expert load": experts.loads(parts)},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "cases"),
    [
        ("olmo-core-2", [(None, None, None), (0.03, None, 61)]),
        ("olmo-core-3", [(None, None, 61), (0.03, None, None), (0.03, 1.0, None)]),
    ],
)
def test_routing_losses_and_bias_are_olmo_cores(ai2_packages, tmp_path, package, cases):
    pytest.importorskip("torch")
    folders = ai2.install(package, ai2_packages)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4, 20, 16)).astype(np.float32)
    w_router = (0.4 * rng.standard_normal((8, 16))).astype(np.float32)
    np.savez(tmp_path / "case.npz", x=x, router=w_router)
    theirs = ai2.run(SCRIPT, folders, str(tmp_path / "case.npz"), json.dumps(cases))
    for case, expected in zip(cases, theirs, strict=True):
        assert_routed_alike(x, w_router, *case, expected)


def assert_routed_alike(x, w_router, gamma, norm, n_counted, theirs):
    """Our router gives what theirs gave for each batch of `x [batches, rows, seq, d_model]`."""
    n_counted = n_counted or x[0, ..., 0].size
    model = dataclasses.replace(
        EXPERTS, router_bias_gamma=gamma, normalize_expert_weights=norm is not None
    )
    bias = None if gamma is None else jnp.zeros(8)
    value = jax.jit(jax.value_and_grad(routed, (0, 1), has_aux=True), static_argnums=2)
    moved = 0
    for tokens, expected in zip(x, theirs, strict=True):
        (loss, aux), (dx, drouter) = value(tokens, jnp.asarray(w_router.T), model, bias, n_counted)
        chosen, weights, parts, metrics = aux
        np.testing.assert_array_equal(chosen.reshape(4, 20, 3), expected["chosen"])
        np.testing.assert_array_equal(parts["routed"][0], expected["sizes"])
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
        close(weights.reshape(4, 20, 3), expected["weights"])
        close(loss, expected["loss"])
        close(dx, expected["dx"])
        close(drouter.T, expected["drouter"])
        names = {name.split("/")[-1]: value for name, value in metrics.items()}
        np.testing.assert_allclose(names.pop("expert load").mean(), 1.0, rtol=1e-6)  # ours alone
        assert names.keys() == expected["metrics"].keys()
        for name, number in expected["metrics"].items():
            close(names[name], number)
        if bias is not None:
            params = {"layers": {"moe": {"router_bias": bias[None]}}}
            params = experts.balance(params, parts["routed"], jnp.float32(gamma))
            bias = params["layers"]["moe"]["router_bias"][0]
            close(bias, expected["bias"])
            without = router.choose_experts(
                router.score(tokens.reshape(80, 16), w_router.T)[0], model
            )
            moved += int((np.asarray(without[0]) != np.asarray(chosen)).sum())
    assert (moved > 0) == (gamma is not None)


def test_a_bias_that_forces_experts_without_any_score_makes_no_nan():
    model = dataclasses.replace(BIASED, normalize_expert_weights=True)
    logits = jnp.zeros((4, 8)).at[:, 0].set(200.0)  # the other scores are 0 in fp32
    bias = jnp.zeros(8).at[0].set(-5.0)

    def total(logits):
        chosen, weights = router.choose_experts(jax.nn.softmax(logits), model, bias)
        return weights.sum(), chosen

    (value, chosen), grads = jax.value_and_grad(total, has_aux=True)(logits)
    assert (chosen > 0).all()
    assert value == 0
    assert np.isfinite(grads).all()


# --- the bias in training -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bias_follows_the_loads_and_nothing_else():
    config = make_config(model=BIASED)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state, update = made.fresh_state(config, mesh), made.make_update(config, mesh)
    arrays = sharding.to_global(make_batch(), mesh, 8)
    forward = jax.jit(made.model_of(config).apply)
    expected = np.zeros((2, 8))
    for _ in range(3):
        output = forward({"params": state.params}, arrays["tokens"])
        tokens = np.asarray(output.routed["tokens"])
        expected += 0.03 * np.sign(tokens.mean(1, keepdims=True) - tokens)
        state, _ = update(state, arrays, np.float32(1e-2), np.float32(1.0))
    bias = state.params["layers"]["moe"]["router_bias"]
    np.testing.assert_allclose(bias, expected, atol=1e-6)
    for moment in ("mu", "nu"):
        assert not state.opt_state[moment]["layers"]["moe"]["router_bias"].any()
    before = np.asarray(bias)
    arrays = sharding.to_global(make_batch(range(8)), mesh, 8)  # nothing to learn from
    state, report = update(state, arrays, np.float32(1e-2), np.float32(1.0))
    assert not report.taken
    np.testing.assert_array_equal(state.params["layers"]["moe"]["router_bias"], before)


def test_the_bias_is_a_group_of_its_own():
    config = make_config(model=BIASED)
    params = transformer.abstract_params(BIASED)
    *others, last = optim.describe_groups(config.optim, params).splitlines()
    shape = params["layers"]["moe"]["router_bias"].shape
    n = shape[0] * shape[1]
    assert last == f"moved by the experts' loads, {n} parameters: layers/moe/router_bias"
    assert "router_bias" not in "".join(others)
    counts = [int(line.split(", ")[1].split()[0].replace(",", "")) for line in (*others, last)]
    assert sum(counts) == costs.n_params(BIASED).total
    assert parameters.table(BIASED)["layers/moe/router_bias"].shape == shape
    assert costs.flops_per_token(BIASED, 64) == costs.flops_per_token(EXPERTS, 64)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(model=dict(router_bias_gamma=0.0)), "config.model.router_bias_gamma=0.0: need a"),
        (
            dict(model=dict(router_bias_gamma=0.1, router="expert_choice")),
            "config.model.router_bias_gamma: only tokens that choose",
        ),
        (
            dict(model=dict(n_experts=0, router="expert_choice")),
            "config.model.router: expert_choice needs model.n_experts",
        ),
        (
            dict(model=dict(router="expert_choice"), mesh=dict(fsdp=1, context=2)),
            "config.mesh.context=2: model.router=expert_choice needs whole sequences",
        ),
        (dict(compute=dict(expert_buffer=0.9)), "config.compute.expert_buffer=0.9: need a number"),
        (
            dict(
                model=dict(router="expert_choice", n_experts=100, n_experts_per_token=3),
                eval=dict(seq_len=33),
            ),
            "config.eval.seq_len=33: model.router=expert_choice leaves the 100 experts no token of"
            " such a row; use 34 or more",
        ),
    ],
)
def test_options_that_contradict_each_other_are_named(options, line):
    config = make_config(model=EXPERTS)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=("x.npy",)))
    for part, values in options.items():
        changed = dataclasses.replace(getattr(config, part), **values)
        config = dataclasses.replace(config, **{part: changed})
    with pytest.raises(ConfigError) as error:
        validate(config, config.mesh.context)
    assert [problem[: len(line)] for problem in error.value.problems] == [line]


@pytest.mark.parametrize("option", [dict(router_bias_gamma=0.1), dict(router="expert_choice")])
def test_routers_that_hugging_face_lacks_are_not_exported(option):
    model = dataclasses.replace(EXPERTS, layer_types=("full",), window=None, **option)
    (name,) = option
    with pytest.raises(ValueError, match=f"no Hugging Face model is like this one: .*{name}="):
        hf_config.family_of(model)


@pytest.mark.slow
def test_biases_on_a_mesh_and_of_micro_batches_are_those_of_one_device():
    alone, _ = run(make_config(model=BIASED), make_batch(), n=3)
    config = make_config(dict(fsdp=2, expert=2), accumulate=2, model=BIASED)
    params, _ = run(config, make_batch(), n=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, alone)


@pytest.mark.by_hand  # it is a leaf like others, which `test_resume.py` stops and compares
def test_a_resumed_run_has_the_same_bias(tmp_path):
    tokens = runs.write_tokens(tmp_path / "tokens.npy")
    options = [
        f"--config={runs.ROOT / 'configs/tiny_olmoe.py'}", f"data.paths={tokens}", "mesh.fsdp=8",
        "model.router_bias_gamma=0.01", "train.duration=8",
        f"compute.compilation_cache={tmp_path / 'compiled'}", "log.tensorboard=false",
    ]  # fmt: skip
    for name, *more in (("whole",), ("parts", "train.hard_stop=4"), ("parts",)):
        result = runs.run(*options, f"dir={tmp_path / name}", *more)
        assert (result.code, result.errors) == (0, [])
    whole, parts = (runs.arrays(next(tmp_path.rglob(f"{n}/**/step8"))) for n in ("whole", "parts"))
    assert any("router_bias" in name for name in whole)
    assert whole == parts


def fields(state):
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def test_biases_begin_at_0_where_a_run_takes_weights_without_them(tmp_path, capsys):
    plain, biased = make_config(model=EXPERTS), make_config(model=BIASED)
    mesh = sharding.make_mesh(plain.mesh, jax.devices()[:1])
    tree = storage.names(fields(made.fresh_state(plain, mesh)))
    writer = storage.ArrayWriter(files.path(tmp_path / "step3"), tree)
    for name, x in tree.items():
        writer.write(name, (0,) * x.ndim, jax.device_get(x))
    writer.commit({"model": to_dict(plain.model), "config": to_dict(plain)})
    parts = "step", "params", "opt_state"
    source = Origin(files.path(tmp_path / "step3"), parts, False, "")
    state = initial_state(biased.model, biased.optim, 0, mesh, source, 0)
    assert "biases of the routers begin at 0, the checkpoint has none" in capsys.readouterr().out
    for name, x in storage.names(fields(state)).items():
        expected = tree[name] if name in tree else np.zeros((2, 8), np.float32)
        np.testing.assert_array_equal(x, expected)


# --- expert choice --------------------------------------------------------------------------------


def choose_by_hand(x, w_router, w_gate, w_up, w_down):
    """Each expert takes the best 3/8 of the tokens of each sequence, in NumPy."""
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for row, y in zip(x, out, strict=True):
        logits = row @ np.asarray(w_router, np.float64)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        for e in range(8):
            for t in np.argsort(-p[:, e], kind="stable")[: 3 * len(row) // 8]:
                gate, up = row[t] @ np.asarray(w_gate[e]), row[t] @ np.asarray(w_up[e])
                y[t] += p[t, e] * ((gate / (1 + np.exp(-gate)) * up) @ np.asarray(w_down[e]))
    return out


def test_experts_that_choose_take_the_best_of_every_sequence():
    x, weights = layer(n=60)
    x = x.reshape(3, 20, 64)
    f = lambda x, w: moe._experts(CHOOSING, ComputeConfig(dtype="float32"), x, *w)  # noqa: E731
    y, stats = jax.jit(f)(x, weights)
    np.testing.assert_allclose(y, choose_by_hand(x, *weights), atol=1e-5)
    assert stats["tokens"].tolist() == [3 * (3 * 20 // 8)] * 8  # balanced, and rounded down

    def dense(x, weights):
        w_router, w_gate, w_up, w_down = weights
        p = jax.nn.softmax(x @ w_router)  # [row, token, expert]
        rank = jnp.argsort(jnp.argsort(-p, axis=1), axis=1)
        gate, up = (jnp.einsum("btd,edf->btef", x, w) for w in (w_gate, w_up))
        y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, w_down)
        return jnp.einsum("bted,bte->btd", y, jnp.where(rank < 3 * 20 // 8, p, 0))

    dy = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    grads = lambda f: jax.jit(jax.grad(lambda x, w: (f(x, w) * dy).sum(), argnums=(0, 1)))  # noqa: E731
    found, expected = grads(lambda x, w: f(x, w)[0])(x, weights), grads(dense)(x, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, expected
    )


@pytest.mark.slow
def test_experts_choose_the_same_on_a_mesh():
    alone = run(make_config(model=CHOOSING), make_batch())
    mesh = dict(fsdp=2, expert=2, tensor=2)
    found = run(make_config(mesh, model=CHOOSING), make_batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, alone)
    for i in range(2):
        assert found[1][f"train/block {i:02}/load imbalance"] == 1
