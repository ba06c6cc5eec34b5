"""Trains a small model with Ai2's first trainer's code: six steps, saved after the third.

Run by the tests with `ai2-olmo` installed: `train_olmo.py OUT MODEL`, where OUT/batches.npy holds
[6, batch, seq] tokens. Prints the six losses, each before its step, and the logits of the saved
model's first row, as JSON.
"""

import copy
import json
import pathlib
import random
import sys
import types

import numpy as np
import torch

# Named in a signature of olmo.util; the package is for evaluations, and large.
sys.modules["datasets"] = types.SimpleNamespace(  # type: ignore[assignment]
    Dataset=type("Dataset", (), {}), DatasetDict=type("DatasetDict", (), {})
)
from olmo.checkpoint import FullCheckpointer
from olmo.config import ModelConfig, OptimizerConfig, OptimizerType, TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer
from olmo.safetensors_util import state_dict_to_safetensors_file

VOCAB, SAVED_AFTER, LR, CLIP = 128, 3, 1e-2, 1.0
COMMON = dict(
    d_model=64,
    n_heads=4,
    n_layers=3,
    mlp_hidden_size=96,
    max_sequence_length=24,
    vocab_size=120,
    embedding_size=VOCAB,
    rope=True,
    include_bias=False,
    attention_dropout=0.0,
    residual_dropout=0.0,
    embedding_dropout=0.0,
    eos_token_id=7,
    pad_token_id=1,
    init_device="cpu",
)
MODELS = {
    "olmo1 tied": dict(layer_norm_with_affine=False, weight_tying=True, init_fn="mitchell"),
    "olmo1 clipped": dict(layer_norm_with_affine=False, weight_tying=False, clip_qkv=0.5),
    "olmo2 grouped": dict(
        layer_norm_type="rms",
        layer_norm_with_affine=True,
        bias_for_layer_norm=False,
        attention_layer_norm=True,
        layer_norm_eps=1e-6,
        norm_after=True,
        weight_tying=False,
        n_kv_heads=2,
        rope_theta=500_000,
    ),
}


def main(out: pathlib.Path, name: str, form: str) -> None:
    """Train, save, train on."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    batches = torch.from_numpy(np.load(out / "batches.npy")).long()
    config = TrainConfig(
        model=ModelConfig(**COMMON | MODELS[name]),
        optimizer=OptimizerConfig(
            name=OptimizerType.adamw,
            learning_rate=LR,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            decay_norm_and_bias=True,
            decay_embeddings=False,
        ),
    )
    model = OLMo(config.model)
    with torch.no_grad():  # the fresh values would hide a norm that is in the wrong place
        for key, p in model.named_parameters():
            p.add_(0.2 * torch.randn_like(p) if "norm" in key else 0.03 * torch.randn_like(p))
    optim = build_optimizer(config, model)
    result = {"losses": []}
    for step, tokens in enumerate(batches, 1):
        result["losses"].append(train_step(model, optim, tokens))
        if step == SAVED_AFTER:
            save(out / "step3", config, model, optim, batches, form)
            with torch.no_grad():
                result["logits"] = model(batches[0][:1]).logits[0].tolist()
    print(json.dumps(result))


def train_step(model: torch.nn.Module, optim: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One update on the mean cross entropy of the next tokens, which is returned."""
    logits = model(tokens).logits
    flat = logits[:, :-1].reshape(-1, VOCAB)
    loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
    optim.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optim.step()
    return loss.item()


def save(folder: pathlib.Path, config, model, optim, batches: torch.Tensor, form: str) -> None:
    """A checkpoint by OLMo's own checkpointer, of what a process alone would train."""
    n_rows, seq_len = batches.shape[1:]
    trainer = {
        "epoch": 0,
        "global_step": SAVED_AFTER,
        "global_train_examples_seen_this_epoch": SAVED_AFTER * n_rows,
        "global_train_tokens_seen": SAVED_AFTER * n_rows * seq_len,
        "world_size": 1,
        "checkpoints": [folder],
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.random.get_rng_state(),
        },
    }
    meeting = (folder.parent / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    # A copy, for the hooks of the wrapper would stay.
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    FullCheckpointer(config).save_checkpoint(folder, wrapped, optim, trainer)
    torch.distributed.destroy_process_group()
    if form == "safetensors":
        state = torch.load(folder / "model.pt")
        state_dict_to_safetensors_file(state, folder / "model.safetensors")
        (folder / "model.pt").unlink()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
