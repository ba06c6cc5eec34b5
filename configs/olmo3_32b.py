"""Olmo 3 32B (Olmo-3-1125-32B), pretraining: 5.5T tokens, of a cosine over one pass of the data.

Run:    python -m olmo_jax.train --config=configs/olmo3_32b.py --config.data.root=/mnt/data
Data:   OLMo-mix-0925-official/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order to get the official data order. --dry_run needs no files.
Needs:  512 chips of TPU v5p (v5p-1024) are sensible; 386.8 GB of fp32 parameters and moments in
        all. With 8 KV heads mesh.tensor can be 1, 2, 4 or 8. Official: 1,024 H100, sharded 64 ways.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=256 --config.compute.remat=qkv
        on v5p:8x8x8; compiled: 63 of 96 GiB, 10.35 to 11.20 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: 1,960 tokens/s per H100 (41 % MFU); loss unknown.
        The report says that the learning rate was 6.21e-5 at the end.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-32B-pretrain.py, cut at step
        656,000, from which mid-training starts. The cosine ends with the epoch, whose length in
        steps is in no script: it comes from the files. loss_ranks is the original's 1,024, one row
        each; a row masked by the repetition filter adds nothing to the loss and takes its share of
        the mean. No differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_32b"
    c.model.update(presets.MODELS["olmo3_32B"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-mix-0925-official/*.npy",)
    c.data.seq_len = 8192
    c.data.global_batch_size = 1024 * 8192
    c.data.instance_filter = True

    c.optim.lr = 6e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 2000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 1
    c.train.duration_unit = "epochs"
    c.train.hard_stop = 656_000
    c.train.hard_stop_unit = "steps"
    c.train.loss_ranks = 1024

    c.mesh.fsdp = -1
    return c
