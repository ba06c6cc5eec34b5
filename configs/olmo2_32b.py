"""OLMo 2 32B (OLMo-2-0325-32B), stage 1: 6.06T tokens, of a cosine planned for 6.5T.

Run:    python -m olmo_jax.train --config=configs/olmo2_32b.py --config.data.root=/mnt/data
Data:   OLMoE-mix-0824/*.npy under data.root: uint32 dolma2 tokens. Name the files in the official
        order to get the official data order. --dry_run needs no files.
Needs:  512 chips of TPU v5p (v5p-1024) are sensible; 386.8 GB of fp32 parameters and moments in
        all. With 8 KV heads mesh.tensor can be 1, 2, 4 or 8. Official: 160 nodes of 8 H100,
        sharded 64 ways.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=256 --config.compute.remat=qkv
        on v5p:8x8x8; by formula: 61 of 96 GiB, 9.60 to 10.17 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: over 1,800 tokens/s per H100 (38 % MFU); loss
        unknown. Learning rate at the end 6.623e-5.
Source: allenai/OLMo-core src/scripts/official/OLMo2/OLMo-2-0325-32B-train.py. It ran with a defect
        of its optimizer (the step count never advanced, so updates were 2.236 times larger and
        never de-biased): freeze_adam_step. Rows are shuffled in pairs (max_target_seq_len); there
        is no repetition filter. Every row counts the same, so the mean of the ranks' means is the
        global mean for any number of ranks. No differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_32b"
    c.model.update(presets.MODELS["olmo2_32B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMoE-mix-0824/*.npy",)
    c.data.seq_len = 4096
    c.data.max_target_seq_len = 8192
    c.data.global_batch_size = 2048 * 4096
    c.data.instance_filter = False

    c.optim.lr = 6e-4
    c.optim.freeze_adam_step = True
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 2000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 6_500_000_000_000
    c.train.duration_unit = "tokens"
    c.train.hard_stop = 721_901
    c.train.hard_stop_unit = "steps"

    c.checkpoint.ephemeral_interval = 200
    c.mesh.fsdp = -1
    return c
