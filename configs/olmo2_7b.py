"""OLMo 2 7B (OLMo-2-1124-7B), stage 1: one pass over OLMo-mix-1124, 3.9T tokens.

Run:    python -m olmo_jax.train --config=configs/olmo2_7b.py --config.data.root=/mnt/data
Data:   OLMo-mix-1124/*.npy under data.root: uint32 dolma2 tokens. Name the files in the official
        order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all.
        Official hardware unknown; FSDP.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; by formula: 63 of 96 GiB, 3.85 to 4.17 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown. On the official files the
        epoch has 928,646 steps and the learning rate ends at 6.135e-5.
Source: allenai/OLMo configs/official-1124/OLMo2-7B-stage1.yaml; arXiv 2501.00656. z-loss is the
        1e-4 that the trainer used, not the 1e-5 that the file says. No other differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_7b"
    c.model.update(presets.MODELS["olmo2_7B"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("OLMo-mix-1124/*.npy",)
    c.data.global_batch_size = 1024 * 4096

    c.optim.lr = 3e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "tokens"
    c.optim.schedule.warmup = 8_388_608_000
    c.optim.schedule.warmup_min_lr = 0.0
    c.optim.schedule.t_max = 5_000_000_000_000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 1
    c.train.duration_unit = "epochs"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
