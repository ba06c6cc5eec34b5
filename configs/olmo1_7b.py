"""OLMo-7B, February 2024: 2T tokens of Dolma 1.5, linear decay. Also OLMo-7B-Twin-2T.

Run:    python -m olmo_jax.train --config=configs/olmo1_7b.py --config.data.root=/mnt/data
Data:   olmo-mix-v1_5-sample/*.npy under data.root: the 2T sample of Dolma 1.5 as uint16 tokens of
        eleuther-ai-gpt-neox-20b-pii-special. Name the files in the official order to get the
        official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 82.7 GB of fp32 parameters and moments in all.
        Official: up to 256 nodes of 4 MI250X; the twin 27 nodes of A100-40G.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; by formula: 57 of 96 GiB, 3.61 to 3.91 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet. Official: about 2,500 tokens/s per A100 (35 % MFU), 1,200 per
        MI250X; loss unknown.
Source: allenai/OLMo configs/official-0724/OLMo-7B.yaml; arXiv 2402.00838. The released OLMo-7B went
        on to 2.46T tokens, the last 1000 steps linearly to 0; that part is in no official config.
        The loss is `global_tokens` as in olmo1_1b. The relaxed clipping of the first 1000 steps
        begins and ends one step later in the original.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo1_7b"
    c.model.update(presets.MODELS["olmo1_7B"])
    c.update(presets.OLMO1_RUN)

    c.data.paths = ("olmo-mix-v1_5-sample/*.npy",)
    c.data.seq_len = 2048
    c.data.global_batch_size = 2048 * 2048

    c.optim.lr = 3e-4
    c.optim.clip_warmup = 1000
    c.optim.clip_warmup_factor = 10.0
    c.optim.schedule.name = "linear_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 5000
    c.optim.schedule.warmup_min_lr = 3e-5  # OLMo: a tenth of the peak unless a config says else
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 2_000_000_000_000
    c.train.duration_unit = "tokens"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
