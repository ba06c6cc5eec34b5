"""The grouped product against a plain loop over the groups, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.kernels.grouped_matmul import grouped_matmul
from olmo_jax.pods import hlo, kernels

SIZES = {
    "balanced": [16, 16, 16, 16, 16, 16],
    "uneven": [1, 40, 0, 7, 30, 18],
    "all to one": [0, 0, 0, 96, 0, 0],
    "rows of no group": [5, 0, 20, 0, 0, 9],
}


def by_group(x, w, sizes, dy):
    """Product and gradients by NumPy in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
        dw[e] = x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


@pytest.mark.parametrize(
    ("name", "impl"),
    [(name, impl) for name in SIZES for impl in ("loop", "ragged", "interpret")]
    + [("rows of no group", "auto")],  # that is loop here
)
def test_product_and_gradients_equal_a_loop_over_the_groups(name, impl):
    sizes = SIZES[name]
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.standard_normal(s).astype(np.float32) for s in ((96, 24), (6, 24, 40), (96, 40))
    )
    counts = jnp.array(sizes, jnp.int32)
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, counts, None, "float32", impl), x, w)
    dx, dw = vjp(jnp.asarray(dy))
    for found, expected in zip((y, dx, dw), by_group(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_bfloat16_rows_give_float32_weight_gradients():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 16)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((2, 16, 8)), jnp.float32)
    sizes = jnp.array([40, 24], jnp.int32)
    loss = lambda w: grouped_matmul(x, w, sizes).astype(jnp.float32).sum()  # noqa: E731
    dw = jax.jit(jax.grad(loss))(w)
    assert dw.dtype == jnp.float32
    exact = by_group(x.astype(jnp.float32), w, [40, 24], np.ones((64, 8)))[2]
    np.testing.assert_allclose(dw, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.tpu
def test_on_a_tpu_no_product_takes_all_rows_for_each_group():
    """XLA's own form of the gradient of the matrices does, and takes E times as long."""
    mesh = kernels.one_chip("v5p")
    whole = jax.NamedSharding(mesh, jax.P())
    rows, d, f, groups = 4096, 512, 256, 8
    x, w, dy, sizes = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
        for shape, dtype in (
            ((rows, d), jnp.bfloat16), ((groups, d, f), jnp.float32), ((rows, f), jnp.bfloat16),
            ((groups,), jnp.int32),
        )
    )  # fmt: skip

    def step(x, w, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, pull(dy)

    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(x, w, sizes, dy).compile().as_text()
    found = hlo.totals(text)
    assert found.flops < 2 * rows * d * f  # those outside of kernels: less than a product's
    assert sum(n for kernel, n in found.kernels.items() if "metadata" not in kernel.name) == 3


def test_an_unknown_implementation_is_refused():
    with pytest.raises(NotImplementedError, match="there are auto, ragged and loop"):
        grouped_matmul(jnp.ones((4, 2)), jnp.ones((1, 2, 2)), jnp.array([4]), impl="megablox")
