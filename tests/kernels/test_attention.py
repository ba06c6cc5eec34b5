import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmo_jax.config import MeshConfig
from olmo_jax.kernels import blocked
from olmo_jax.kernels.attention import attention
from olmo_jax.sharding import make_mesh


def inputs(seq, heads=4, kv_heads=2, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, seq, heads, dim), *[(2, seq, kv_heads, dim)] * 2, (2, seq, heads, dim)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(seq):
    ends = np.array([seq // 5, seq // 2])
    ids = np.searchsorted(ends, np.arange(seq), side="right")
    return jnp.asarray(np.stack([ids, np.zeros(seq)]), jnp.int32)


def values_and_gradients(impl, q, k, v, d_out, **kwargs):
    def run(q, k, v):
        out, pull = jax.vjp(functools.partial(attention, impl=impl, **kwargs), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)(q, k, v)


@pytest.mark.parametrize(
    ("seq", "kv_heads", "window", "packed"),
    [
        (1, 4, None, False),
        (7, 4, 3, False),  # one block
        (128, 2, None, False),
        (200, 1, None, True),  # a last block that is shorter
        (200, 2, 5, False),
        (200, 4, 64, True),
        (200, 2, 131, False),
        (700, 2, 100, True),  # blocks grow with the sequence
    ],
)
def test_blocked_equals_the_reference(seq, kv_heads, window, packed):
    arrays = inputs(seq, kv_heads=kv_heads)
    options = dict(window=window, segment_ids=documents(seq) if packed else None)
    got, want = (
        values_and_gradients(impl, *arrays, **options) for impl in ("blocked", "reference")
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5)


def test_blocked_equals_the_reference_in_bf16():
    exact = values_and_gradients("reference", *inputs(200))
    got, want = (
        values_and_gradients(impl, *inputs(200, dtype=jnp.bfloat16))
        for impl in ("blocked", "reference")
    )
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        errors = [jnp.abs(x.astype(jnp.float32) - c).mean() for x in (a, b)]
        assert errors[0] <= 1.1 * errors[1]


def test_memory_of_blocked_grows_with_the_sequence_and_not_with_its_square():
    def temp(impl, seq):
        f = functools.partial(values_and_gradients, impl, window=64)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(seq)]
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temp("blocked", 2048) < temp("reference", 2048) / 8


def test_a_remat_policy_that_keeps_the_output_needs_no_second_forward_pass():
    policies = jax.checkpoint_policies
    q, k, v, _ = inputs(32)

    def products(policy):
        kept = jax.checkpoint(functools.partial(attention, impl="blocked"), policy=policy)
        grad = jax.grad(lambda q, k, v: kept(q, k, v).sum(), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(grad)(q, k, v)).count("dot_general")

    # Two products forward, five backward; all of one block.
    assert products(policies.everything_saveable) == 7
    assert products(policies.save_only_these_names("attention_out")) == 7
    assert products(policies.nothing_saveable) == 9


def test_auto_takes_blocks_unless_the_context_is_split():
    q, k, v, _ = inputs(32)

    def form(**kwargs):  # the running maximum of blocked is made in its own rule
        return "custom_vjp" in str(jax.make_jaxpr(functools.partial(attention, **kwargs))(q, k, v))

    assert form()
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, context=2))):
        assert not form()
        assert form(impl="blocked")
    with pytest.raises(NotImplementedError, match="blocked and reference"):
        attention(q, k, v, impl="pallas")


def test_blocks_cover_the_sequence_and_hold_the_visible_keys():
    q, k = jnp.zeros((1, 300, 4, 8)), jnp.zeros((1, 300, 2, 8))
    blocks = list(blocked._blocks(q, k, 10))
    assert [t.start for t, _, _ in blocks] == [0, 64, 128, 192, 256]
    assert [(r.start, r.stop) for _, r, _ in blocks][-1] == (512, 600)
    assert [(s.start, s.stop) for _, _, s in blocks][1] == (55, 128)
