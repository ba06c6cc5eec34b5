"""Runs of earlier versions go on: their checkpoints load, and the next losses are the old ones.

`old_runs.tar.gz` was written by version 0.1.0 as of 1 November 2026: a token file and, of two runs
on it, the checkpoint after step 30, in mid-epoch. One is dense (an Olmo 3 with skip_step_adamw and
its history), one has experts with balancing biases. The losses are those with which that version
went on, on eight virtual CPU devices with the settings of `conftest.py`.
"""

import hashlib
import pathlib
import re
import tarfile

import jax
import numpy as np
import pytest
import runs

from olmo_jax.records import jsonl

ARCHIVE = pathlib.Path(__file__).with_name("old_runs.tar.gz")
COMMON = (
    "data.seq_len=32 data.global_batch_size=256 data.dtype=uint16 data.eos_id=0 model.vocab_size=61"
    " model.d_model=16 model.n_heads=2 model.head_dim=8 train.duration=200 train.hard_stop=40"
    " optim.lr=1e-2 optim.schedule.warmup=4 checkpoint.step0=false checkpoint.interval=1000"
    " log.tensorboard=false"
)
DENSE = (
    "--config=configs/tiny_olmo3.py model.n_kv_heads=1 model.d_ff=24 optim.name=skip_step_adamw"
    " optim.skip_window=16 train.z_loss=1e-4 data.document_mask=eos"
)
EXPERTS = (
    "--config=configs/tiny_olmoe.py model.n_kv_heads=2 model.d_ff=8 model.router_bias_gamma=0.001"
    " optim.name=adamw"
)
CPU = "25fc08b1fed3d885"  # of the machine that wrote them: a digest of its flags
# Cross entropies of steps 31 to 40, float32.
DENSE_LOSSES = """
0x1.edbb3ap+1 0x1.efc5a4p+1 0x1.eb16c4p+1 0x1.e705c8p+1 0x1.e993d8p+1
0x1.eb3a46p+1 0x1.eebcd0p+1 0x1.e89868p+1 0x1.e762cap+1 0x1.ec2a7ap+1
"""
EXPERTS_LOSSES = """
0x1.51b6b6p+1 0x1.54eea8p+1 0x1.423360p+1 0x1.39b086p+1 0x1.41f668p+1
0x1.40a2b0p+1 0x1.430528p+1 0x1.348a98p+1 0x1.3397fap+1 0x1.3e5ca2p+1
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "losses"),
    [("dense", DENSE, DENSE_LOSSES), ("experts", EXPERTS, EXPERTS_LOSSES)],
    ids=["dense", "experts"],
)
def test_a_run_of_version_0_1_goes_on_with_the_same_losses(
    name, options, losses, compiled, tmp_path
):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    (folder / "checkpoints").mkdir(parents=True)
    (tmp_path / f"{name}_step30").rename(folder / "checkpoints/step30")
    place = (f"data.paths={tmp_path / 'tokens.npy'}", f"dir={folder}",
             f"compute.compilation_cache={compiled}")  # fmt: skip
    result = runs.run(*(options + " " + COMMON).split(), *place)
    assert result.code == 0, result.err
    assert "resuming after step 30" in result.out
    steps = jsonl.read(folder)
    found = np.float32([steps[at]["train/CE loss"] for at in range(31, 41)])
    old = np.float32([float.fromhex(word) for word in losses.split()])
    if _computes_as_then():
        np.testing.assert_array_equal(found, old)
    else:
        np.testing.assert_allclose(found, old, rtol=1e-5)


def _computes_as_then() -> bool:
    """Whether sums come in the same order: XLA's version and the kind of the CPU decide that."""
    cpu = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", cpu.read_text() if cpu.exists() else "", re.M)
    flags = " ".join(sorted(found[1].split())) if found else ""
    return jax.__version__ == "0.10.2" and hashlib.sha256(flags.encode()).hexdigest()[:16] == CPU
