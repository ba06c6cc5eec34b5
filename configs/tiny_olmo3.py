"""A tiny Olmo 3 for tests: three sliding layers and a full one, with YaRN on that.

Run:    python -m olmo_jax.train --config=configs/tiny_olmo3.py --config.data.paths=FILES
Needs:  1 device, any; up to 8. Token files with ids below 512 in data.paths.
Expect: 20 steps within seconds on a CPU, checkpoints at 0, 10 and 20.
Source: the options of Olmo 3 with its long-context stage at once; no official run.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "tiny_olmo3"
    c.model.update(presets.MODELS["olmo3_32B_long"] | presets.TINY)
    c.model.n_layers = 4
    c.model.n_kv_heads = 2
    c.model.window = 16
    c.model.yarn_original_len = 8
    c.update(presets.TINY_RUN)

    c.train.z_loss = 1e-5
    return c
