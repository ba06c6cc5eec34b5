"""The GPU kernels without a GPU: interpreted (JAX 0.12), lowered, and through NVIDIA's compiler."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import ai2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from olmo_jax.kernels import cudnn, pallas_gpu, reference, schedule
from olmo_jax.kernels.attention import attention, choose
from olmo_jax.kernels.pallas_gpu import GpuTuning
from olmo_jax.kernels.pallas_gpu_body import Sizes

ROOT = pathlib.Path(__file__).parents[2]
SMALL = GpuTuning(Sizes(64, 64, 2), Sizes(64, 64, 2), Sizes(64, 64, 2))  # slots are used again soon
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def gpu_mesh(device=H100, **axes):
    """A mesh of GPUs that are not here: enough to lower for them."""
    shape = dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | axes
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(tuple(shape.values()), tuple(shape), types, abstract_device=device)


def inputs(seq, heads, dim, dtype=jnp.float32, batch=1):
    rng = np.random.default_rng(0)
    shapes = [(batch, seq, n, dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(kind, seq):
    if kind is None:
        return None
    ids = {
        "three": np.searchsorted([seq // 5, seq // 2], np.arange(seq), side="right"),
        "of length 1": np.arange(seq),
        "in any order": np.random.default_rng(1).integers(0, 3, seq),
    }[kind]
    return jnp.asarray(ids[None], jnp.int32)


def values_and_gradients(run, q, k, v, d_out):
    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(d_out)


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX before 0.12 has no interpreter for GPU"
)
@pytest.mark.parametrize(
    ("seq", "heads", "dim", "window", "packed", "tuning"),
    [
        (1, (1, 1), 48, None, None, SMALL),
        (200, (2, 1), 64, 70, "three", SMALL),
        pytest.param(200, (1, 1), 128, None, "in any order", GpuTuning(), marks=pytest.mark.slow),
        pytest.param(300, (4, 2), 64, None, None, SMALL, marks=pytest.mark.slow),
        pytest.param(600, (1, 1), 64, 256, None, GpuTuning(), marks=pytest.mark.slow),
        pytest.param(300, (1, 1), 64, 5, "of length 1", GpuTuning(), marks=pytest.mark.slow),
    ],
)
def test_the_interpreted_kernels_equal_the_reference(seq, heads, dim, window, packed, tuning):
    """In fp32, with races detected, and with memory that is NaN until it is written."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    arrays, ids = inputs(seq, heads, dim), documents(packed, seq)

    def ours(q, k, v):
        return pallas_gpu.attention(q, k, v, ids, window, dim**-0.5, tuning, params)

    got = values_and_gradients(ours, *arrays)
    run = functools.partial(reference.attention, window=window, segment_ids=ids)
    for a, b in zip(got, values_and_gradients(run, *arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=1e-5)


@functools.lru_cache
def lowered(shape, kv_heads, window, has_documents, dtype, axes=(), kept=None):
    """Forward and backward of `attention` for H100s, as text."""
    mesh = gpu_mesh(**dict(axes))
    q = jax.ShapeDtypeStruct(shape, dtype)
    k = jax.ShapeDtypeStruct((*shape[:2], kv_heads, shape[3]), dtype)
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if has_documents else None

    def both(q, k, v, ids, d_out):
        run = functools.partial(attention, window=window, segment_ids=ids, impl="pallas")
        if kept is not None:
            policy = jax.checkpoint_policies.save_only_these_names(kept)
            run = jax.checkpoint(run, policy=policy)
        return values_and_gradients(run, q, k, v, d_out)

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(both).trace(q, k, k, ids, q).lower(lowering_platforms=("cuda",))
    return program.as_text()


def calls(text):
    """How many kernels the program calls."""
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize(
    ("dim", "dtype", "window", "documents"),
    [
        (64, "float16", None, False),
        (128, "bfloat16", 4096, True),
        pytest.param(64, "bfloat16", 4096, True, marks=pytest.mark.slow),
        pytest.param(128, "float16", None, False, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_lower_for_an_h100(dim, dtype, window, documents):
    assert calls(lowered((2, 8192, 10, dim), 2, window, documents, dtype)) == 3


def test_each_gpu_of_a_mesh_has_its_rows_and_heads():
    text = lowered((4, 1000, 8, 128), 4, 300, True, "bfloat16", (("fsdp", 2), ("tensor", 2)))
    assert "tensor<2x1024x4x128xbf16>" in text  # padded to whole blocks
    assert calls(text) == 3


@pytest.mark.parametrize(("kept", "kernels"), [("attention_out", 3), ("nothing", 4)])
def test_a_kept_output_needs_no_second_forward_kernel(kept, kernels):
    text = lowered((1, 1024, 4, 64), 4, None, False, "bfloat16", kept=kept)
    assert calls(text) == kernels


CASES = [
    dict(shape=(1, 8192, 32, 128), kv_heads=32),
    dict(shape=(2, 8192, 40, 128), kv_heads=8, window=4096, has_documents=True),
    dict(shape=(1, 65536, 16, 64), kv_heads=16, has_documents=True, dtype="float16"),
    dict(shape=(4, 1000, 8, 128), kv_heads=4, window=300, devices=4, tensor=2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [CASES[1::2], pytest.param(CASES[::2], marks=pytest.mark.by_hand)],
    ids=["windows", "without"],
)
def test_nvidias_compiler_takes_the_kernels_and_finds_registers_for_them(cases, pytestconfig):
    folder = ai2.cuda(pytestconfig.cache.mkdir("cuda"))
    root = folder / "nvidia/cu13"
    path = os.pathsep.join(map(str, (folder, ROOT)))
    environment = os.environ | {
        "PYTHONPATH": path, "JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "MOSAIC_GPU_CUDA_ROOT": str(root), "MOSAIC_GPU_DUMP_PTXAS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests/kernels/compile_gpu.py"), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        assert not result["moved"]
        rows, seq, heads, dim = case["shape"]
        assert result["temp"] < 4 * rows * seq * heads * dim * 2  # a few arrays, no scores
    # What ptxas says of each kernel: bytes of a thread's registers that it keeps in memory.
    spilled = re.findall(
        r"entry function 'attention_(\w+?)_mosaic.*?frame, (\d+) bytes", done.stdout, re.S
    )
    assert len(spilled) == 3 * len(cases)
    for kernel, n in spilled:
        assert int(n) <= {"forward": 0, "d_queries": 0, "d_keys": 100}[kernel]
    assert "serialized" not in done.stdout  # products that it cannot overlap


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 100, 128, 300, 5000])
@pytest.mark.parametrize("packed", [None, "three", "in any order"])
@pytest.mark.parametrize(("by", "blocks"), [("q", (128, 128)), ("q", (128, 64)), ("kv", (64, 128))])
def test_ranges_hold_what_is_visible_and_mask_what_is_not(by, blocks, packed, window):
    seq, ids = 1024, documents(packed, 1024)
    ranges = np.asarray(schedule.ranges(seq, *blocks, by=by, window=window, ids=ids))
    visible = np.asarray(reference.visible(seq, window, ids))[0]
    tiles = visible.reshape(seq // blocks[0], blocks[0], seq // blocks[1], blocks[1])
    tiles = tiles.transpose(0, 2, 1, 3) if by == "q" else tiles.transpose(2, 0, 1, 3)
    for row, (first, start, end, stop) in zip(tiles, ranges[0], strict=True):
        assert 0 <= first <= start <= end <= stop <= len(row)
        assert not row[:first].any()
        assert not row[stop:].any()
        assert row[start:end].all()
        if packed != "in any order":  # nothing is visited in vain, nor masked in vain
            assert all(block.any() for block in row[first:stop])
            assert not any(block.all() for block in [*row[first:start], *row[end:stop]])
        if packed is window is None:  # the loops that kernels leave out
            assert start == first if by == "q" else end == stop


@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
def test_cudnn_is_asked_for_the_right_mask(window):
    """JAX's own form of the same arguments, since cuDNN needs a GPU."""
    arrays = inputs(64, (4, 2), 16, batch=2)
    got, want = (
        values_and_gradients(run, *arrays)
        for run in (
            functools.partial(cudnn.attention, window=window, scale=0.25, implementation="xla"),
            functools.partial(reference.attention, window=window),
        )
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5)


def test_auto_takes_cudnn_on_a_gpu_where_it_can_and_blocks_where_not():
    of_olmo = ("bfloat16", 128)
    assert choose(H100, False, *of_olmo, False) == "cudnn"
    assert choose(H100, False, *of_olmo, True) == "blocked"  # documents
    assert choose(H100, False, "float32", 128, False) == "blocked"
    assert choose(H100, False, "bfloat16", 256, False) == "blocked"
    assert choose(H100, True, *of_olmo, False) == "blocked"  # in a ring
    amd = AbstractDevice("AMD Instinct MI300X", 304, "gpu")
    assert choose(amd, False, *of_olmo, False) == "blocked"


REFUSALS = [
    ("cudnn", H100, dict(dtype="float32"), "bfloat16 or float16 is needed, this is float32"),
    ("cudnn", H100, dict(dim=136), "head_dim=136 is no multiple of 8 up to 128"),
    ("cudnn", H100, dict(packed=True), "no segment_ids"),
    ("cudnn", AbstractDevice("cpu", 1, "cpu"), {}, "an NVIDIA GPU is needed, this is cpu"),
    ("pallas", AbstractDevice("NVIDIA B200", 148, "gpu"), {}, "Hopper GPU .* this is NVIDIA B200"),
    ("pallas", AbstractDevice("NVIDIA A100-SXM4-80GB", 108, "gpu"), {}, "this is NVIDIA A100"),
    ("pallas", H100, dict(dtype="float32"), "bfloat16 or float16 is needed, this is float32"),
    ("pallas", H100, dict(dim=208), "head_dim=208 is more than 128"),
    ("cudnn", H100, dict(context=2), "context splits"),
    ("pallas", H100, dict(context=2), "context splits"),
]


@pytest.mark.parametrize(("impl", "device", "what", "why"), REFUSALS)
def test_a_named_implementation_says_what_it_cannot_do_on_a_gpu(impl, device, what, why):
    q = jax.ShapeDtypeStruct((2, 64, 4, what.get("dim", 64)), what.get("dtype", "bfloat16"))
    ids = jnp.zeros((2, 64), jnp.int32) if "packed" in what else None
    mesh = gpu_mesh(device, context=what.get("context", 1))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match=f"impl='{impl}': .*{why}"),
    ):
        jax.eval_shape(functools.partial(attention, segment_ids=ids, impl=impl), q, q, q)
