"""AdamW, its groups and its guard against torch, Optax and OLMo-core's own trajectories."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from olmo_jax.config.training import OptimConfig
from olmo_jax.training import optim

SHAPES = {
    "embed": (12, 4),
    "layers": {"attn": {"wq": (3, 4, 2, 2), "q_norm": (3, 2, 2)}, "attn_norm": (3, 4)},
    "final_norm": (4,),
    "lm_head": (4, 12),
}
ADAMW = OptimConfig(name="adamw", lr=1e-2)
GUARDED = OptimConfig(name="skip_step_adamw", skip_window=8, skip_sigma=2.0)


def draw(seed, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@partial(jax.jit, static_argnums=0)
def update(cfg, params, state, grads, lr=1e-2, clip=1.0, loss=2.0, has_tokens=True):
    *new, norm, taken = optim.update(
        cfg, grads, state, params, lr, clip, jnp.float32(loss), has_tokens
    )
    return *new, {"optim/total grad norm": norm, "optim/step skipped": 1.0 - taken}


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, rtol=1e-6, atol=1e-7):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, want)


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden" / "train_math.json").read_text())


# --- AdamW ----------------------------------------------------------------------------------------


def test_first_steps_equal_torch_adamw(golden):
    cfg = OptimConfig(name="adamw", no_decay=())
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optim.init(cfg, params)
    for i, want in enumerate(golden["torch_adamw_first4"]):
        grads = {"w": jnp.array([0.1, -0.2, 0.3]) * (i + 1)}
        params, state, _ = update(cfg, params, state, grads, lr=0.1, clip=np.inf)
        assert_close(params["w"], np.float32(want))


@pytest.mark.parametrize(
    ("name", "betas"), [("adamw", (0.9, 0.95)), ("skip_step_adamw", (0.9, 0.999))]
)
def test_ten_steps_with_two_groups_and_clipping_equal_torch(name, betas):
    torch = pytest.importorskip("torch")
    cfg = OptimConfig(name=name, beta1=betas[0], beta2=betas[1], no_decay=("embed", "*norm"))
    params = draw(0)
    state = optim.init(cfg, params)
    mask = jax.tree.leaves(optim.decay_mask(cfg, params))
    twins = [torch.tensor(np.asarray(p), requires_grad=True) for p in jax.tree.leaves(params)]
    torch_optim = torch.optim.AdamW(
        [
            {"params": [p for p, decayed in zip(twins, mask, strict=True) if decayed == want]}
            | {"weight_decay": 0.1 * want}
            for want in (True, False)
        ],
        betas=betas,
        eps=cfg.eps,
    )
    for i in range(10):
        lr, grads = 1e-2 * (1 - i / 20), draw(i + 1, 0.1 * (i + 1))
        for p, g in zip(twins, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        norm = torch.nn.utils.clip_grad_norm_(twins, 1.5)
        for group in torch_optim.param_groups:
            group["lr"] = lr
        torch_optim.step()
        params, state, metrics = update(cfg, params, state, grads, lr=lr, clip=1.5)
        assert metrics["optim/total grad norm"] == pytest.approx(float(norm), rel=1e-6)
        assert metrics["optim/step skipped"] == 0
    assert int(state["count"]) == 10
    assert_close(jax.tree.leaves(params), [p.detach().numpy() for p in twins], 2e-6, 1e-6)
    moments = [torch_optim.state[p] for p in twins]
    assert_close(jax.tree.leaves(state["mu"]), [m["exp_avg"].numpy() for m in moments])
    assert_close(jax.tree.leaves(state["nu"]), [m["exp_avg_sq"].numpy() for m in moments])


def test_it_equals_optax_adamw_with_clipping():
    cfg, params = OptimConfig(name="adamw", weight_decay=0.2), draw(0)
    mask = optim.decay_mask(cfg, params)
    twin = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.2, mask=mask)
    )
    twin_update = jax.jit(twin.update)
    state, want, twin_state = optim.init(cfg, params), params, twin.init(params)
    for i in range(5):
        grads = draw(i + 1)
        params, state, _ = update(cfg, params, state, grads)
        steps, twin_state = twin_update(grads, twin_state, want)
        want = optax.apply_updates(want, steps)
    assert_close(params, want)


def test_clipping_scales_all_gradients_as_torch_does(golden):
    want = golden["grad_clip"]
    cfg = OptimConfig(name="adamw", no_decay=())
    params = {"w": jnp.zeros(2)}
    grads = {"w": jnp.array(want["grad"])}
    state, max_norm = optim.init(cfg, params), want["max_norm"]
    _, clipped, metrics = update(cfg, params, state, grads, clip=max_norm)
    _, free, _ = update(cfg, params, state, grads, clip=np.inf)
    assert metrics["optim/total grad norm"] == want["total_norm"]
    assert_close(clipped["mu"]["w"] / (1 - cfg.beta1), np.float32(want["clipped"]))
    assert_close(free["mu"]["w"] / (1 - cfg.beta1), grads["w"])


def test_bfloat16_gradients_are_taken_in_float32():
    params = draw(0)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), draw(1))
    got = update(ADAMW, params, optim.init(ADAMW, params), grads)
    exact = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    assert_same(got, update(ADAMW, params, optim.init(ADAMW, params), exact))
    assert {x.dtype for x in jax.tree.leaves(got[:1])} == {jnp.dtype("float32")}


def test_the_state_is_plain_and_mirrors_the_parameters():
    params = draw(0)
    state = optim.init(GUARDED, params)
    assert set(state) == {"mu", "nu", "count", "history"}
    for moment in (state["mu"], state["nu"]):
        assert jax.tree.structure(moment) == jax.tree.structure(params)
        assert {x.dtype for x in jax.tree.leaves(moment)} == {jnp.dtype("float32")}
    assert set(optim.init(ADAMW, params)) == {"mu", "nu", "count"}
    assert "lr" not in str(jax.tree.structure(state))  # it follows the config, known fault P07
    after = update(GUARDED, params, state, draw(1))[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


# --- groups ---------------------------------------------------------------------------------------


def test_the_groups_are_told_by_name_and_number_from_shapes_alone():
    cfg = OptimConfig(no_decay=("embed", "layers/*_norm"))
    abstract = jax.eval_shape(lambda: draw(0))
    assert optim.describe_groups(cfg, abstract) == (
        "weight decay 0.1, 100 parameters: final_norm, layers/attn/wq, lm_head\n"  # 4 + 48 + 48
        "no weight decay, 72 parameters: embed, layers/attn/q_norm, layers/attn_norm"
    )
    assert optim.describe_groups(OptimConfig(no_decay=("*",)), abstract).startswith(
        "weight decay 0.1, 0 parameters: nothing\nno weight decay, 172 parameters: embed"
    )
    assert optim.describe_groups(OptimConfig(no_decay=()), abstract).endswith(
        "\nno weight decay, 0 parameters: nothing"
    )


def test_by_default_all_but_the_embedding_decays():
    mask = optim.decay_mask(OptimConfig(), draw(0))
    assert mask.pop("embed") is False
    assert all(jax.tree.leaves(mask))


def test_a_glob_that_matches_nothing_is_refused_with_the_names_there_are():
    message = (
        r"config.optim.no_decay: 'embeddings' matches no parameter; there are embed, final_norm,"
        r" layers/attn/q_norm, layers/attn/wq, layers/attn_norm, lm_head"
    )
    with pytest.raises(ValueError, match=message):
        optim.decay_mask(OptimConfig(no_decay=("embed", "embeddings")), draw(0))


def test_decay_pulls_only_the_decayed_group():
    params = draw(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, _, _ = update(ADAMW, params, optim.init(ADAMW, params), zeros, lr=0.5)
    want = jax.tree.map(lambda p: p * (1 - 0.5 * 0.1), params) | {"embed": params["embed"]}
    assert_close(got, want)


# --- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True], ids=["fixed", "step count frozen"])
def test_skip_steps_equal_olmo_core(golden, freeze):
    want = golden["skip_step_adamw"]
    cfg = OptimConfig(
        name="skip_step_adamw",
        no_decay=(),
        skip_window=want["rolling_interval_length"],
        skip_sigma=want["sigma_factor"],
        freeze_adam_step=freeze,
    )
    params = {"w": jnp.array(want["init"])}
    state = optim.init(cfg, params)
    for i, row in enumerate(want["step_increment_bugfix_false" if freeze else "foreach_false"]):
        # There the rule was told norms that are not the gradients'. It does not see a common
        # factor: gradients of ten times that norm, clipped to what they were, are the same case.
        grads = np.array([0.1, -0.2, 0.3]) * (i + 1)
        norm = np.linalg.norm(grads)
        scaled = {"w": jnp.asarray(grads * 10 * row["grad_norm"] / norm, jnp.float32)}
        params, state, metrics = update(
            cfg, params, state, scaled, lr=want["lr"], clip=norm, loss=row["loss"]
        )
        assert metrics["optim/step skipped"] == row["skipped"]
        assert state["count"] == row["opt_step"]
        assert_close(params["w"], np.float32(row["param"]), atol=5e-7)  # from 1 to 0.04


def expected_to_skip(losses, norms, window, sigma):
    """The rule in NumPy: whether each step is skipped, outliers staying in the history."""
    skipped = []
    for i in range(len(losses)):
        skip = False
        if min(i + 1, window + 1) >= max(2, window // 2):
            for values in filter(None, (losses, norms)):
                before = np.array(values[max(0, i - window) : i])
                skip |= not values[i] - before.mean() <= sigma * before.std(ddof=1)
        skipped.append(float(skip))
    return skipped


@pytest.mark.parametrize("clips", [True, False])
def test_the_history_rolls_over_and_keeps_outliers(clips):
    """Over many windows; without clipping only the loss counts, as OLMo-core has no norm then."""
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(2.0, 0.1, 60), rng.normal(1.0, 0.1, 60)
    losses[[13, 14, 30]] = 9.0, 8.0, -9.0  # only upward counts; the second is within the spread
    norms[[20, 40]] = 7.0
    cfg = OptimConfig(
        name="skip_step_adamw",
        skip_window=8,
        skip_sigma=2.5,
        no_decay=(),
        max_grad_norm=1.0 if clips else None,
    )
    params = {"w": jnp.ones(1)}
    state, skipped = optim.init(cfg, params), []
    for loss, norm in zip(losses, norms, strict=True):
        grads = {"w": jnp.full([1], norm, jnp.float32)}
        params, state, metrics = update(cfg, params, state, grads, loss=loss)
        skipped.append(float(metrics["optim/step skipped"]))
    want = expected_to_skip(list(losses), list(norms) if clips else None, 8, 2.5)
    assert skipped == want
    assert [skipped[13], skipped[14], skipped[20], skipped[30]] == [1, 0, float(clips), 0]
    assert int(state["history"]["filled"]) == 60
    assert int(state["count"]) == 60 - sum(want)


def test_the_guard_sleeps_until_half_a_window_is_known():
    cfg, params = OptimConfig(skip_window=128), draw(0)
    state = optim.init(cfg, params)
    for i in range(64):
        loss = 1e6 if i in (62, 63) else 2.0 + 0.01 * (i % 2)
        params, state, metrics = update(cfg, params, state, draw(1), loss=loss)
        assert metrics["optim/step skipped"] == (i == 63)


@pytest.mark.parametrize("cfg", [ADAMW, GUARDED], ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("fault", ["loss nan", "loss inf", "grad nan", "grad inf", "no tokens"])
def test_a_bad_step_changes_nothing_and_is_counted(cfg, fault):
    params = draw(0)
    params, state, _ = update(cfg, params, optim.init(cfg, params), draw(1))
    grads, loss = draw(2), 2.0
    if fault.startswith("loss"):
        loss = float(fault[5:])
    elif fault.startswith("grad"):
        grads["lm_head"] = grads["lm_head"].at[1, 1].set(float(fault[5:]))
    else:  # an all-masked batch divides by zero tokens, known fault P02
        grads, loss = jax.tree.map(lambda g: g * jnp.nan, grads), float("nan")
    for has_tokens in (True, False) if fault != "no tokens" else (False,):
        got, after, metrics = update(cfg, params, state, grads, loss=loss, has_tokens=has_tokens)
        assert metrics["optim/step skipped"] == 1
        assert_same(got, params)
        assert_same(after, state)
    params, state, metrics = update(cfg, params, state, draw(3))
    assert metrics["optim/step skipped"] == 0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
    assert int(state["count"]) == 2


def test_a_step_without_tokens_changes_nothing_even_if_all_is_finite():
    params = draw(0)
    params, state, _ = update(GUARDED, params, optim.init(GUARDED, params), draw(1))
    got, after, metrics = update(GUARDED, params, state, draw(2), has_tokens=False)
    assert_same((got, after), (params, state))
    assert metrics["optim/step skipped"] == 1


# --- as a part of the compiled step ---------------------------------------------------------------


def test_sharded_parameters_are_updated_as_whole_ones_are():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {"embed": (16, 8), "layers": {"wq": (3, 8, 16)}, "final_norm": (8,)}
    specs = {"embed": P(None, "fsdp"), "layers": {"wq": P(None, "fsdp")}, "final_norm": P("fsdp")}
    like_params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params, whole = (draw(0, shapes=shapes) for _ in range(2))
    params = jax.device_put(params, like_params)
    state, whole_state = optim.init(GUARDED, params), optim.init(GUARDED, whole)
    for i in range(5):
        grads = draw(i + 1, shapes=shapes)
        loss = np.nan if i == 2 else 2.0
        whole, whole_state, want = update(GUARDED, whole, whole_state, grads, loss=loss)
        grads = jax.device_put(grads, like_params)
        params, state, got = update(GUARDED, params, state, grads, loss=loss)
        jax.block_until_ready(params)
        assert_close(got, want)
    assert_close((params, state), (whole, whole_state))
    for tree in (params, state["mu"], state["nu"]):
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == specs


def test_the_update_is_one_compilation_in_place_and_without_temporaries():
    """A learning rate or a skip is data; XLA needs no second copy of moments or parameters."""
    params = draw(0, shapes={"embed": (256, 256), "lm_head": (256, 256)})
    step = jax.jit(
        lambda params, state, grads, lr, loss: optim.update(
            GUARDED, grads, state, params, lr, 1.0, loss, True
        ),
        donate_argnums=(0, 1),
    )
    state = optim.init(GUARDED, params)
    compiled = step.lower(params, state, params, 1e-3, jnp.float32(2.0)).compile()
    sizes = compiled.memory_analysis()
    assert sizes.temp_size_in_bytes < 256 * 256 * 4
    assert sizes.alias_size_in_bytes >= 6 * 256 * 256 * 4
    grads = draw(1, shapes={"embed": (256, 256), "lm_head": (256, 256)})
    for lr, loss in ((1e-3, 2.0), (2e-3, np.nan), (0.0, 3.0)):
        params, state, *_ = step(params, state, grads, lr, jnp.float32(loss))
    assert step._cache_size() == 1
