"""Olmo 3 760M, a rung of OLMo-core's scaling ladder: 60.7B tokens, 4 times Chinchilla's.

Run:    python -m olmo_jax.train --config=configs/olmo3_760m.py --config.data.root=/mnt/data
Data:   OLMo-mix-0925/*.npy under data.root: uint32 dolma2 tokens. --dry_run needs no files.
Needs:  8 chips of any TPU or 8 GPUs, or fewer. 10.9 GB of fp32 parameters and moments in all.
Expect: speed and loss not measured here yet, official ones unknown. The learning rate falls from
        1.227e-03 to 0 at 0.5, 1, 2 and 4 times 20 tokens per parameter; to stop at 1:
        --config.train.hard_stop=11570
Source: OLMo-core 2.6.0, model_ladder/; the recipe is presets.ladder(). The data order is that of
        OLMo-core's plain loader, not of its composable one.
        1,310,720 tokens per step are what OLMo-core makes of an aim of 1,201,428 on 8 H100.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_760m"
    c.model.update(presets.MODELS["olmo3_760M"])
    c.update(presets.CORE_RUN)
    c.update(presets.ladder(n_params=758_220_288, batch=1_310_720))

    c.data.paths = ("OLMo-mix-0925/*.npy",)
    c.data.seq_len = 8192

    c.mesh.fsdp = -1
    c.compute.accumulate = 5
    return c
