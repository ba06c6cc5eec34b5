"""OLMo-1B, February 2024: tied embeddings, cosine to 3.1T tokens of Dolma 1.5.

Run:    python -m olmo_jax.train --config=configs/olmo1_1b.py --config.data.root=/mnt/data
Data:   olmo-mix-v1_5/*.npy under data.root: Dolma 1.5 as uint16 tokens of
        eleuther-ai-gpt-neox-20b-pii-special. Name the files in the official order to get the
        official data order. --dry_run needs no files.
Needs:  64 chips of TPU v5p (v5p-128) are sensible; fewer with more compute.accumulate.
        14.1 GB of fp32 parameters and moments in all. Official: AMD MI250X with FSDP.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
          --config.compute.accumulate=1
        on v5p:4x4x4; by formula: 69 of 96 GiB, 1.40 to 1.42 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: allenai/OLMo configs/official-0724/OLMo-1B.yaml; arXiv 2402.00838. The released model
        stopped at about 2T tokens (about step 477,000). Its trainer averaged the loss over valid
        labels; with no masked row that is `global_tokens`. No differences known.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo1_1b"
    c.model.update(presets.MODELS["olmo1_1B"])
    c.update(presets.OLMO1_RUN)

    c.data.paths = ("olmo-mix-v1_5/*.npy",)
    c.data.seq_len = 2048
    c.data.global_batch_size = 2048 * 2048

    c.optim.lr = 4e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "steps"
    c.optim.schedule.warmup = 2000
    c.optim.schedule.warmup_min_lr = 4e-5  # OLMo: a tenth of the peak unless a config says else
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 739_328
    c.train.duration_unit = "steps"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
