"""OLMo-7B-0724, July 2024: two passes over Dolma 1.7, clipped q, k and v.

Run:    python -m olmo_jax.train --config=configs/olmo1_7b_0724.py --config.data.root=/mnt/data
Data:   dolma-1_7/*.npy under data.root: uint16 tokens of gpt-neox-olmo-dolma-v1_5. Name the files
        in the official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 82.7 GB of fp32 parameters and moments in all.
        Official hardware unknown; FSDP.
Plan:   --config.mesh.data=4 --config.mesh.fsdp=32 --config.compute.remat=qkv_mlp
        on v5p:4x4x8; by formula: 57 of 96 GiB, 3.76 to 4.07 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: allenai/OLMo configs/official-0724/OLMo-7B-0724.yaml, equal to 0424's but for its name: the
        staged data of 0724 is in no official config. Released with about 2.75T tokens. Weight decay
        on everything: the norms have no weights, the embedding is decayed. Which of two loss
        divisors its trainer had is not settled; they differ by 1 in 4,096, and `global_tokens` is
        the older one, as in olmo1_1b. The relaxed clipping begins and ends one step later in the
        original.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmo1_7b_0724"
    c.model.update(presets.MODELS["olmo1_7B_0724"])
    c.update(presets.OLMO1_RUN)

    c.data.paths = ("dolma-1_7/*.npy",)
    c.data.seq_len = 4096
    c.data.global_batch_size = 1024 * 4096

    c.optim.lr = 3e-4
    c.optim.no_decay = ()
    c.optim.clip_warmup = 2_097_152_000  # tokens, 500 steps
    c.optim.clip_warmup_factor = 5.0
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "tokens"
    c.optim.schedule.warmup = 10_485_760_000
    c.optim.schedule.warmup_min_lr = 3e-5  # OLMo: a tenth of the peak unless a config says else
    c.optim.schedule.t_max = 3_000_000_000_000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 2
    c.train.duration_unit = "epochs"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
