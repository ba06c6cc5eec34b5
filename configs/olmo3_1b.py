"""Olmo 3 1B, a rung of OLMo-core's scaling ladder: 102.4B tokens, 4 times Chinchilla's.

Run:    python -m olmo_jax.train --config=configs/olmo3_1b.py --config.data.root=/mnt/data
Data:   OLMo-mix-0925/*.npy under data.root: uint32 dolma2 tokens. --dry_run needs no files.
Needs:  8 chips of any TPU or 8 GPUs, or fewer. 17.8 GB of fp32 parameters and moments in all.
Expect: speed and loss not measured here yet, official ones unknown. The learning rate falls from
        1.031e-03 to 0 at 0.5, 1, 2 and 4 times 20 tokens per parameter; to stop at 1:
        --config.train.hard_stop=16268
Source: OLMo-core 2.6.0, model_ladder/; the recipe is presets.ladder(). The data order is that of
        OLMo-core's plain loader, not of its composable one.
        1,572,864 tokens per step are what OLMo-core makes of an aim of 1,702,828 on 8 H100.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_1b"
    c.model.update(presets.MODELS["olmo3_1B"])
    c.update(presets.CORE_RUN)
    c.update(presets.ladder(n_params=1_279_395_840, batch=1_572_864))

    c.data.paths = ("OLMo-mix-0925/*.npy",)
    c.data.seq_len = 8192

    c.mesh.fsdp = -1
    c.compute.accumulate = 6
    return c
