"""Olmo 3 7B, long context: 50B tokens in rows of 65,536, YaRN on the full layers.

Run:    python -m olmo_jax.train --config=configs/olmo3_7b_longcontext.py \
          --config.data.root=/mnt/data
Data:   OLMo-longmino-mix-0625/*.npy under data.root: uint32 dolma2 tokens. Name the files in the
        official order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 87.6 GB of fp32 parameters and moments in all,
        and the end of olmo3_7b_midtrain in checkpoint.load_path. Official: 256 H100, 8 to a row.
Mesh:   a row lies on 8 chips (mesh.context) in 16 chunks of 4,096, as long as the window: sliding
        layers fetch one chunk of keys from a neighbour, full layers pass theirs around in a ring.
Plan:   --config.mesh.fsdp=32 --config.mesh.context=4 --config.compute.remat=qkv_mlp
          --config.compute.accumulate=2
        on v5p:4x4x8; by formula: 63 of 96 GiB, 5.21 to 5.86 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: 4,000 tokens/s per H100, with float8; loss unknown.
        11,921 steps.
Source: allenai/OLMo-core src/scripts/official/OLMo3/OLMo-3-1025-7B-long-context.py, but with 50B
        tokens: its durations are left over from pretraining. Attention stays within documents.
        Differences: the original packs whole documents into rows (groups of 8 files), here rows
        are cut from the running text; bfloat16 instead of float8. loss_ranks is the original's 32.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo3_7b_longcontext"
    c.model.update(presets.MODELS["olmo3_7B_long"])
    c.update(presets.CORE_RUN)

    c.data.paths = ("OLMo-longmino-mix-0625/*.npy",)
    c.data.source_permutation_seed = 123
    c.data.seq_len = 65_536
    c.data.global_batch_size = 64 * 65_536
    c.data.document_mask = "eos"
    c.data.instance_filter = False

    c.optim.lr = 2.0712352850360292e-4
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 200
    c.optim.schedule.alpha_f = 0.0

    c.train.duration = 50_000_000_000
    c.train.duration_unit = "tokens"
    c.train.loss_ranks = 32

    c.checkpoint.load_path = "runs/olmo3_7b_midtrain"
    c.checkpoint.load_optimizer = True
    c.checkpoint.load_position = False  # new data, from its beginning
    # YaRN and the longer rows are what this stage is about.
    c.checkpoint.allow_changes = ("model.max_seq_len", "model.yarn_factor")
    c.mesh.fsdp = -1
    c.mesh.context = 8
    c.compute.accumulate = 4
    return c
