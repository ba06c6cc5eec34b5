"""OLMo 2 13B (OLMo-2-1124-13B), stage 1: 5T tokens of OLMo-mix-1124.

Run:    python -m olmo_jax.train --config=configs/olmo2_13b.py --config.data.root=/mnt/data
Data:   OLMo-mix-1124/*.npy under data.root: uint32 dolma2 tokens. Name the files in the official
        order to get the official data order. --dry_run needs no files.
Needs:  256 chips of TPU v5p (v5p-512) are sensible. 164.6 GB of fp32 parameters and moments in
        all. Official: hybrid sharding, activations of every second block recomputed.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=128 --config.compute.remat=qkv_mlp
        on v5p:4x8x8; compiled: 92 of 96 GiB, 7.77 to 8.33 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown. Learning rate at the end
        9.0e-5, where stage 2 begins.
Source: allenai/OLMo scripts/augusta/peteish13.sh, which overrides two numbers of
        configs/official-1124/OLMo2-13B-stage1.yaml: the peak is 9e-4, not 3e-4, and the run has
        5e12 tokens; arXiv 2501.00656. z-loss is the 1e-4 that the trainer used, not the 1e-5 of the
        file. The original ran 10 steps past 5e12 tokens, to step 596,057; for the same end:
        --config.train.duration=596057 --config.train.duration_unit=steps
        The data ends after 464,323 steps; the second pass is epoch 1 of the legacy order.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_13b"
    c.model.update(presets.MODELS["olmo2_13B"])
    c.update(presets.OLMO2_RUN)

    c.data.paths = ("OLMo-mix-1124/*.npy",)
    c.data.global_batch_size = 2048 * 4096

    c.optim.lr = 9e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "tokens"
    c.optim.schedule.warmup = 8_388_608_000
    c.optim.schedule.warmup_min_lr = 0.0
    c.optim.schedule.t_max = 5_000_000_000_000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 5_000_000_000_000
    c.train.duration_unit = "tokens"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
