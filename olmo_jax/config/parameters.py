"""The parameters of a model: their names, sizes and how a mesh divides them."""

from olmo_jax.config.model import ModelConfig


def weights(m: ModelConfig) -> dict[str, tuple[tuple[int, str | None], ...]]:
    """Every parameter by path: its dimensions, each with the mesh axis that divides it."""
    d, layer = (m.d_model, "fsdp"), (m.n_layers, None)
    heads, kv_heads = (m.n_heads, "tensor"), (m.n_kv_heads, "tensor")
    vocab, d_ff, head_dim = (m.vocab_rows, "tensor"), (m.d_ff, "tensor"), (m.head_dim, None)
    table: dict[str, tuple[tuple[int, str | None], ...]] = {
        "embed": (vocab, d),
        "layers/attn/wq": (layer, d, heads, head_dim),
        "layers/attn/wk": (layer, d, kv_heads, head_dim),
        "layers/attn/wv": (layer, d, kv_heads, head_dim),
        "layers/attn/wo": (layer, heads, head_dim, d),
    }
    if not m.n_experts:
        table["layers/mlp/w_gate"] = table["layers/mlp/w_up"] = (layer, d, d_ff)
        table["layers/mlp/w_down"] = (layer, d_ff, d)
    else:
        experts = (m.n_experts, "expert")
        table["layers/moe/router"] = (layer, d, (m.n_experts, None))
        if m.router_bias_gamma is not None:
            table["layers/moe/router_bias"] = (layer, (m.n_experts, None))
        table["layers/moe/w_gate"] = table["layers/moe/w_up"] = (layer, experts, d, d_ff)
        table["layers/moe/w_down"] = (layer, experts, d_ff, d)
    if m.norm != "nonparametric":
        whole = (m.d_model, None)  # small, and added to every gradient: kept on each device
        table |= {"layers/attn_norm": (layer, whole), "layers/mlp_norm": (layer, whole)}
        table["final_norm"] = (whole,)
    if m.qk_norm != "none":
        table["layers/attn/q_norm"] = (layer, heads, head_dim)
        table["layers/attn/k_norm"] = (layer, kv_heads, head_dim)
    if not m.tie_embeddings:
        table["lm_head"] = (d, vocab)
    return table
