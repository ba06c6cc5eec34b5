import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from olmo_jax.config.model import MeshConfig, ModelConfig
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config, validate
from olmo_jax.kernels import blocked, pallas_tpu, reference
from olmo_jax.kernels.attention import attention
from olmo_jax.kernels.pallas_tpu import TpuTuning
from olmo_jax.kernels.schedule import Blocks
from olmo_jax.parallel.sharding import make_mesh, spec

SMALL = TpuTuning(Blocks(256, 256, 256, 128), Blocks(256, 256, 256, 128))
UNEQUAL = TpuTuning(Blocks(128, 256, 128, 128), Blocks(256, 128, 128, 128))


def interpreted(tuning, interpret=True):
    """The TPU kernels on a CPU."""

    def run(q, k, v, *, window=None, segment_ids=None):
        return pallas_tpu.attention(
            q, k, v, segment_ids, window, q.shape[3] ** -0.5, tuning, interpret
        )

    return run


IMPLS = {
    "blocked": functools.partial(attention, impl="blocked"),
    "pallas": interpreted(SMALL),
    "pallas, unequal blocks": interpreted(UNEQUAL),
    "pallas, dq in HBM": interpreted(SMALL._replace(dq_vmem=0)),
    # Copies happen when they are waited for, and memory starts as NaN: a missing wait is seen.
    "pallas, late copies": interpreted(
        SMALL._replace(dq_vmem=0),
        pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan"),
    ),
}


def inputs(seq, heads=4, kv_heads=2, dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, seq, heads, dim), *[(2, seq, kv_heads, dim)] * 2, (2, seq, heads, dim)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(kind, seq):
    if kind is None:
        return None
    ends = np.array([seq // 5, seq // 2])
    first = {
        "three": np.searchsorted(ends, np.arange(seq), side="right"),
        "of length 1": np.arange(seq),
        "in any order": np.random.default_rng(1).integers(0, 3, seq),
    }[kind]
    return jnp.asarray(np.stack([first, np.zeros(seq)]), jnp.int32)


def values_and_gradients(run, q, k, v, d_out, **kwargs):
    @jax.jit
    def both(q, k, v, d_out):
        out, pull = jax.vjp(functools.partial(run, **kwargs), q, k, v)
        return out, *pull(d_out)

    return both(q, k, v, d_out)


FAST = [
    (7, (4, 4), 3, None),  # one block
    (200, (4, 1), 1, "three"),  # a last block that is shorter
    (256, (4, 4), 64, "in any order"),
    (300, (4, 2), 131, None),
]
SLOW = [
    (1, (4, 4), None, None),
    (128, (4, 2), None, None),
    (200, (40, 8), 5, None),
    (300, (4, 2), 300, "of length 1"),
    (700, (4, 2), None, "three"),
    (700, (2, 1), 512, None),  # the window ends where blocks do
    (700, (4, 2), 100, "three"),
]
CASES = FAST + SLOW


@pytest.mark.parametrize(
    ("impl", "seq", "heads", "window", "packed"),
    [(impl, *case) for impl in ("blocked", "pallas") for case in FAST]
    + [
        pytest.param(impl, *case, marks=pytest.mark.slow)
        for impl, cases in (
            ("blocked", SLOW),
            ("pallas", SLOW),
            ("pallas, unequal blocks", SLOW[-2:]),
            ("pallas, dq in HBM", SLOW[-2:]),
            ("pallas, late copies", SLOW[-2:-1]),
        )
        for case in cases
    ],
)
def test_every_implementation_equals_the_reference(impl, seq, heads, window, packed):
    arrays = inputs(seq, *heads, dim=16 if heads[0] < 40 else 8)
    options = dict(window=window, segment_ids=documents(packed, seq))
    got, want = (
        values_and_gradients(run, *arrays, **options) for run in (IMPLS[impl], reference.attention)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5)


# The TPU kernels multiply the scale into the queries, which rounds them once more.
@pytest.mark.parametrize(("impl", "factor"), [("blocked", 1.1), ("pallas", 1.25)])
def test_bf16_errs_about_as_much_as_the_reference_in_bf16(impl, factor):
    exact = values_and_gradients(reference.attention, *inputs(200))
    got, want = (
        values_and_gradients(run, *inputs(200, dtype=jnp.bfloat16))
        for run in (IMPLS[impl], reference.attention)
    )
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        errors = [jnp.abs(x.astype(jnp.float32) - c).mean() for x in (a, b)]
        assert errors[0] <= factor * errors[1]


def test_memory_of_blocked_grows_with_the_sequence_and_not_with_its_square():
    def temp(impl, seq):
        run = IMPLS["blocked"] if impl == "blocked" else reference.attention
        f = functools.partial(values_and_gradients, run, window=64)
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


def tpu_mesh(**axes):
    """A mesh of chips that are not here: enough to trace for them."""
    shape = dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | axes
    chip = AbstractDevice("TPU v5 lite", 1, "tpu")
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(tuple(shape.values()), tuple(shape), types, abstract_device=chip)


def test_auto_takes_kernels_on_tpu_and_blocks_elsewhere_also_in_a_ring():
    q, k, v, _ = inputs(32)

    def form(**kwargs):
        text = str(jax.make_jaxpr(functools.partial(attention, **kwargs))(q, k, v))
        kernel = (
            "pallas" if "pallas_call" in text else "blocked" if "custom_vjp" in text else "dense"
        )
        return kernel + " in a ring" * ("ppermute" in text)

    assert form() == "blocked"
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2, tensor=2, fsdp=1))):
        assert form() == form(impl="blocked") == "blocked in a ring"
        assert form(impl="reference") == "dense"
    with jax.sharding.use_abstract_mesh(tpu_mesh(fsdp=2, tensor=2)):
        assert form() == form(impl="pallas") == "pallas"
        assert form(impl="blocked") == "blocked"
    q, k, v, _ = inputs(512)  # chunks of 128
    with jax.sharding.use_abstract_mesh(tpu_mesh(context=2)):
        assert form() == form(impl="pallas") == "pallas in a ring"


def test_a_named_implementation_says_why_it_cannot_run():
    q, k, v, _ = inputs(32)
    with pytest.raises(NotImplementedError, match="there are auto, pallas, cudnn, blocked and"):
        attention(q, k, v, impl="flash")
    with pytest.raises(NotImplementedError, match="a Hopper GPU is needed, this is cpu"):
        attention(q, k, v, impl="pallas")
    mesh = tpu_mesh(fsdp=4)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="batch=2 is not"):
        attention(q, k, v, impl="pallas")


@pytest.mark.parametrize("tensor", [4, 8])
def test_more_tensor_ways_than_kv_heads_are_refused_with_both_numbers(tensor):
    q, k, v, _ = inputs(32, heads=8, kv_heads=2)
    both = rf"n_kv_heads=2 is not divisible by mesh\.tensor={tensor}"
    mesh = tpu_mesh(tensor=tensor)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=both):
        attention(q, k, v)
    model = ModelConfig(d_model=64, n_heads=8, n_kv_heads=2, head_dim=8)
    with pytest.raises(ConfigError, match=both):
        validate(Config(model=model, mesh=MeshConfig(fsdp=1, tensor=tensor)), tensor)


@pytest.mark.parametrize("impl", ["blocked", pytest.param("pallas", marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing(impl):
    options = dict(window=100, segment_ids=documents("three", 300))
    arrays = inputs(300)
    want = values_and_gradients(IMPLS[impl], *arrays, **options)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, spec(("batch", None, "heads", None)))
        got = values_and_gradients(IMPLS[impl], *jax.device_put(arrays, split), **options)
        assert got[0].sharding.is_equivalent_to(split, 4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 128])  # heads as arrays of their own, and as columns
def test_parts_of_the_keys_with_their_distance_add_up_to_the_whole(dim):
    """What a ring does: each device meets the keys of all, and only the logsumexp is shared."""
    part, n = 256, 3
    q, k, v, d_out = (
        x.reshape(*x.shape[:2], -1) for x in inputs(part * n, heads=2, kv_heads=1, dim=dim)
    )
    ids = documents("three", part * n)
    run = dict(head_dim=dim, window=300, scale=dim**-0.5, tuning=SMALL, interpret=True)
    whole, whole_lse = pallas_tpu.forward(q, k, v, ids, ids, **run)
    delta = pallas_tpu.delta(whole, d_out, dim, interpret=True)
    by_head = (d_out * whole).reshape(*d_out.shape[:2], 2, dim).sum(-1)
    np.testing.assert_allclose(delta[:, :, 0], by_head.swapaxes(1, 2), atol=1e-5)
    want = pallas_tpu.backward(q, k, v, ids, ids, whole_lse, delta, d_out, **run)
    of = [slice(i * part, (i + 1) * part) for i in range(n)]

    @jax.jit
    def meet(i, j):  # traced, as on the devices of a ring
        def cut(x, at, axis=1):
            return jax.lax.dynamic_slice_in_dim(x, at * part, part, axis)

        mine = cut(q, i), cut(k, j), cut(v, j), cut(ids, i), cut(ids, j)
        rest = cut(whole_lse, i, 3), cut(delta, i, 3), cut(d_out, i)
        options = dict(offset=(i - j) * part, **run)
        out, lse = pallas_tpu.forward(*mine, **options)
        return out, lse, pallas_tpu.backward(*mine, *rest, **options)

    grads = [jnp.zeros_like(x) for x in want]
    for t in of:
        outs, lses = [], []
        for s in of:
            out, lse, (dq, dk, dv) = meet(of.index(t), of.index(s))
            outs.append(out.reshape(*out.shape[:2], 2, dim))
            lses.append(lse[:, :, 0].swapaxes(1, 2)[..., None])
            grads[0] = grads[0].at[:, t].add(dq)
            grads[1], grads[2] = (
                g.at[:, s].add(d) for g, d in zip(grads[1:], (dk, dv), strict=True)
            )
        weights = jax.nn.softmax(jnp.stack(lses) * np.log(2), axis=0)
        out = (weights * jnp.stack(outs)).sum(0).reshape(whole[:, t].shape)
        np.testing.assert_allclose(out, whole[:, t], atol=3e-6, rtol=1e-5)
    for a, b in zip(grads, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("impl", ["pallas", "cudnn"])
@pytest.mark.parametrize(
    ("seq", "heads", "window", "packed"),
    [*CASES, (4096, (8, 2), None, None), (4096, (8, 2), 1000, "three"), (5000, (4, 4), 512, None)],
)
def test_a_gpu_errs_about_as_much_as_the_reference_in_bf16(impl, seq, heads, window, packed, dim):
    """On the machine itself, beside dense attention in fp32 and in bf16."""
    if jax.devices()[0].platform != "gpu":
        pytest.skip("no GPU here, or OLMO_JAX_TESTS_ON=cuda is not set")
    if impl == "cudnn" and packed:
        pytest.skip("cuDNN knows no documents")
    options = dict(window=window, segment_ids=documents(packed, seq))
    arrays = inputs(seq, *heads, dim=dim, dtype=jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in arrays]
        exact = values_and_gradients(reference.attention, *exact, **options)
    got, want = (
        values_and_gradients(run, *arrays, **options)
        for run in (functools.partial(attention, impl=impl), reference.attention)
    )
    for a, b, c in zip(got, want, exact, strict=True):
        errors = [np.abs(np.asarray(x, np.float32) - c) for x in (a, b)]
        assert errors[0].mean() <= 1.25 * errors[1].mean() + 1e-6
        assert errors[0].max() <= 2 * errors[1].max() + 1e-5


def test_blocks_cover_the_sequence_and_hold_the_visible_keys():
    blocks = list(blocked._blocks(300, 300, 2, blocked.Mask(10, None, None)))
    assert [t.start for t, _, _ in blocks] == [0, 64, 128, 192, 256]
    assert [(r.start, r.stop) for _, r, _ in blocks][-1] == (512, 600)
    assert [(s.start, s.stop) for _, _, s in blocks][1] == (55, 128)
