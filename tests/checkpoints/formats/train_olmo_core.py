"""Trains a small model with Ai2's OLMo-core: six steps, saved by its own code after the third.

Run by the tests with that package installed: `train_olmo_core.py OUT MODEL OPTIMIZER`, where
OUT/batches.npy holds [6, batch, seq] tokens. Prints the six losses, each before its step, and the
logits of the saved model's first row, as JSON.
"""

import json
import pathlib
import random
import sys

import numpy as np
import torch
from olmo_core.nn.attention import AttentionType, SlidingWindowAttentionConfig
from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType
from olmo_core.nn.moe.parallel_mlp import ParallelDroplessMLP
from olmo_core.nn.rope import YaRNRoPEScalingConfig
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig, TransformerType
from olmo_core.optim import AdamWConfig, OptimGroupOverride, SkipStepAdamWConfig
from olmo_core.train.checkpoint import Checkpointer
from olmo_core.train.train_module import TransformerTrainModuleConfig

VOCAB, SAVED_AFTER, LR, CLIP = 128, 3, 1e-2, 1.0
LOUD = dict(lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
OPTIMIZERS = {"adamw": AdamWConfig, "skip_step_adamw": SkipStepAdamWConfig}


def model_config(name: str) -> TransformerConfig:
    """Four layers with grouped heads: olmo2, olmo3 with window and YaRN, or olmoe with experts."""
    window = SlidingWindowAttentionConfig(
        pattern=[5, 5, 5, -1],
        force_full_attention_on_first_layer=False,
        force_full_attention_on_last_layer=True,
    )
    experts = None
    if name.startswith("olmoe"):
        norm = 1.0 if name == "olmoe renormalised" else None
        experts = MoEConfig(
            name=MoEType.dropless,
            num_experts=8,
            hidden_size=48,
            router=MoERouterConfig(top_k=3, normalize_expert_weights=norm),
            lb_loss_weight=0.1,
            z_loss_weight=0.01,
            scale_loss_by_num_layers=norm is None,
        )
    block = TransformerBlockType.reordered_norm
    config = TransformerConfig.llama_like(
        name=TransformerType.moe if experts else TransformerType.default,
        d_model=64,
        vocab_size=VOCAB,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        layer_norm_eps=1e-6,
        qk_norm=True,
        rope_theta=500_000,
        hidden_size_multiple_of=16,
        block_name=TransformerBlockType.moe_reordered_norm if experts else block,
        feed_forward_moe=experts,
        sliding_window=window if name == "olmo3" else None,
    )
    config.tie_word_embeddings = name == "olmo2 tied"
    if name == "olmo2 fused":
        config.block.sequence_mixer.name = AttentionType("fused_v2")
    if name == "olmo3":
        scaling = YaRNRoPEScalingConfig(factor=8, beta_fast=32, beta_slow=1, old_context_len=8192)
        config = config.with_rope_scaling(scaling)
    return config


def experts_one_by_one(
    self: ParallelDroplessMLP,
    x: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_indices: torch.Tensor,
    batch_size_per_expert: torch.Tensor,
) -> torch.Tensor:
    """The experts on a CPU, where OLMo-core's own gather and scatter do not run."""
    tokens, k = x.flatten(0, -2), expert_indices.shape[-1]
    weights, indices = expert_weights.reshape(-1, k), expert_indices.reshape(-1, k)
    w1, w2, w3 = (w.view(self.num_experts, -1, x.shape[-1]) for w in
                  (self.mlp.w1, self.mlp.w2, self.mlp.w3))  # fmt: skip
    out = torch.zeros_like(tokens)
    for e in range(self.num_experts):
        token, slot = torch.where(indices == e)
        h = torch.nn.functional.silu(tokens[token] @ w1[e].T) * (tokens[token] @ w3[e].T)
        out = out.index_add(0, token, weights[token, slot, None] * (h @ w2[e]))
    return out.view(x.shape)


def main(out: pathlib.Path, name: str, optimizer: str) -> None:
    """Train, save, train on."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ParallelDroplessMLP.forward = experts_one_by_one
    batches = torch.from_numpy(np.load(out / "batches.npy")).long()
    config = model_config(name)
    optim_config = OPTIMIZERS[optimizer](
        **LOUD,
        group_overrides=[
            OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
        ],
    )
    module_config = TransformerTrainModuleConfig(
        rank_microbatch_size=batches[0].numel(),
        max_sequence_length=batches.shape[2],
        optim=optim_config,
        max_grad_norm=CLIP,
    )
    model = config.build(init_device="cpu")
    module = module_config.build(model, device=torch.device("cpu"))
    with torch.no_grad():  # the fresh values would hide a norm that is in the wrong place
        for key, p in model.named_parameters():
            p.add_(0.2 * torch.randn_like(p) if "norm" in key else 0.03 * torch.randn_like(p))
    result = {"losses": []}
    for step, tokens in enumerate(batches, 1):
        result["losses"].append(train_step(model, module.optim, tokens))
        if step == SAVED_AFTER:
            save(out / "step3", module, config, module_config, batches)
            with torch.no_grad():
                result["logits"] = model(batches[0][:1])[0].tolist()
    print(json.dumps(result))


def train_step(model: torch.nn.Module, optim: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One update on the mean cross entropy of the next tokens, which is returned."""
    # What the trainer divides by, the losses of routers too: tokens with a label (train_module.py).
    logits = model(tokens, loss_div_factor=torch.tensor(tokens[:, 1:].numel()))
    flat = logits[:, :-1].reshape(-1, VOCAB)
    loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
    optim.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    if hasattr(optim, "latest_loss") or hasattr(type(optim), "latest_loss"):
        optim.latest_loss, optim.latest_grad_norm = loss.detach(), norm
    optim.step()
    return loss.item()


def save(folder: pathlib.Path, module, config, module_config, batches: torch.Tensor) -> None:
    """A checkpoint as the trainer writes it, with what it says of itself beside the arrays."""
    n_rows, seq_len = batches.shape[1:]
    trainer = {
        "global_step": SAVED_AFTER,
        "global_train_tokens_seen": SAVED_AFTER * n_rows * seq_len,
        "max_steps": 6,
        "epoch": 1,
        "world_size": 1,
        "data_loader": {
            "batches_processed": SAVED_AFTER,
            "tokens_processed": SAVED_AFTER * n_rows * seq_len,
            "sequence_length": seq_len,
            "epoch": 1,
        },
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.random.get_rng_state(),
        },
        "callbacks": {"speed_monitor": {"path": folder}},
    }
    Checkpointer(work_dir=folder.parent / "work").save(folder, module, trainer)
    experiment = {
        "model": config.as_config_dict(),
        "dataset": {
            "sequence_length": seq_len,
            "tokenizer": {"eos_token_id": 7, "pad_token_id": 1},
        },
        "train_module": module_config.as_config_dict(),
    }
    (folder / "config.json").write_text(json.dumps(experiment))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
