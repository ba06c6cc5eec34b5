"""Olmo 3 7B (Olmo-3-1025-7B), pretraining, part 1 of 2: half of a cosine planned for 5T tokens.

Run:    python -m olmo_jax.train --config=configs/olmo3_7b.py --config.data.root=/mnt/data
Data:   OLMo-mix-0625-official/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all.
        Official: 512 H100, sharded 8 ways.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; compiled: 64 of 96 GiB, 4.06 to 4.41 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: 7,700 tokens/s per H100 (43 % MFU); loss unknown.
        Learning rate at the end 1.65e-4, half way down.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py. Part 2 starts
        from step 596,047, which is saved for it. Every row counts the same, so the mean of the
        ranks' means is the global mean for any number of ranks. Probably the original's sliding
        layers saw 4,097 positions at first, by an error of its attention; here 4,096 always.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_7b"
    c.model.update(presets.MODELS["olmo3_7B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-mix-0625-official/*.npy",)
    c.data.seq_len = 8192
    c.data.global_batch_size = 512 * 8192
    c.data.instance_filter = False

    c.optim.lr = 3e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 2000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 5_000_000_000_000
    c.train.duration_unit = "tokens"
    c.train.hard_stop = 597_046
    c.train.hard_stop_unit = "steps"

    c.checkpoint.fixed_steps = (596_047,)
    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
