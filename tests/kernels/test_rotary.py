"""The kernel for QK-norm and RoPE, beside the plain form that `nn/` has for other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.config.model import MeshConfig, ModelConfig
from olmo_jax.kernels import rotary
from olmo_jax.nn import rope
from olmo_jax.nn.attention import norm_rotate
from olmo_jax.parallel.sharding import make_mesh

EPS = 1e-6


def values_and_gradients(run, x, gain, dy):
    y, pull = jax.vjp(run, x, gain)
    return jax.tree.leaves((y, pull(dy)))


def both(seq, n, dim, dtype, with_norm, batch_positions, mesh=None):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(4, seq, n * dim)), dtype) for _ in range(2))
    gain = jnp.asarray(rng.normal(size=(n, dim)), jnp.float32) if with_norm else None
    positions = rng.integers(0, 65_536, (4, seq)) if batch_positions else np.arange(seq)[None]
    config = ModelConfig(head_dim=dim, yarn_factor=8.0)
    cos, sin = rope.table(config, "full", jnp.asarray(positions))

    def plain(x, gain):
        return norm_rotate(x, gain, (cos, sin), n, EPS)

    def ours(x, gain):
        flat = None if gain is None else gain.reshape(-1)
        return rotary.norm_rotate(x, flat, cos, sin, EPS, interpret=True)

    want = values_and_gradients(jax.jit(plain), x, gain, dy)
    if mesh is None:
        return want, values_and_gradients(jax.jit(ours), x, gain, dy)
    with jax.set_mesh(mesh):
        return want, values_and_gradients(jax.jit(ours), x, gain, dy)


@pytest.mark.parametrize(
    ("dim", "batch_positions", "with_norm"),
    [
        (128, True, False),
        (256, False, True),
        pytest.param(128, False, True, marks=pytest.mark.slow),
        pytest.param(256, True, True, marks=pytest.mark.slow),
        pytest.param(256, False, False, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_the_plain_ones(dim, with_norm, batch_positions):
    for a, b in zip(*both(40, 3, dim, jnp.float32, with_norm, batch_positions), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))


@pytest.mark.slow
def test_sums_over_several_blocks_and_what_is_padded_are_right():
    assert rotary._BLOCK // (3 * 256) < 1500  # more than one block of rows, the last one not full
    for a, b in zip(*both(1500, 3, 256, jnp.float32, True, True), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 40, 3 * 128)), jnp.bfloat16)
    gain = jnp.asarray(rng.normal(size=3 * 128), jnp.float32)
    cos, sin = rope.table(ModelConfig(head_dim=128), "full", jnp.arange(40)[None])
    got = rotary.norm_rotate(x, gain, cos, sin, EPS, interpret=True)
    exact = rotary.norm_rotate(x.astype(jnp.float32), gain, cos, sin, EPS, interpret=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_a_mesh_sees_what_one_device_sees():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    for a, b in zip(*both(40, 3, 128, jnp.float32, True, True, mesh), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))
