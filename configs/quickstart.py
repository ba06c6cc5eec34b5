"""A small Olmo-3-shaped model on the source text of Python's own standard library.

Run:    make train        or: python -m olmo_jax.train --config=configs/quickstart.py
Needs:  2 CPU cores, 2 GB of memory, no download; any one device also does.
Expect: 3,500 steps (3.6M tokens) in 3 to 6 minutes; held-out text at 1.18 bits per byte, where
        gzip -9 needs 1.93 and xz -9 1.59.
Source: no official run. Shape of the blocks and order are Olmo 3's; optimizer, initial scales,
        batch and learning rate were searched for on this corpus (LOG.md). With AdamW, as Olmo 3
        was trained, the same steps reach 1.43.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "quickstart"
    c.data.corpus = "stdlib"
    c.data.corpus_vocab_size = 4096
    c.data.seq_len = 256
    c.data.global_batch_size = 4 * 256

    c.model.update(presets.OLMO3)
    c.model.vocab_size = 4096
    c.model.d_model = 128
    c.model.n_layers = 4
    c.model.n_heads = 2
    c.model.n_kv_heads = 2
    c.model.head_dim = 64
    c.model.d_ff = 512
    c.model.max_seq_len = 256
    c.model.window = 32
    # At this size scales matter more than anything else: embeddings that dominate the residual
    # stream at first (std 1) are worth 0.2 bits per byte, quiet sub-layers 0.05.
    c.model.init_std = 0.04
    c.model.embed_init_std = 1.0
    c.model.head_init_std = 0.02
    c.model.post_norm_init = 0.3

    c.compute.dtype = "float32"
    c.compute.remat = "none"  # the activations of 1,024 tokens are small

    # Muon for the matrices of the blocks; embedding, head and norms get Adam at 0.15 of the rate.
    # Five iterations instead of three are no better for what they cost.
    c.optim.name = "muon"
    c.optim.options = {"beta": 0.9, "ns_steps": 3, "adam_learning_rate": 0.15}
    c.optim.lr = 0.055
    c.optim.weight_decay = 0.015
    c.optim.no_decay = ("embed", "*norm")
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.warmup_fraction = 0.03
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 3500
    c.train.summary = True
    c.eval.interval = 500
    c.eval.stride = 128
    c.eval.max_rows = 128
    c.checkpoint.interval = 1000
    c.log.interval = 50
    return c
