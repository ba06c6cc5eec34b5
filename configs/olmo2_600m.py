"""OLMo 2 600M, a rung of OLMo-core's scaling ladder: 47.8B tokens, 4 times Chinchilla's.

Run:    python -m olmo_jax.train --config=configs/olmo2_600m.py --config.data.root=/mnt/data
Data:   OLMo-mix-0925/*.npy under data.root: uint32 dolma2 tokens. --dry_run needs no files.
Needs:  8 chips of any TPU or 8 GPUs, or fewer. 8.8 GB of fp32 parameters and moments in all.
Expect: speed and loss not measured here yet, official ones unknown. The learning rate falls from
        1.329e-03 to 0 at 0.5, 1, 2 and 4 times 20 tokens per parameter; to stop at 1:
        --config.train.hard_stop=12154
Source: OLMo-core 2.6.0, model_ladder/; the recipe is presets.ladder(). The data order is that of
        OLMo-core's plain loader, not of its composable one.
        983,040 tokens per step are what OLMo-core makes of an aim of 1,024,871 on 8 H100.
        OLMo-core's own ladder has Olmo 3 models in rows of 8,192.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_600m"
    c.model.update(presets.MODELS["olmo2_600M"])
    c.update(presets.CORE_RUN)
    c.update(presets.ladder(n_params=597_382_464, batch=983_040))

    c.data.paths = ("OLMo-mix-0925/*.npy",)
    c.data.seq_len = 4096

    c.mesh.fsdp = -1
    c.compute.accumulate = 5
    return c
