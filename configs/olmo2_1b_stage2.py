"""OLMo 2 1B, stage 2: 50B tokens of Dolmino-mix-1124, learning rate linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo2_1b_stage2.py --config.data.root=/mnt/data
Data:   Dolmino-mix-1124-50B/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order to get the official data order. --dry_run needs no files.
Needs:  64 chips of TPU v5p (v5p-128) are sensible; fewer with more compute.accumulate.
        17.8 GB of fp32 parameters and moments in all, and the end of olmo2_1b in
        checkpoint.load_path.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x4; by formula: 39 of 96 GiB, 0.78 to 0.81 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. A user's run: 15,537 tokens/s per A100; loss unknown.
Source: allenai/OLMo configs/official-0425/OLMo2-1B-stage2-seed{42,42069,666}.yaml. The released
        model is seed 42 alone; for another: --config.data.seed=666 --config.name=stage2_666
        The original went on for 10 steps with a learning rate of 0 (to step 23,852), which change
        nothing.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_1b_stage2"
    c.model.update(presets.MODELS["olmo2_1B_v2"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("Dolmino-mix-1124-50B/*.npy",)
    c.data.global_batch_size = 512 * 4096
    c.data.seed = 42

    c.optim.lr = 7.4487e-5
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 50_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.load_path = "runs/olmo2_1b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    return c
