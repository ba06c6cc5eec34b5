"""Olmo 3 7B, mid-training: 100B tokens, learning rate from 2.07e-4 linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo3_7b_midtrain.py \
          --config.data.root=/mnt/data
Data:   OLMo-midtraining-mix-0625-100B/*.npy under data.root: uint32 dolma2 tokens. Name the files
        in the official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all,
        and the end of olmo3_7b_part2 in checkpoint.load_path. Official: 128 H100.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; by formula: 63 of 96 GiB, 2.02 to 2.18 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown. 47,684 steps.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-midtrain.py. The learning rate
        jumps up from pretraining's last one, without warm-up, as there. No differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_7b_midtrain"
    c.model.update(presets.MODELS["olmo3_7B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-midtraining-mix-0625-100B/*.npy",)
    c.data.seq_len = 8192
    c.data.global_batch_size = 256 * 8192
    c.data.instance_filter = False
    c.data.seed = 1337

    c.optim.lr = 2.0712352850360292e-4
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.load_path = "runs/olmo3_7b_part2"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    return c
