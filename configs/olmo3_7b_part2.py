"""Olmo 3 7B, pretraining, part 2 of 2: the schedule stretched to 7T, until the data ends at 5.93T.

Run:    python -m olmo_jax.train --config=configs/olmo3_7b_part2.py --config.data.root=/mnt/data
Data:   as in olmo3_7b: the same files in the same order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all,
        and step 596,047 of olmo3_7b in checkpoint.load_path. Official: 512 H100, sharded 8 ways.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; compiled: 64 of 96 GiB, 4.06 to 4.41 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: 7,700 tokens/s per H100 (43 % MFU); loss unknown.
        On the official files the epoch ends at step 1,413,814 and the learning rate at 3.93e-5.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-2.py. The report says
        that the learning rate ended at 3e-5, which is a schedule that ends with the epoch:
        --config.optim.schedule.t_max=1413814
        Which of the two was run is not settled. No other differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_7b_part2"
    c.model.update(presets.MODELS["olmo3_7B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-mix-0625-official/*.npy",)
    c.data.seq_len = 8192
    c.data.global_batch_size = 512 * 8192
    c.data.instance_filter = False

    # The second half of a cosine from where the first was left; its "warm-up" is already over.
    c.optim.lr = 3e-4
    c.optim.schedule.name = "half_cos_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 597_046
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 7_000_000_000_000
    c.train.duration_unit = "tokens"
    c.train.hard_stop = 1
    c.train.hard_stop_unit = "epochs"

    c.checkpoint.load_path = "runs/olmo3_7b/checkpoints/step596047"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = True
    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
