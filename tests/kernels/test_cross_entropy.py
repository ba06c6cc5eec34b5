import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.config.model import MeshConfig
from olmo_jax.kernels.cross_entropy import cross_entropy
from olmo_jax.parallel.sharding import make_mesh


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


@pytest.mark.parametrize(
    "axes", [dict(tensor=4), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4)]
)
@pytest.mark.parametrize("chunk", [None, 3])
def test_devices_with_parts_of_tokens_and_vocabulary_find_the_same(batch, axes, chunk):
    x, head, _, weights = batch
    x, weights = jnp.tile(x, (2, 1, 1)), jnp.tile(weights, (2, 1))
    targets = jnp.asarray(np.random.default_rng(1).integers(0, 37, (4, 12)))  # in every part

    def ours(x, head):
        return cross_entropy(x, head, targets, weights, 37, 1e-2, chunk)[0]

    want = jax.value_and_grad(naive, argnums=(0, 1))(x, head, targets, weights, 37, 1e-2)
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.slow
def test_the_gradient_of_the_head_is_as_exact_as_its_dtype():
    """The scores' gradients are rounded to bf16: 0.10 %. A bf16 sum rounds it again: 0.20 % in one
    chunk, 0.70 % in 32."""
    rng = np.random.default_rng(0)
    tokens, d, vocab = 2048, 64, 512
    x = jnp.asarray(rng.normal(size=(1, tokens, d)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(d, vocab)) * d**-0.5, jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (1, tokens)))
    weights = jnp.full((1, tokens), 1 / tokens)
    want = jax.grad(naive, argnums=1)(
        x.astype(jnp.float32), head, targets, weights, vocab, 0.0
    )  # fmt: skip

    def error(dtype, chunk):
        def loss(head):
            return cross_entropy(x, head, targets, weights, vocab, None, chunk, dtype)[0]

        return float(jnp.linalg.norm(jax.grad(loss)(head) - want) / jnp.linalg.norm(want))

    one, many = error("float32", None), error("float32", 64)
    assert one < 0.0012
    assert abs(many - one) < 1e-5
    assert 0.0015 < error("bfloat16", None) < 0.0025
    assert 0.004 < error("bfloat16", 64) < 0.009


@pytest.mark.parametrize("tokens", [2048, 2039])  # the second is a prime number
def test_any_number_of_tokens_takes_the_fewest_chunks(tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
    head = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    f = lambda *a: cross_entropy(*a, 16, None, 1024)[0]  # noqa: E731
    assert "length=2\n" in str(jax.make_jaxpr(jax.grad(f))(x, head, ids, weights))
