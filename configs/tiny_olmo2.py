"""A tiny OLMo 2 for tests: norms on the sub-layers' outputs, QK-norm, fewer KV heads than heads.

Run:    python -m olmo_jax.train --config=configs/tiny_olmo2.py --config.data.paths=FILES
Needs:  1 device, any; up to 8. Token files with ids below 512 in data.paths.
Expect: 20 steps within seconds on a CPU, checkpoints at 0, 10 and 20.
Source: the options of all OLMo 2 models at once; no official run.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "tiny_olmo2"
    c.model.update(presets.MODELS["olmo2_32B"] | presets.TINY)
    c.model.n_layers = 2
    c.model.n_kv_heads = 2
    c.update(presets.TINY_RUN)

    c.data.order = "legacy"
    c.optim.name = "adamw"
    c.train.z_loss = 1e-4
    return c
