import dataclasses
import functools

import compile_step
import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest

from olmo_jax import config
from olmo_jax.generation import sampling
from olmo_jax.generation.sampling import sample
from olmo_jax.nn import transformer
from olmo_jax.parallel import sharding

MODEL = config.ModelConfig(
    vocab_size=50, padded_vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2,
    head_dim=8, d_ff=32, max_seq_len=16, init_std=0.5, layer_types=("sliding", "full"), window=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return transformer.Transformer(MODEL)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(transformer.init, static_argnums=0)(model.config, jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return made.logits_of(model, params, tokens)


class Fixed:
    """A model whose logits do not depend on its input."""

    def __init__(self, n_ids):
        self.config = config.ModelConfig(vocab_size=n_ids)

    def apply(self, variables, tokens):
        return transformer.Output(jnp.ones((*tokens.shape, 1)), None, {}, {})


@pytest.mark.parametrize("n_prompt", [1, 7, 8, 20])
def test_greedy_takes_the_most_likely_id_of_the_last_context_ids(model, params, n_prompt):
    ids = [int(i) for i in np.random.default_rng(n_prompt).integers(0, 50, n_prompt)]
    for new in sample(model, params, ids, 12, temperature=0.0, context=8):
        seen = ids[-8:]
        window = np.pad(np.array(seen, np.int32), (0, 8 - len(seen)))
        assert new == int(logits_of(model, params, window[None])[0, len(seen) - 1].argmax())
        ids.append(new)


def test_one_compilation_serves_all_prompts_temperatures_and_seeds(model, params):
    sampling._continue.clear_cache()
    for ids, temperature, seed in ([1], 0, 0), ([1, 2, 3], 0.7, 1), (list(range(30)), 1.0, 2):
        assert len(sample(model, params, ids, 3, temperature, seed, context=8)) == 3
    assert sampling._continue._cache_size() == 1


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(model, params):
    draw = [sample(model, params, [1, 2], 16, 1.0, seed, context=8) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert all(0 <= i < 50 for ids in draw for i in ids)  # never a padded row


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution_at_their_temperature(temperature):
    logits = np.log([0.5, 0.25, 0.15, 0.07, 0.03])
    params = {"lm_head": jnp.array(logits, jnp.float32)[None]}
    ids = sample(Fixed(5), params, [0], 4000, temperature, seed=3, context=2)
    p = np.exp(logits / temperature)
    p /= p.sum()
    counts = np.bincount(ids, minlength=5)
    chi2 = np.sum((counts - 4000 * p) ** 2 / (4000 * p))
    assert chi2 < 18.5  # 99.9 % of 4 degrees of freedom


def test_bad_requests_are_refused(model, params):
    with pytest.raises(ValueError, match="the prompt is empty"):
        sample(model, params, [], 1)
    with pytest.raises(ValueError, match=r"temperature=-1"):
        sample(model, params, [1], 1, -1)
    assert sample(model, params, [1], 0) == []
    ahead = dataclasses.replace(MODEL, n_experts=4, router="expert_choice")
    with pytest.raises(ValueError, match=r"model\.router=expert_choice: .* cannot continue a text"):
        sample(transformer.Transformer(ahead), params, [1], 1)


@pytest.mark.tpu
def test_parameters_on_all_chips_of_a_tpu_are_sampled_from(monkeypatch):
    # Known fault: XLA was to split the kernels for TPU, which it cannot.
    chips = compile_step.devices("v5e:2x4")
    monkeypatch.setattr(jax, "devices", lambda: chips)
    wide = dataclasses.replace(MODEL, head_dim=128)  # takes the kernel for rotary embedding too
    c = config.Config(model=wide)
    params = made.state_shapes(c, sharding.make_mesh(c.mesh, chips)).params
    window, scalar = jax.ShapeDtypeStruct((16,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampling._continue.lower(
        transformer.Transformer(wide), 4, params, window, scalar, 0.7, key
    ).compile()
