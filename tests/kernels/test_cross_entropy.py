import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.kernels.cross_entropy import cross_entropy


def naive(x, head, targets, weights, vocab_size, z_loss):
    logits = jnp.einsum("btd,dv->btv", x, head)[..., :vocab_size]
    lse = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (lse - picked + z_loss * lse**2))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    weights = (rng.random((2, 12)) < 0.7) / 17.0
    return (
        jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32),
        jnp.asarray(rng.normal(size=(16, 40)), jnp.float32),
        jnp.asarray(rng.integers(0, 37, (2, 12))),
        jnp.asarray(weights, jnp.float32),
    )


@pytest.mark.parametrize("chunk", [None, 24, 8, 5, 1])
@pytest.mark.parametrize("z_loss", [None, 1e-2])
def test_value_and_gradients_equal_the_naive_form(batch, chunk, z_loss):
    x, head, targets, weights = batch

    def ours(x, head):
        return 3.0 * cross_entropy(x, head, targets, weights, 37, z_loss, chunk)[0]

    def exact(x, head):
        return 3.0 * naive(x, head, targets, weights, 37, z_loss or 0.0)

    (loss, grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, head) for f in (ours, exact)
    )
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
    assert jnp.abs(grads[1][:, 37:]).max() == 0  # padded columns get no gradient


def test_parts_do_not_depend_on_chunking_or_the_z_loss(batch):
    # Known fault: the fused head's reported CE held the z-loss.
    x, head, targets, weights = batch
    parts = [
        cross_entropy(x, head, targets, weights, 37, z_loss, chunk)[1]
        for z_loss in (None, 1e-1)
        for chunk in (None, 6)
    ]
    for p in parts[1:]:
        np.testing.assert_allclose(p["ce"], parts[0]["ce"], rtol=1e-6)
        np.testing.assert_allclose(p["z"], parts[0]["z"], rtol=1e-6)


def test_values_equal_olmo_core(shared):
    golden = json.loads((shared / "golden/train_math.json").read_text())["ce_z_loss"]
    logits, labels = jnp.asarray(golden["logits"]), jnp.asarray(golden["labels"])
    weights = (labels != -100).astype(jnp.float32)
    targets = jnp.where(labels < 0, 0, labels)
    _, parts = cross_entropy(logits[None], jnp.eye(3), targets[None], weights[None], 3)
    np.testing.assert_allclose(parts["ce"], golden["sum"][0], rtol=1e-6)
    np.testing.assert_allclose(golden["mult"] * parts["z"], golden["sum"][1], rtol=1e-6)


def test_only_one_chunk_of_logits_is_held():
    tokens, d, vocab = 512, 32, 4096
    x = jax.ShapeDtypeStruct((1, tokens, d), jnp.float32)
    head = jax.ShapeDtypeStruct((d, vocab), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)

    def temp(chunk):
        f = lambda x, h, t, w: cross_entropy(x, h, t, w, vocab, None, chunk)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(f, argnums=(0, 1))).lower(x, head, ids, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(None) > tokens * vocab * 4
    assert temp(32) < temp(None) / 5
