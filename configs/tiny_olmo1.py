"""A tiny OLMo 1 for tests: no norm weights, tied embeddings, clipped q, k and v, mitchell init.

Run:    python -m olmo_jax.train --config=configs/tiny_olmo1.py --config.data.paths=FILES
Needs:  1 device, any; up to 8. Token files with ids below 512 in data.paths.
Expect: 20 steps within seconds on a CPU, checkpoints at 0, 10 and 20.
Source: the options of all OLMo 1 models at once; no official run.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "tiny_olmo1"
    c.model.update(presets.MODELS["olmo1_1B"] | presets.TINY)
    c.model.n_layers = 2
    c.model.clip_qkv = 8.0
    c.update(presets.TINY_RUN)

    c.data.order = "legacy"
    c.optim.name = "adamw"
    c.optim.eps = 1e-5
    return c
