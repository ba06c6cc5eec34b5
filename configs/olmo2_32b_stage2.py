"""OLMo 2 32B, stage 2: 100B tokens of Dolmino-mix-1124, learning rate linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo2_32b_stage2.py --config.data.root=/mnt/data
Data:   dolmino100/*.npy under data.root: uint32 dolma2 tokens. Name the files in the official order
        to get the official data order. --dry_run needs no files.
Needs:  512 chips of TPU v5p (v5p-1024) are sensible; 386.8 GB of fp32 parameters and moments in
        all, and the end of olmo2_32b in checkpoint.load_path. With 8 KV heads mesh.tensor can be
        1, 2, 4 or 8. Official: sharded 64 ways.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=256 --config.compute.remat=qkv
        on v5p:8x8x8; by formula: 61 of 96 GiB, 9.60 to 10.17 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown. 11,921 steps.
Source: allenai/OLMo-core src/scripts/official/OLMo2/OLMo-2-0325-32B-anneal.py. The released model
        is the average of three runs: data seeds 1110 and 2662, and a longer one with seed 2662:
        --config.data.seed=2662 --config.train.duration=300000000000
        --config.data.paths='dolmino300/*.npy' --config.name=olmo2_32b_stage2_300b
        The original reads its first learning rate from the checkpoint; here it is the one that the
        cosine of olmo2_32b has at its last step. Unlike stage 1 rows are shuffled one by one.
        freeze_adam_step and the loss are as in olmo2_32b.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_32b_stage2"
    c.model.update(presets.MODELS["olmo2_32B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("dolmino100/*.npy",)
    c.data.seq_len = 4096
    c.data.global_batch_size = 2048 * 4096
    c.data.instance_filter = False
    c.data.seed = 1110

    c.optim.lr = 6.6232e-5
    c.optim.freeze_adam_step = True
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.ephemeral_interval = 500
    c.checkpoint.load_path = "runs/olmo2_32b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    return c
