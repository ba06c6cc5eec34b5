"""OLMo 2 1B (OLMo-2-0425-1B), stage 1: 4T tokens of OLMo-mix-1124.

Run:    python -m olmo_jax.train --config=configs/olmo2_1b.py --config.data.root=/mnt/data
Data:   OLMo-mix-1124/*.npy under data.root: uint32 dolma2 tokens. Name the files in the official
        order to get the official data order. --dry_run needs no files.
Needs:  64 chips of TPU v5p (v5p-128) are sensible; fewer with more compute.accumulate.
        17.8 GB of fp32 parameters and moments in all. Official hardware unknown.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x4; by formula: 39 of 96 GiB, 0.78 to 0.81 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: about 46,000 tokens/s per H100 (40 % MFU) with
        OLMo-core's 1B script; loss unknown. Learning rate at the end 7.449e-5.
Source: allenai/OLMo configs/official-0425/OLMo2-1B-stage1.yaml; arXiv 2501.00656. z-loss is the
        1e-4 that the trainer used, not the 1e-5 that the file says. The original ran 10 steps past
        4e12 tokens, to step 1,907,359; for the same end:
        --config.train.duration=1907359 --config.train.duration_unit=steps
        The data ends before the run does; the second pass is epoch 1 of the legacy order.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_1b"
    c.model.update(presets.MODELS["olmo2_1B_v2"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("OLMo-mix-1124/*.npy",)
    c.data.global_batch_size = 512 * 4096

    c.optim.lr = 4e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "tokens"
    c.optim.schedule.warmup = 8_388_608_000
    c.optim.schedule.warmup_min_lr = 0.0
    c.optim.schedule.t_max = 5_000_000_000_000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 4_000_000_000_000
    c.train.duration_unit = "tokens"

    c.mesh.fsdp = -1
    return c
