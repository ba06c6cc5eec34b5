"""What the TPU compiler makes of the training step: which collectives it holds, and which not."""

import math

import pytest

from olmo_jax import config
from olmo_jax.config import parameters
from olmo_jax.parallel import sharding
from olmo_jax.pods import chips, compiled, hlo

pytestmark = [pytest.mark.tpu, pytest.mark.slow]
DATA, FSDP, SEQ = 2, 8, 512
MODEL = dict(
    n_layers=2, d_model=512, n_heads=4, n_kv_heads=4, d_ff=1408, vocab_size=4096,
    padded_vocab_size=4096, max_seq_len=SEQ, layer_types=["full"],
)  # fmt: skip


@pytest.fixture(scope="module")
def step(libtpu):
    """(config, text of the program) of a small Olmo 3 on 16 chips, 4 rows each."""
    options = {f"model.{name}": str(value) for name, value in MODEL.items()}
    options |= {
        "data.seq_len": str(SEQ), "data.global_batch_size": str(64 * SEQ),
        "mesh.data": str(DATA), "mesh.fsdp": str(FSDP),
        "compute.remat": "qkv", "compute.accumulate": "1", "compute.grad_dtype": "bfloat16",
    }  # fmt: skip
    c = config.load("configs/olmo3_7b.py", options)
    mesh = sharding.make_mesh(c.mesh, chips.Slice.parse("v5p:2x2x4").devices())
    return c, compiled.compile_step(c, mesh).as_text()


def bytes_over(text, size, *kinds):
    """Of the collectives of these kinds among so many devices, in a step."""
    found = hlo.totals(text).collectives.items()
    return sum(c.n_bytes * n for c, n in found if c.kind in kinds and len(c.devices) == size)


def of_matrices(c, layers, rest):
    """Bytes in bf16 of all matrices, those of layers and the two tables so often."""
    sizes = {path: math.prod(row.shape) for path, row in parameters.table(c.model).items()}
    return 2 * sum(
        n * (layers if path.startswith("layers") else rest)
        for path, n in sizes.items()
        if "norm" not in path
    )


def test_weights_are_gathered_once_in_each_direction_and_nothing_else_is(step):
    c, text = step
    want = of_matrices(c, layers=2, rest=1)
    assert bytes_over(text, FSDP, "all-gather") == pytest.approx(want, rel=0.01)
    assert bytes_over(text, DATA, "all-gather") == bytes_over(text, 16, "all-gather") == 0


def test_gradients_are_reduced_once_and_activations_never(step):
    c, text = step
    want = of_matrices(c, layers=1, rest=1)
    over_fsdp = bytes_over(text, FSDP, "all-reduce", "reduce-scatter")
    assert over_fsdp == pytest.approx(want, rel=0.02)  # some are padded
    over_data = bytes_over(text, DATA, "all-reduce", "reduce-scatter")
    assert over_data == pytest.approx(want / FSDP, rel=0.02)  # of the part that is kept
    rest = bytes_over(text, DATA * FSDP, "all-reduce")  # gains of norms, scalars
    assert rest < 100 * 4 * c.model.d_model
    assert "all-to-all" not in text


def test_gradients_are_scattered(step):
    """By name, on a SparseCore, or in a fusion of a reduction and a slice."""
    c, text = step
    assert bytes_over(text, FSDP, "reduce-scatter") > 0.5 * of_matrices(c, layers=1, rest=1)
