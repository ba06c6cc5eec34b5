"""OLMo 2 13B, stage 2: 100B tokens of Dolmino-mix-1124, learning rate linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmo2_13b_stage2.py --config.data.root=/mnt/data
Data:   Dolmino-mix-1124-100B/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order to get the official data order. --dry_run needs no files.
Needs:  256 chips of TPU v5p (v5p-512) are sensible. 164.6 GB of fp32 parameters and moments in
        all, and the end of olmo2_13b in checkpoint.load_path.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=128 --config.compute.remat=qkv_mlp
        on v5p:4x8x8; compiled: 92 of 96 GiB, 7.77 to 8.33 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: allenai/OLMo configs/official-1124/OLMo2-13B-stage2-seed{1110,2662,6209}-100B.yaml and
        -seed2662-300B.yaml. The released model is the average of four runs: data seeds 1110, 2662
        and 6209, and a longer one with seed 2662:
        --config.data.seed=2662 --config.train.duration=300000000000
        --config.data.paths='Dolmino-mix-1124-300B/*.npy' --config.name=olmo2_13b_stage2_300b
        The originals went on for 10 steps with a learning rate of 0 (to steps 11,931 and 35,773),
        which change nothing.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_13b_stage2"
    c.model.update(presets.MODELS["olmo2_13B"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("Dolmino-mix-1124-100B/*.npy",)
    c.data.global_batch_size = 2048 * 4096
    c.data.seed = 1110

    c.optim.lr = 9e-5
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.load_path = "runs/olmo2_13b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
