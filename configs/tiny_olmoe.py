"""A tiny OLMoE for tests: eight experts, of which a token takes two; norms before the sub-layers.

Run:    python -m olmo_jax.train --config=configs/tiny_olmoe.py --config.data.paths=FILES
Needs:  1 device, any; up to 8. Token files with ids below 512 in data.paths.
Expect: 20 steps within seconds on a CPU, checkpoints at 0, 10 and 20.
Source: the options of OLMoE at once; no official run.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "tiny_olmoe"
    c.model.update(presets.MODELS["olmoe_1B_7B"] | presets.TINY)
    c.model.n_layers = 2
    c.model.n_experts = 8
    c.model.n_experts_per_token = 2
    c.model.d_ff = 32
    c.update(presets.TINY_RUN)

    c.data.order = "legacy"
    c.optim.name = "adamw"
    c.train.load_balancing_loss = 0.01
    c.train.router_z_loss = 0.001
    return c
