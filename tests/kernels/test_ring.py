"""Split sequences give what whole ones give, and every device does the same work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from test_attention import SMALL, documents, inputs, tpu_mesh, values_and_gradients

from olmo_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig
from olmo_jax.kernels import blocked, pallas_tpu, reference, ring, schedule
from olmo_jax.kernels.attention import attention
from olmo_jax.kernels.schedule import Blocks
from olmo_jax.sharding import make_mesh, spec
from olmo_jax.validate import validate

MESHES = {
    2: MeshConfig(fsdp=2, context=2, tensor=2),
    4: MeshConfig(fsdp=2, context=4),
    8: MeshConfig(fsdp=1, context=8),
}
OPTIONS = dict(tuning=SMALL.dividing(128), scale=16**-0.5, interpret=True)
INTERPRETED = ring.Kernel(
    functools.partial(pallas_tpu.by_head(pallas_tpu.forward), **OPTIONS),
    functools.partial(pallas_tpu.by_head(pallas_tpu.backward), **OPTIONS),
    unit=128,
)


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


@pytest.mark.parametrize(
    ("ways", "seq", "heads", "window", "packed"),
    [
        (2, 64, (4, 2), None, None),
        (2, 400, (4, 2), None, "three"),  # chunks of 100, blocks of 64
        (2, 400, (4, 2), 130, "three"),  # a window of more than a chunk
        (4, 64, (40, 8), 1, None),
        (4, 64, (4, 1), None, "of length 1"),
        (4, 64, (4, 4), 9, "in any order"),  # a window that ends with the chunk before
        (4, 64, (4, 4), 10, None),  # and one more
        (4, 64, (4, 4), 64, "three"),
        (8, 64, (2, 1), None, "three"),
        (8, 64, (2, 1), 63, None),  # around the whole line of chunks
        (8, 16, (2, 1), None, None),  # chunks of one position
        (8, 16, (2, 1), 3, "in any order"),
    ],
)
def test_a_split_sequence_equals_a_whole_one(ways, seq, heads, window, packed):
    arrays, ids = inputs(seq, *heads, dim=8), documents(packed, seq)
    want = values_and_gradients(reference.attention, *arrays, window=window, segment_ids=ids)
    run = lambda q, k, v, ids: attention(q, k, v, window=window, segment_ids=ids)  # noqa: E731
    got = in_a_ring(make_mesh(MESHES[ways]), run, arrays, ids)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("window", "packed"), [(None, "three"), (None, None), (150, "three")])
def test_the_tpu_kernels_in_a_ring_equal_the_reference(window, packed):
    arrays, ids = inputs(512), documents(packed, 512)
    want = values_and_gradients(reference.attention, *arrays, window=window, segment_ids=ids)
    run = lambda q, k, v, ids: ring.attention(q, k, v, ids, window, INTERPRETED)  # noqa: E731
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


@pytest.mark.parametrize("window", [None, 20])
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
def test_all_devices_compute_the_same_and_nothing_that_causality_hides(ways):
    """Counted in pairs of blocks, by a kernel that says on which device it runs, and over what."""
    seq, blocks, counts = 512, Blocks(8, 8, 8, 8), np.zeros(ways, int)

    def count(device, n):
        counts[device] += n

    def forward(q, k, *arrays, window, offset):
        plan = schedule.make(
            q.shape[2], k.shape[2], blocks, by="q", window=window, offset=offset
        )  # fmt: skip
        jax.debug.callback(count, jax.lax.axis_index("context"), q.shape[0] * plan.count)
        return blocked.forward(q, k, *arrays, window=window, offset=offset)

    mesh = make_mesh(MeshConfig(fsdp=1, context=ways), jax.devices()[:ways])
    q, k, v, _ = (x[:1] for x in inputs(seq, 1, 1, dim=4))
    kernel = ring.Kernel(forward, blocked.backward)
    with jax.set_mesh(mesh):
        jax.block_until_ready(jax.jit(lambda *x: ring.attention(*x, None, None, kernel))(q, k, v))
    jax.effects_barrier()
    n = seq // 8
    assert counts.sum() == n * (n + 1) // 2
    assert counts.max() <= 1.05 * counts.mean()


def test_a_remat_policy_that_keeps_the_output_needs_no_second_forward_pass():
    policies = jax.checkpoint_policies
    arrays = inputs(64)[:3]

    def products(policy):
        kept = jax.checkpoint(attention, policy=policy)
        grad = jax.grad(lambda q, k, v: kept(q, k, v).sum(), argnums=(0, 1, 2))
        with jax.set_mesh(make_mesh(MESHES[4])):
            return str(jax.make_jaxpr(grad)(*arrays)).count("dot_general")

    # Own chunks, a pair at home, two in the loop, two at its end: of each two products forward,
    # five backward; and delta.
    assert products(policies.everything_saveable) == 6 * 7 + 1
    assert products(policies.save_only_these_names("attention_out")) == 6 * 7 + 1
    assert products(policies.nothing_saveable) == 6 * 9 + 1


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
        data=DataConfig(seq_len=36, global_batch_size=72),
        mesh=MESHES[4],
    )
    message = r"data\.seq_len=36 is not divisible by 2 x mesh\.context=8, .*; use 40"
    with pytest.raises(ConfigError, match=message):
        validate(config, 8)
