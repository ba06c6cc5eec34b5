"""Olmo 3 32B, mid-training: 100B tokens, learning rate from 2.07e-4 linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo3_32b_midtrain.py \
          --config.data.root=/mnt/data
Data:   OLMo-midtraining-mix-0925-ingredient1-100B/*.npy under data.root: uint32 dolma2 tokens. Name
        the files in the official order to get the official data order. --dry_run needs no files.
Needs:  256 chips of TPU v5p (v5p-512) are sensible; 386.8 GB of fp32 parameters and moments in
        all, and the end of olmo3_32b in checkpoint.load_path. With 8 KV heads mesh.tensor can be
        1, 2, 4 or 8. Official: 512 H100, sharded 64 ways.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=128 --config.compute.remat=qkv
        on v5p:4x8x8; by formula: 63 of 96 GiB, 9.84 to 10.41 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown. 23,842 steps.
Source: allenai/OLMo-core
        src/scripts/official/OLMo3/OLMo-3-1025-32B-midtrain-ingredient-{1,2}.py. The result is the
        average of two runs, both with seed 42069, on two mixes; for the second:
        --config.data.paths='OLMo-midtraining-mix-0925-ingredient2-100B/*.npy'
        --config.name=olmo3_32b_midtrain2
        loss_ranks is the original's 512, one row each. No differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_32b_midtrain"
    c.model.update(presets.MODELS["olmo3_32B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-midtraining-mix-0925-ingredient1-100B/*.npy",)
    c.data.seq_len = 8192
    c.data.global_batch_size = 512 * 8192
    c.data.instance_filter = True
    c.data.seed = 42_069

    c.optim.lr = 2.071235285e-4
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"
    c.train.loss_ranks = 512

    c.checkpoint.load_path = "runs/olmo3_32b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    return c
