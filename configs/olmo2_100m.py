"""OLMo 2 100M, a rung of OLMo-core's scaling ladder: 8.1B tokens, 4 times Chinchilla's.

Run:    python -m olmo_jax.train --config=configs/olmo2_100m.py --config.data.root=/mnt/data
Data:   OLMo-mix-0925/*.npy under data.root: uint32 dolma2 tokens. --dry_run needs no files.
Needs:  8 chips of any TPU or 8 GPUs, or fewer. 1.8 GB of fp32 parameters and moments in all.
Expect: speed and loss not measured here yet, official ones unknown. The learning rate falls from
        2.397e-03 to 0 at 0.5, 1, 2 and 4 times 20 tokens per parameter; to stop at 1:
        --config.train.hard_stop=6210
Source: OLMo-core 2.6.0, model_ladder/; the recipe is presets.ladder(). The data order is that of
        OLMo-core's plain loader, not of its composable one.
        327,680 tokens per step are the rule's 314,886, rounded for 8 devices.
        OLMo-core's own ladder has Olmo 3 models in rows of 8,192.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo2_100m"
    c.model.update(presets.MODELS["olmo2_100M"])
    c.update(presets.CORE_RUN)
    c.update(presets.ladder(n_params=101_736_960, batch=327_680))

    c.data.paths = ("OLMo-mix-0925/*.npy",)
    c.data.seq_len = 4096

    c.mesh.fsdp = -1
    return c
