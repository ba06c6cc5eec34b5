"""A small Olmo-3-shaped model on the source text of Python's own standard library.

Run:    make train        or: python -m olmo_jax.train --config=configs/quickstart.py
Needs:  2 CPU cores, 2 GB of memory, no download; any one device also does.
Expect: 3,500 steps (3.6M tokens) in 3 to 6 minutes; held-out text at 1.43 bits per byte, where
        gzip -9 needs 1.93 and xz -9 1.59. 5,000 steps reach 1.38.
Source: no official run. Shape of the blocks, optimizer and order are Olmo 3's; the initial scales,
        the batch and the learning rate were searched for on this corpus.
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
    c.model.init_std = 0.08
    c.model.embed_init_std = 1.0
    c.model.head_init_std = 0.02
    c.model.post_norm_init = 0.3

    c.compute.dtype = "float32"
    c.compute.remat = "none"  # the activations of 1,024 tokens are small

    c.optim.name = "adamw"
    c.optim.lr = 6e-3
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
