"""Split sequences give what whole ones give, and every device does the same work."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, NamedSharding
from test_attention import SMALL, documents, inputs, tpu_mesh, values_and_gradients

from olmo_jax.config import describe
from olmo_jax.config.data import FixedLength
from olmo_jax.config.model import ComputeConfig, MeshConfig, ModelConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config, validate
from olmo_jax.kernels import pallas_tpu, reference, ring
from olmo_jax.kernels.attention import attention
from olmo_jax.parallel.sharding import make_mesh, spec
from olmo_jax.training import start

MESHES = {
    2: MeshConfig(fsdp=2, context=2, tensor=2),
    4: MeshConfig(fsdp=2, context=4),
    8: MeshConfig(fsdp=1, context=8),
}


def in_a_ring(mesh, run, arrays, segment_ids=None):
    """Output and gradients of `run(q, k, v, segment_ids)`; outside, positions are in order."""

    @jax.jit
    def split(arrays, ids):
        arrays, ids = jax.tree.map(ring.to_zigzag, (arrays, ids))
        q, k, v, d_out = arrays
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, ids), q, k, v)
        return jax.tree.map(ring.from_zigzag, (out, *pull(d_out)))

    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, spec(("batch", "seq", "heads", None)))
        return split(jax.device_put(arrays, whole), segment_ids)


FAST = [
    (2, 64, (4, 2), None, None),
    (2, 400, (4, 2), 130, "three"),  # a window of more than a chunk
    (4, 64, (4, 4), 9, "in any order"),  # a window that ends with the chunk before
    (4, 64, (4, 4), 10, None),  # and one more
    (8, 16, (2, 1), 3, "in any order"),
]
SLOW = [
    (2, 400, (4, 2), None, "three"),  # chunks of 100, blocks of 64
    (4, 64, (40, 8), 1, None),
    (4, 64, (4, 1), None, "of length 1"),
    (4, 64, (4, 4), 64, "three"),
    (8, 64, (2, 1), None, "three"),
    (8, 64, (2, 1), 63, None),  # around the whole line of chunks
    (8, 16, (2, 1), None, None),  # chunks of one position
]


@pytest.mark.parametrize(
    ("ways", "seq", "heads", "window", "packed"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_split_sequence_equals_a_whole_one(ways, seq, heads, window, packed):
    arrays, ids = inputs(seq, *heads, dim=8), documents(packed, seq)
    want = values_and_gradients(reference.attention, *arrays, window=window, segment_ids=ids)
    run = lambda q, k, v, ids: attention(q, k, v, window=window, segment_ids=ids)  # noqa: E731
    got = in_a_ring(make_mesh(MESHES[ways]), run, arrays, ids)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "window", "packed"),
    [
        (128, None, None),
        pytest.param(16, None, "three", marks=pytest.mark.slow),
        pytest.param(16, 150, "three", marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernels_in_a_ring_equal_the_reference(dim, window, packed):
    arrays, ids = inputs(512, dim=dim), documents(packed, 512)
    want = values_and_gradients(reference.attention, *arrays, window=window, segment_ids=ids)
    options = dict(head_dim=dim, scale=dim**-0.5, tuning=SMALL.dividing(128), interpret=True)
    kernel = ring.RingKernel(
        functools.partial(pallas_tpu.forward, **options),
        functools.partial(pallas_tpu.backward, **options),
        functools.partial(pallas_tpu.delta, head_dim=dim, interpret=True),
        unit=128,
    )
    run = lambda q, k, v, ids: ring.attention(q, k, v, ids, window, kernel)  # noqa: E731
    got = in_a_ring(make_mesh(MESHES[2]), run, arrays, ids)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


def test_the_reference_on_a_mesh_sees_the_same_keys():
    arrays, ids = inputs(64), documents("three", 64)
    options = dict(window=20, segment_ids=ids)
    want = values_and_gradients(reference.attention, *arrays, **options)
    dense = functools.partial(attention, window=20, impl="reference")
    run = lambda q, k, v, ids: dense(q, k, v, segment_ids=ids)  # noqa: E731
    for a, b in zip(in_a_ring(make_mesh(MESHES[4]), run, arrays, ids), want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_keys_keep_their_own_documents(window):
    # Known fault: keys were given the document ids of the local queries.
    ids = jnp.asarray(np.searchsorted([10, 37], np.arange(64), side="right"), jnp.int32)
    ids, arrays, mesh = jnp.tile(ids, (2, 1)), inputs(64), make_mesh(MESHES[4])
    run = lambda q, k, v, ids: attention(q, k, v, window=window, segment_ids=ids)  # noqa: E731
    first = in_a_ring(mesh, run, arrays, ids)
    other = in_a_ring(mesh, run, [x.at[:, :10].multiply(3) for x in arrays], ids)
    for a, b in zip(first, other, strict=True):
        np.testing.assert_array_equal(a[:, 10:], b[:, 10:])
        assert not np.array_equal(a[:, :10], b[:, :10])


@pytest.mark.slow
def test_bf16_errs_about_as_much_as_on_one_device():
    run = lambda q, k, v, ids: attention(q, k, v)  # noqa: E731
    exact, whole, split = (
        values_and_gradients(reference.attention, *inputs(256)),
        values_and_gradients(reference.attention, *inputs(256, dtype=jnp.bfloat16)),
        in_a_ring(make_mesh(MESHES[4]), run, inputs(256, dtype=jnp.bfloat16)),
    )
    for a, b, c in zip(split, whole, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        errors = [jnp.abs(x.astype(jnp.float32) - c).mean() for x in (a, b)]
        assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_positions_go_into_the_order_of_the_ring_and_back(ways):
    mesh, seq = make_mesh(MESHES[ways]), 48
    x = jnp.arange(2 * seq * 3).reshape(2, seq, 3)
    with jax.set_mesh(mesh):
        split = jax.jit(ring.to_zigzag)(
            jax.device_put(x, NamedSharding(mesh, spec(("batch", "seq"))))
        )
        order = ring.order(seq)
        np.testing.assert_array_equal(split, x[:, order])
        np.testing.assert_array_equal(jax.jit(ring.from_zigzag)(split), x)
    chunks = np.asarray(order).reshape(2 * ways, -1)[:, 0] // (seq // (2 * ways))
    assert [tuple(pair) for pair in chunks.reshape(ways, 2)] == [
        (i, 2 * ways - 1 - i) for i in range(ways)
    ]


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_visible_chunks_meet_once_hidden_ones_never_and_every_device_does_the_same(ways):
    mesh = make_mesh(MeshConfig(fsdp=1, context=ways), jax.devices()[:ways])
    n = 2 * ways

    def run():
        here = jax.lax.axis_index("context")
        chunks = jnp.stack([here, n - 1 - here])

        def meet(mine, other, theirs, met, nothing):
            return met.at[chunks[mine], theirs[other]].add(1), nothing

        return ring._around(meet, chunks, jnp.zeros((n, n), int), ())[0][None]

    with jax.set_mesh(mesh):
        met = jax.jit(jax.shard_map(run, in_specs=(), out_specs=spec(("seq",)), check_vma=False))()
    np.testing.assert_array_equal(met.sum(0), np.tril(np.ones((n, n)), -1))
    # In pairs of blocks, 16 to a chunk; each device has two chunks on the diagonal.
    work = met.sum((1, 2)) * 16**2 + 16 * 17
    assert work.sum() == 16 * n * (16 * n + 1) / 2
    assert work.max() <= 1.05 * work.mean()


def test_a_remat_policy_that_keeps_the_output_needs_no_second_forward_pass():
    policies = jax.checkpoint_policies
    arrays = inputs(64)[:3]

    def products(policy):
        kept = jax.checkpoint(attention, policy=policy)
        grad = jax.grad(lambda q, k, v: kept(q, k, v).sum(), argnums=(0, 1, 2))
        with jax.set_mesh(make_mesh(MESHES[4])):
            return str(jax.make_jaxpr(grad)(*arrays)).count("dot_general")

    # Own chunks, then five pairs: one at home, two in the loop, two at its end. Each has 2 products
    # forward and 5 backward, each pair 2 to be joined; and there is delta.
    forward, backward = 6 * 2 + 5 * 2, 6 * 5 + 1
    assert products(policies.everything_saveable) == forward + backward
    assert products(policies.save_only_these_names("attention_out")) == forward + backward
    assert products(policies.nothing_saveable) == 2 * forward + backward


def test_a_sequence_that_cannot_be_split_is_refused_with_both_numbers():
    q, k, v, _ = inputs(36)
    with (
        jax.set_mesh(make_mesh(MESHES[4])),
        pytest.raises(ValueError, match=r"seq=36 is not divisible by 2 x mesh\.context=8"),
    ):
        attention(q, k, v)
    q, k, v, _ = inputs(384)
    with (
        jax.sharding.use_abstract_mesh(tpu_mesh(context=2)),
        pytest.raises(ValueError, match=r"seq=384 over 2 x mesh\.context is chunks of 96, no m"),
    ):
        attention(q, k, v)
    config = Config(
        model=ModelConfig(d_model=64, n_heads=8, n_kv_heads=2, head_dim=8),
        data=FixedLength(seq_len=36, global_batch_size=72),
        mesh=MESHES[4],
    )
    message = r"data\.seq_len=36 is not divisible by 2 x mesh\.context=8, .*; use 40"
    with pytest.raises(ConfigError, match=message):
        validate(config, 8)


def test_chunks_that_a_tpu_cannot_take_are_refused_at_start_and_told_in_a_dry_run():
    config = Config(
        data=FixedLength(seq_len=1024, global_batch_size=8192, paths=("x",)),
        mesh=MeshConfig(fsdp=1, context=8),
    )
    chips = types.SimpleNamespace(
        shape={"context": 8}, devices=np.array([AbstractDevice("TPU v5 lite", 1, "tpu")])
    )
    with pytest.raises(ConfigError) as refused:
        start.with_attention(config, chips)
    assert refused.value.problems == [
        "config.data.seq_len=1024 over 2 x mesh.context=16 is chunks of 64, on a TPU they are"
        " multiples of 128; use a multiple of 2048, a smaller mesh.context or"
        " compute.attention=blocked"
    ]
    assert "16 of each row, 64 tokens; no multiple of 128" in describe.describe(config, 8, [])
    blocked = dataclasses.replace(config, compute=ComputeConfig(attention="blocked"))
    start.with_attention(blocked, chips)
    start.with_attention(config, make_mesh(config.mesh))  # a CPU takes any
