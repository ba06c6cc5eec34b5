"""Random Hugging Face models of every dense family, as configs and parameters of ours."""

import numpy as np
import torch
import transformers
from jax import numpy as jnp

from olmo_jax.checkpoints import conversion
from olmo_jax.config.model import ModelConfig

ROPE = dict(
    rope_type="yarn",
    factor=8.0,
    original_max_position_embeddings=8192,
    beta_fast=32,
    beta_slow=1,
    attention_factor=1.2079441541679836,
)
COMMON = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    pad_token_id=1,
    eos_token_id=2,
)
OLMO1 = dict(norm="nonparametric", norm_position="before", norm_eps=1e-5, qk_norm="none")
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)
OLMOE = dict(norm_position="before", norm_eps=1e-5, n_experts=8, n_experts_per_token=3)
SLIDING = dict(layer_types=("sliding", "sliding", "sliding", "full"), window=5)
YARN = dict(yarn_factor=8.0, yarn_attention_factor=1.2079441541679836)

# name -> (Hugging Face family, its options, our options)
FAMILIES = {
    "olmo1 tied": ("Olmo", dict(tie_word_embeddings=True), OLMO1 | dict(tie_embeddings=True)),
    "olmo1 untied": ("Olmo", dict(tie_word_embeddings=False), OLMO1),
    "olmo1 clipped": ("Olmo", dict(clip_qkv=0.7), OLMO1 | dict(clip_qkv=0.7)),
    "olmo2": ("Olmo2", dict(rms_norm_eps=1e-6), {}),
    "olmo2 grouped": ("Olmo2", dict(num_key_value_heads=2, rms_norm_eps=1e-6), dict(n_kv_heads=2)),
    "olmoe": ("Olmoe", EXPERTS | dict(rms_norm_eps=1e-5), OLMOE),
    "olmoe renormalised grouped": (
        "Olmoe",
        EXPERTS | dict(norm_topk_prob=True, num_key_value_heads=2, rms_norm_eps=1e-5),
        OLMOE | dict(normalize_expert_weights=True, n_kv_heads=2),
    ),
    "flex olmo": (
        "FlexOlmo",
        EXPERTS | dict(num_experts=5, rms_norm_eps=1e-6),
        dict(n_experts=5, n_experts_per_token=3),
    ),
    "olmo3": ("Olmo3", dict(sliding_window=5, rms_norm_eps=1e-6), SLIDING),
    "olmo3 yarn grouped": (
        "Olmo3",
        dict(sliding_window=5, rms_norm_eps=1e-6, num_key_value_heads=2, rope_scaling=ROPE),
        SLIDING | YARN | dict(n_kv_heads=2),
    ),
    "olmo3 odd depth": (
        "Olmo3",
        dict(
            sliding_window=5,
            rms_norm_eps=1e-6,
            num_hidden_layers=5,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"]
            + ["full_attention"] * 2,
        ),
        dict(
            n_layers=5, layer_types=("full", "sliding", "sliding", "full", "full"), window=5
        ),
    ),
    "olmo3 window beyond the sequence": (
        "Olmo3",
        dict(sliding_window=500, rms_norm_eps=1e-6),
        SLIDING | dict(window=500),
    ),
}  # fmt: skip


def random_model(name: str, scale: float = 0.15) -> tuple[torch.nn.Module, ModelConfig, dict]:
    """A Hugging Face model with loud random weights, and the same as (config, params) of ours."""
    family, options, ours = FAMILIES[name]
    theta = 10_000.0 if family in ("Olmo", "Olmoe") else 500_000.0
    hf_config = getattr(transformers, f"{family}Config")(**COMMON | {"rope_theta": theta} | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        hf_config, attn_implementation="eager"
    )
    with torch.no_grad():
        for key, p in model.named_parameters():  # the default init hides norm and scale faults
            noise = torch.randn_like(p)
            # Routers with an opinion, and experts so quiet that rounding stays below 2e-5.
            loud = 0.3 if "mlp.gate.weight" in key else 0.1 if ".experts." in key else scale
            p.copy_(1 + 0.3 * noise if "norm" in key else loud * noise)
    config = ModelConfig(
        **dict(
            vocab_size=97,
            d_model=64,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            head_dim=16,
            d_ff=48,
            max_seq_len=65536,
            rope_theta=theta,
        )
        | ours
    )
    return model.eval(), config, params_of(model, config)


def exported_logits(src: str, dst: str, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes from somebody's checkpoint after its conversion.

    Args:
      src: checkpoint of any kind.
      dst: new folder for Hugging Face's.
      tokens: [batch, seq].
    """
    conversion.to_hf(src, dst, say=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def params_of(model: torch.nn.Module, config: ModelConfig) -> dict:
    """The Hugging Face weights in our tree."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    h = config.head_dim

    def stack(name: str, form) -> jnp.ndarray:
        layers = range(config.n_layers)
        return jnp.asarray(
            np.stack([form(state[f"model.layers.{i}.{name}.weight"]) for i in layers])
        )

    heads = lambda w: w.T.reshape(w.shape[1], -1, h)  # noqa: E731
    attn = {f"w{x}": stack(f"self_attn.{x}_proj", heads) for x in "qkv"}
    attn["wo"] = stack("self_attn.o_proj", lambda w: w.T.reshape(-1, h, w.shape[0]))
    params = {"embed": jnp.asarray(state["model.embed_tokens.weight"])}
    layers = {"attn": attn} | _feed_forward(state, config)
    if config.norm == "rms":
        for x in "qk":
            attn[f"{x}_norm"] = stack(f"self_attn.{x}_norm", lambda w: w.reshape(-1, h))
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
        if config.norm_position == "before":
            names = ("input_layernorm", "post_attention_layernorm")
        layers["attn_norm"], layers["mlp_norm"] = (stack(name, lambda w: w) for name in names)
        params["final_norm"] = jnp.asarray(state["model.norm.weight"])
    if not config.tie_embeddings:
        params["lm_head"] = jnp.asarray(state["lm_head.weight"].T)
    return params | {"layers": layers}


def _feed_forward(state: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """The MLP, or router and experts, of all layers."""

    def stack(name: str) -> np.ndarray:
        return np.stack([state[f"model.layers.{i}.mlp.{name}"] for i in range(config.n_layers)])

    if not config.n_experts:
        names = {f"w_{x}": f"{x}_proj.weight" for x in ("gate", "up", "down")}
        return {"mlp": {ours: jnp.asarray(stack(n).swapaxes(1, 2)) for ours, n in names.items()}}
    gate, up = np.split(stack("experts.gate_up_proj").swapaxes(2, 3), 2, axis=3)
    down = stack("experts.down_proj").swapaxes(2, 3)
    moe = {"router": stack("gate.weight").swapaxes(1, 2), "w_gate": gate, "w_up": up}
    return {"moe": {name: jnp.asarray(w) for name, w in (moe | {"w_down": down}).items()}}
