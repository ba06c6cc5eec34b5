"""Olmo 3 32B, long context: 100B tokens in rows of 65,536, YaRN on the full layers.

Run:    python -m olmo_jax.train --config=configs/olmo3_32b_longcontext.py \
          --config.data.root=/mnt/data
Data:   OLMo-longmino-mix-0925/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order. --dry_run needs no files.
Needs:  256 chips of TPU v5p (v5p-512) are sensible; 386.8 GB of fp32 parameters and moments in
        all, and the average of both mid-trainings in checkpoint.load_path. With 8 KV heads
        mesh.tensor can be 1, 2, 4 or 8. Official: 1,024 H100, 8 to a row, sharded 8 ways.
Mesh:   a row lies on 8 chips (mesh.context) in 16 chunks of 4,096, as long as the window: sliding
        layers fetch one chunk of keys from a neighbour, full layers pass theirs around in a ring.
Plan:   --config.mesh.fsdp=64 --config.mesh.context=4 --config.compute.remat=qkv
          --config.compute.accumulate=2
        on v5p:4x8x8; by formula: 69 of 96 GiB, 22.61 to 24.26 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: 1,300 tokens/s per H100; loss unknown. 11,921 steps.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-32B-long-context.py; there the
        merged mid-training checkpoint stands in a comment only. Attention stays within documents.
        The released model is the average of steps 10,000, 11,000 and 11,921. Difference: the
        original packs whole documents into rows (groups of 8 files), here rows are cut from the
        running text. loss_ranks is the original's 128, one row each.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_32b_longcontext"
    c.model.update(presets.MODELS["olmo3_32B_long"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-longmino-mix-0925/*.npy",)
    c.data.source_permutation_seed = 123
    c.data.seq_len = 65_536
    c.data.global_batch_size = 128 * 65_536
    c.data.document_mask = "eos"
    c.data.instance_filter = True

    c.optim.lr = 2.071235285e-4
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 200
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 100_000_000_000
    c.train.duration_unit = "tokens"
    c.train.loss_ranks = 128

    c.checkpoint.load_path = "runs/olmo3_32b_midtrain"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    # YaRN and the longer rows are what this stage is about.
    c.checkpoint.allow_changes = ("model.max_seq_len", "model.yarn_factor")
    c.mesh.fsdp = -1
    c.mesh.context = 8
    c.compute.accumulate = 4
    return c
