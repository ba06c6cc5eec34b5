"""A small OLMoE on the source text of Python's own standard library: 8 experts, two for a token.

Run:    python -m olmo_jax.train --config=configs/quickstart_olmoe.py
Needs:  2 CPU cores, 2 GB of memory, no download; any one device also does.
Expect: 200 steps in half a minute, after which no expert has twice the mean load;
        --config.train.load_balancing_loss=none shows what the loss is for.
Source: no official run. Blocks, routers and their losses are OLMoE's; the sizes are the
        quickstart's.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "quickstart_olmoe"
    c.data.corpus = "stdlib"
    c.data.corpus_vocab_size = 4096
    c.data.seq_len = 256
    c.data.global_batch_size = 8 * 256

    c.model.update(presets.MODELS["olmoe_1B_7B"])
    c.model.vocab_size = 4096
    c.model.padded_vocab_size = None
    c.model.d_model = 128
    c.model.n_layers = 4
    c.model.n_heads = 2
    c.model.n_kv_heads = 2
    c.model.head_dim = 64
    c.model.d_ff = 128
    c.model.n_experts = 8
    c.model.n_experts_per_token = 2
    c.model.max_seq_len = 256
    c.model.init_std = 0.08
    c.model.embed_init_std = 1.0
    c.model.head_init_std = 0.02

    c.compute.dtype = "float32"
    c.compute.remat = "none"

    c.optim.name = "adamw"
    c.optim.lr = 3.5e-3
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.warmup_fraction = 0.03
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 200
    c.train.load_balancing_loss = 0.01
    c.train.router_z_loss = 0.001
    c.eval.interval = 100
    c.eval.stride = 128
    c.eval.max_rows = 128
    c.checkpoint.interval = 100
    c.log.interval = 10
    return c
