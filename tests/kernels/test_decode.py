import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.kernels import reference
from olmo_jax.kernels.decode import decode


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (40, 8)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_new_tokens_see_what_the_last_rows_of_whole_sequences_see(new, heads, window):
    rng, lengths = np.random.default_rng(0), np.array([new, 7, 24])
    q, k, v = (rng.normal(size=(3, 24, n, 16)).astype(np.float32) for n in (*heads, heads[1]))
    want = jax.jit(functools.partial(reference.attention, window=window))(q, k, v)
    last = np.arange(3)[:, None], lengths[:, None] - new + np.arange(new)
    for i, n in enumerate(lengths):
        k[i, n:] = v[i, n:] = 9.0  # left over from somebody else
    got = jax.jit(functools.partial(decode, window=window))(q[last], k, v, lengths)
    np.testing.assert_allclose(got, want[last], atol=1e-6)


def test_the_result_has_the_dtype_of_the_queries():
    q = jnp.ones((2, 1, 4, 8), jnp.bfloat16)
    cache = jnp.ones((2, 16, 2, 8), jnp.bfloat16)
    out = decode(q, cache, cache, jnp.array([1, 16]), window=4)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
