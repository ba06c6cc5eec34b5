"""OLMo 2 7B, stage 2: 50B tokens of Dolmino-mix-1124, learning rate linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo2_7b_stage2.py --config.data.root=/mnt/data
Data:   Dolmino-mix-1124-50B/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all,
        and the end of olmo2_7b in checkpoint.load_path.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; by formula: 63 of 96 GiB, 3.85 to 4.17 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: allenai/OLMo configs/official-1124/OLMo2-7B-stage2-seed{42,42069,666}.yaml. The released
        model is the average of three runs, with data seeds 42, 42069 and 666:
        --config.data.seed=666 --config.name=olmo2_7b_stage2_666
        The learning rate starts at the file's 6.1499e-5, which stage 1 had some 650 steps before
        its end. The original went on for 10 steps with a learning rate of 0 (to step 11,931),
        which change nothing.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_7b_stage2"
    c.model.update(presets.MODELS["olmo2_7B"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("Dolmino-mix-1124-50B/*.npy",)
    c.data.global_batch_size = 1024 * 4096
    c.data.seed = 42

    c.optim.lr = 6.1499e-5
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 50_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.load_path = "runs/olmo2_7b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
