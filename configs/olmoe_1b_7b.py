"""OLMoE-1B-7B (0924): 64 experts a layer, 8 of them for each token; 5.1T tokens of OLMoE-mix-0924.

Run:    python -m olmo_jax.train --config=configs/olmoe_1b_7b.py --config.data.root=/mnt/data
Data:   OLMoE-mix-0924/*.npy under data.root: uint16 tokens of gpt-neox-olmo-dolma-v1_5. Name the
        files in the official order to get the official data order. --dry_run needs no files.
Needs:  128 chips of TPU v5p (v5p-256) are sensible. 83.0 GB of fp32 parameters and moments in all.
        Official hardware: 256 H100, fully sharded.
Plan:   --config.mesh.data=2 --config.mesh.fsdp=64 --config.compute.remat=none
        on v5p:4x4x8; compiled: 63 of 96 GiB, 1.33 to 1.58 s a step, estimated; nothing ran. See
        docs/plans.md.
Expect: speed not measured here yet; official speed and loss unknown.
Source: arXiv 2409.02060 and its training config; 5.1T tokens are 1.25 passes over the data, here
        1,215,935 steps. Weight decay on everything. The router's z-loss of 1e-3 is divided by the
        8 experts of a token, as in the code that trained it. Balance is counted over a micro-batch
        of all devices, there of one.
"""

from olmo_jax import config, presets


def get_config():
    c = config.default()
    c.name = "olmoe_1b_7b"
    c.model.update(presets.MODELS["olmoe_1B_7B"])
    c.update(presets.OLMOE_RUN)

    c.data.paths = ("OLMoE-mix-0924/*.npy",)
    c.data.global_batch_size = 1024 * 4096

    c.optim.lr = 4e-4
    c.optim.schedule.name = "cos_with_warmup"
    c.optim.schedule.unit = "tokens"
    c.optim.schedule.warmup = 10_485_760_000
    c.optim.schedule.warmup_min_lr = 4e-5  # OLMo: a tenth of the peak unless a config says else
    c.optim.schedule.t_max = 5_000_000_000_000
    c.optim.schedule.alpha_f = 0.1

    c.train.duration = 5_100_000_000_000
    c.train.duration_unit = "tokens"

    c.mesh.fsdp = -1
    c.compute.accumulate = 2
    return c
