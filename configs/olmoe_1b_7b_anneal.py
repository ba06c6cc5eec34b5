"""OLMoE-1B-7B (0924), the last stage: 100B tokens, learning rate linearly to 0.

Run:    python -m olmo_jax.train --config=configs/olmoe_1b_7b_anneal.py --config.data.root=/mnt/data
Data:   OLMoE-anneal/*.npy under data.root: uint16 tokens of gpt-neox-olmo-dolma-v1_5. Name the
        files in the official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 83.0 GB of fp32 parameters and moments in all,
        and the end of olmoe_1b_7b in checkpoint.load_path.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=64 --config.compute.remat=none
        on v5p:4x4x8; compiled: 63 of 96 GiB, 1.33 to 1.58 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: arXiv 2409.02060: 4e-5 to 0 over 100B tokens, 23,842 steps, seed 42.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmoe_1b_7b_anneal"
    c.model.update(presets.MODELS["olmoe_1B_7B"])
    c.update(presets.OLMOE_RUN)

    c.data.paths = ("OLMoE-anneal/*.npy",)
    c.data.global_batch_size = 1024 * 4096
    c.data.seed = 42

    c.optim.lr = 4e-5
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 0
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"

    c.checkpoint.load_path = "runs/olmoe_1b_7b"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
