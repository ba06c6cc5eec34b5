"""The TPU kernels through the real TPU compiler, which needs no TPU; and their schedule."""

import functools
import math
import re

import compile_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from olmo_jax.config.model import MeshConfig
from olmo_jax.kernels import reference, schedule
from olmo_jax.kernels.attention import attention
from olmo_jax.kernels.schedule import Blocks
from olmo_jax.parallel.sharding import make_mesh, spec

NAMES = {"bf16": jnp.bfloat16, "f32": jnp.float32, "s32": jnp.int32}
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.lru_cache
def chips(name):
    """Four chips that are not here."""
    return compile_step.devices(CHIPS[name])


def compiled(
    mesh, shape, kv_heads, window=None, has_documents=False, policy=None, dtype=jnp.bfloat16
):
    """Forward and backward of `attention` on the mesh; `shape`: batch, seq, heads, head_dim."""
    axes = ("batch", "seq", "heads", None)

    def array(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes)))

    q = array(shape, dtype, axes)
    k = array((*shape[:2], kv_heads, shape[3]), dtype, axes)
    ids = array(shape[:2], jnp.int32, ("batch", "seq")) if has_documents else None

    def both(q, k, v, ids, d_out):
        run = functools.partial(attention, window=window, segment_ids=ids)
        if policy is not None:
            run = jax.checkpoint(run, policy=policy)
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        return jax.jit(both).lower(q, k, k, ids, q).compile()


def calls(program):
    """How many forward and backward kernels the program has."""
    lines = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line]
    return tuple(sum(f"%attention_{way}" in x for x in lines) for way in ("forward", "backward"))


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "seq", "window", "has_documents"),
    [
        ("v5e", 65536, 4096, True),
        ("v5p", 8192, 4096, True),
        ("v6e", 8192, 4096, True),
        # Each chip has one of the shapes above; half a minute of a core for all lengths and kinds.
        pytest.param("v5e", 8192, None, False, marks=pytest.mark.by_hand),
        pytest.param("v5p", 65536, None, False, marks=pytest.mark.by_hand),
        pytest.param("v6e", 65536, 4096, True, marks=pytest.mark.by_hand),
    ],
)
def test_the_tpu_compiler_takes_the_shapes_of_olmo_3_7b(chip, seq, window, has_documents):
    mesh = make_mesh(MeshConfig(), chips(chip)[:1])
    program = compiled(mesh, (1, seq, 32, 128), 32, window, has_documents)
    assert calls(program) == (1, 1)
    array = seq * 32 * 128 * 2
    # The turned arrays, and dq in fp32 where it does not fit into VMEM; no scores.
    assert program.memory_analysis().temp_size_in_bytes < 12 * array


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype", "seq"),
    [
        (96, jnp.bfloat16, 2048),
        (256, jnp.bfloat16, 2048),
        (64, jnp.float32, 1024),
        # Widths between, and the most of VMEM: a minute of a core.
        *[
            pytest.param(dim, dtype, seq, marks=pytest.mark.by_hand)
            for dim, dtype, seq in (
                (64, jnp.bfloat16, 2048),
                (192, jnp.bfloat16, 2048),
                (256, jnp.float32, 1024),
                (256, jnp.float32, 2048),
            )
        ],
    ],
)
def test_the_tpu_compiler_takes_grouped_heads_of_any_width(dim, dtype, seq):
    mesh = make_mesh(MeshConfig(), chips("v5e")[:1])
    assert calls(compiled(mesh, (1, seq, 40, dim), 8, dtype=dtype)) == (1, 1)


@pytest.mark.slow
@pytest.mark.tpu
def test_each_chip_of_a_mesh_has_its_rows_and_heads_and_nothing_is_moved():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), chips("v5e"))
    text = compiled(mesh, (4, 1024, 8, 128), 4, has_documents=True).as_text()
    assert "bf16[2,1024,4,128]" in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute("))


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(("kept", "forwards"), [("attention_out", 1), ("nothing", 2)])
def test_a_kept_output_needs_no_second_forward_kernel(kept, forwards):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), chips("v5e"))
    policy = jax.checkpoint_policies.save_only_these_names(kept)
    assert calls(compiled(mesh, (4, 1024, 8, 128), 4, policy=policy)) == (forwards, 1)


def sent_in_a_ring(window):
    """Bytes that a chip of four sends for 65,536 positions; nobody gathers whole sequences."""
    mesh = make_mesh(MeshConfig(fsdp=1, context=4), chips("v5p"))
    program = compiled(mesh, (1, 65536, 8, 128), 8, window, has_documents=True)
    found = compile_step.collectives(program.as_text())
    assert {operation for operation, _, _ in found} == {"collective-permute"}
    # Arrays as long as a device's part of the sequence; not the scores of even one head.
    assert program.memory_analysis().temp_size_in_bytes < 65536 // 4 * 65536 * 4
    arrays = [re.match(r"\(?(\w+)\[([\d,]+)\]", shape).groups() for _, shape, _ in found]
    return sum(
        math.prod(map(int, shape.split(","))) * jnp.dtype(NAMES[dtype]).itemsize
        for dtype, shape in arrays
    )


# Each chunk of 8,192 gets the 4,096 keys and values before it; their gradients come back.
HALO = 2 * 2 * (4096 * 8 * 128 * 2)


@pytest.mark.tpu
@pytest.mark.slow
def test_in_a_ring_a_window_sends_little_and_nobody_gathers_whole_sequences():
    assert sent_in_a_ring(4096) <= 1.01 * 2 * HALO


@pytest.mark.tpu
@pytest.mark.by_hand  # half a minute of a core
def test_in_a_ring_without_a_window_nobody_gathers_whole_sequences_either():
    # The two chunks go around whole, and their gradients in fp32; the loop counts once.
    assert sent_in_a_ring(None) >= 8 * 2 * HALO / 1.01


@pytest.mark.parametrize("window", [None, 1, 100, 256, 300, 512, 5000])
@pytest.mark.parametrize("blocks", [(256, 256), (128, 256), (256, 128)])
def test_pairs_and_tiles_cover_what_is_visible_and_little_else(blocks, window):
    blocks, seq = Blocks(*blocks, 256, 128), 1024
    plan = schedule.make(seq, seq, blocks, by="q", window=window)
    borders = [None, *schedule.borders(blocks, window)]
    covered, clear = (np.zeros((seq, seq), bool) for _ in range(2))
    for pair in plan.pairs[0]:
        at = schedule.q_block(pair) * blocks.q, schedule.kv_block(pair) * blocks.kv
        distance = borders[schedule.kind(pair) - schedule.FULL]
        for tile in schedule.tiles(blocks, window, distance):
            keys = slice(*(at[1] + x for x in tile.keys))
            rows = slice(*(at[0] + x for x in tile.queries))
            assert not covered[rows, keys].any()
            covered[rows, keys] = True
            clear[slice(*(at[0] + x for x in tile.clear)), keys] = True
    visible = np.asarray(reference.visible(seq, window, None)[0])
    assert covered[visible].all()
    assert not clear[~visible].any()
    # Tiles of 128 along the diagonal and along the edge of the window.
    assert covered.sum() <= visible.sum() + 2 * seq * 128


def test_flags_open_and_close_rows_and_blocks():
    plan = schedule.make(1024, 1024, Blocks(256, 256, 128, 128), by="kv", window=300)
    assert plan.count == plan.pairs.shape[1] == 4 + 3 + 2
    for block, first, last in (
        (schedule.kv_block, schedule.FIRST, schedule.LAST),
        (schedule.q_block, schedule.OPENS, schedule.CLOSES),
    ):
        for i in range(4):
            met = [pair for pair in plan.pairs[0] if block(pair) == i]
            assert [bool(pair & first) for pair in met] == [True] + [False] * (len(met) - 1)
            assert [bool(pair & last) for pair in met] == [False] * (len(met) - 1) + [True]


def test_documents_take_out_the_pairs_that_they_hide():
    blocks = Blocks(128, 128, 128, 128)
    long, short = np.zeros(1024, np.int32), np.arange(1024, dtype=np.int32) // 128
    ids = jnp.asarray(np.stack([short, short]))
    plan = schedule.make(1024, 1024, blocks, by="q", window=None, q_ids=ids, kv_ids=ids)
    assert int(plan.count) == 8
    ids = jnp.asarray(np.stack([short, long]))  # rows of a batch may differ
    plan = schedule.make(1024, 1024, blocks, by="q", window=None, q_ids=ids, kv_ids=ids)
    kinds = np.asarray(schedule.kind(plan.pairs))
    assert int(plan.count) == 36
    assert (kinds[0, :8] == schedule.FULL + 2).all()  # each on the diagonal
    assert (kinds[0, 8:] == schedule.SKIP).all()
    assert (kinds[1] == schedule.FULL).sum() == 28  # within one document no ids are compared


@pytest.mark.parametrize("seq", [1, 127, 129, 1000, 1025, 2049, 8192, 65535])
@pytest.mark.parametrize(("q", "kv"), [(1024, 1024), (512, 1024), (2048, 1024)])
def test_each_block_of_any_length_is_padded_by_less_than_a_unit(seq, q, kv):
    blocks = Blocks(q, kv, 512, 256).fit(seq, seq)
    large, small = max(blocks.q, blocks.kv), min(blocks.q, blocks.kv)
    assert large <= max(q, kv)
    assert large % small == small % 128 == 0
    assert -seq % large < 128 * (large // small) * -(-seq // large)
