"""OLMo-core's `config.json` as our ModelConfig, and what it says of a run.

Whatever is read has a place here or is refused by name. Sources: OLMo-core
nn/transformer/config.py, nn/attention/__init__.py, nn/rope.py, nn/layer_norm.py.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from olmo_jax.checkpoints.formats.fields import MOST, Fields, find, odd_ids
from olmo_jax.config.changes import shortest
from olmo_jax.config.model import ModelConfig

OPTIMIZERS = {"SkipStepAdamWConfig": "skip_step_adamw", "AdamWConfig": "adamw"}
ROUTER_LOSSES = (
    "lb_loss_weight", "z_loss_weight", "scale_loss_by_num_layers", "lb_loss_granularity",
)  # fmt: skip
NOT_THE_MODEL = ("float8_config", "ac_config", "dp_config", "tp_config", "compile")  # OLMo-core 1


def read(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, bool]:
    """The model that a config.json of OLMo-core builds, and whether its q, k and v are fused.

    Args:
      config: its content.
      where: its name, for errors.
    Raises:
      ValueError: with the first option that olmo_jax has not, or does not know.
    """
    top = Fields(Fields(config, where).need("model"), f"{where}: model")
    top.expect("name", "default", "moe", default="default")
    top.expect("embed_scale", 1.0, default=1.0)
    top.expect("embedding_norm", None, default=None)
    n_layers = top.need_number("n_layers", int, MOST)
    d_model = top.need_number("d_model", int)
    layers = [
        _block(Fields(block, f"{where}: model.block"), i, n_layers, d_model)
        for i, block in enumerate(_blocks(top, n_layers))
    ]
    common = layers[0].common
    for i, layer in enumerate(layers):
        if layer.common != common:
            differing = [key for key, value in layer.common.items() if common.get(key) != value]
            raise ValueError(
                f"{where}: model.block_overrides: layer {i} differs from the first in"
                f" {', '.join(differing)}; layers of olmo_jax differ in their window only"
            )
    head = Fields(top.need("lm_head"), f"{where}: model.lm_head")
    head.expect("name", "default", default="default")
    head.expect("bias", False, default=True)
    norm = _norm(Fields(head.need("layer_norm"), f"{head.where}.layer_norm"))
    if norm != (common["norm"], common["norm_eps"]):
        raise ValueError(f"{head.where}.layer_norm is {norm}, but the blocks' is another")
    head.ignore("dtype", "loss_implementation")
    head.done()
    fields = dict(common)
    is_fused = fields.pop("fused")
    model = ModelConfig(
        **fields,
        **_kinds(layers, where),
        vocab_size=top.need_number("vocab_size", int),
        d_model=d_model,
        n_layers=n_layers,
        tie_embeddings=top.number("tie_word_embeddings", bool, False),
        init_std=top.number("init_std", float, 0.02),
        embed_init_std=top.number("embedding_init_std", float),
        max_seq_len=_longest(config, layers),
    )
    top.ignore("dtype", "init_method", "init_seed", "freeze_params", *NOT_THE_MODEL)
    top.done()
    return model, is_fused


class _Layer:
    """One block: what it has in common with the others, and what may be its own."""

    def __init__(self, common: dict[str, Any], window: int | None, yarn: tuple | None):
        self.common, self.window, self.yarn = common, window, yarn


def _blocks(top: Fields, n_layers: int) -> list[Any]:
    """The config of each block: one for all, with overrides, or a pattern of named ones."""
    block, overrides = top.need("block"), top.take("block_overrides", {})
    pattern = top.take("block_pattern")
    try:
        if pattern:
            return [block[pattern[i % len(pattern)]] for i in range(n_layers)]
        numbers = {int(i): override for i, override in overrides.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        options = "block, block_pattern and block_overrides"
        raise ValueError(f"{top.where}: {options} do not fit together: {error!r}") from None
    return [numbers.get(i, block) for i in range(n_layers)]


def _block(block: Fields, i: int, n_layers: int, d_model: int) -> _Layer:
    names = ("reordered_norm", "default", "moe_reordered_norm", "moe")
    name = block.expect("name", *names, default="default")
    attention = block.group("sequence_mixer") or block.group("attention")
    if attention is None:
        raise ValueError(f"{block.where}.attention is missing")
    part = "feed_forward_moe" if name.startswith("moe") else "feed_forward"
    mlp = Fields(block.need(part), f"{block.where}.{part}")
    norm, eps = _norm(Fields(block.need("layer_norm"), f"{block.where}.layer_norm"))
    block.expect("dropout", 0.0, default=0.0)
    block.expect("attention_residual_alpha", 1.0, default=1.0)
    block.expect("feed_forward_residual_alpha", 1.0, default=1.0)
    block.done()

    layer = _attention(attention, i, n_layers, d_model, (norm, eps))
    layer.common |= {
        "norm": norm,
        "norm_eps": eps,
        "norm_position": "after" if name.endswith("reordered_norm") else "before",
        **(_experts(mlp) if name.startswith("moe") else _mlp(mlp)),
    }
    return layer


def _mlp(mlp: Fields) -> dict[str, Any]:
    mlp.expect("name", "default", default="default")
    mlp.expect("bias", False, default=True)
    mlp.expect("activation", "silu", default="silu")
    d_ff = mlp.need_number("hidden_size", int)
    mlp.ignore("dtype")
    mlp.done()
    return {"d_ff": d_ff}


def _experts(moe: Fields) -> dict[str, Any]:
    """A mixture of experts; what its losses are, `train` says."""
    moe.expect("name", "dropless", default="default")
    router = Fields(moe.need("router"), f"{moe.where}.router")
    router.expect("name", "default", default="default")
    router.expect("gating_function", "softmax", default="softmax")
    router.expect("jitter_eps", None, 0.0, default=None)
    for option in ("uniform_expert_assignment", "random_expert_assignment"):
        router.expect(option, False, default=False)
    order = router.expect("normalize_expert_weights", None, 1.0, default=None)  # of the norm
    n_chosen = router.number("top_k", int, 1)
    router.ignore("dtype")
    router.done()
    fields = {
        "n_experts": moe.number("num_experts", int, 1, MOST),
        "n_experts_per_token": n_chosen,
        "normalize_expert_weights": order is not None,
        "d_ff": moe.number("hidden_size", int, 256),
    }
    moe.ignore("dtype", *ROUTER_LOSSES)
    moe.done()
    return fields


def _attention(
    attention: Fields, i: int, n_layers: int, d_model: int, norm: tuple[str, float]
) -> _Layer:
    if attention.name_of_class not in ("", "AttentionConfig"):
        raise ValueError(f"{attention.where} is a {attention.name_of_class}; olmo_jax has none")
    name = attention.expect("name", "default", "fused", "fused_v2", default="default")
    n_heads = attention.number("n_heads", int, 16)
    n_kv_heads = attention.number("n_kv_heads", int, n_heads)
    clip = attention.number("clip_qkv", float)
    qk_norm = attention.group("qk_norm")
    if qk_norm is not None and _norm(qk_norm) != norm:
        raise ValueError(f"{qk_norm.where} is not like layer_norm; olmo_jax has one for all")
    attention.expect("bias", False, default=True)
    attention.expect("use_head_qk_norm", False, default=False)
    attention.expect("dropout", 0.0, default=0.0)
    for option in ("attention_sinks", "scalable_softmax", "qk_norm_per_head_gains"):
        attention.expect(option, False, default=False)
    attention.expect("type", "attention", default="attention")
    rope = Fields(attention.need("rope"), f"{attention.where}.rope")
    window = _window(attention.group("sliding_window"), i, n_layers)
    common = {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": attention.number("head_dim", int, d_model // n_heads),
        "clip_qkv": clip,
        "qk_norm": "none" if qk_norm is None else "full",
        "fused": name != "default",
        "rope_theta": rope.number("theta", float, 500_000.0),
    }
    yarn = _yarn(rope.group("scaling"), common["rope_theta"], common["head_dim"])
    rope.expect("name", "default", "fused", default="default")
    rope.expect("no_global_rope", False, default=False)
    rope.expect("partial_rotary_factor", 1.0, default=1.0)
    rope.ignore("full_precision")  # of bfloat16 activations
    rope.done()
    attention.ignore("use_flash", "backend", "dtype", "use_recompute_qkv_prep")
    attention.done()
    return _Layer(common, window, yarn)


def _norm(norm: Fields) -> tuple[str, float]:
    """The kind of a norm in our words, and its epsilon."""
    kind = norm.expect("name", "rms", "fused_rms", "cute_rms", "default", default="default")
    is_affine = norm.number("elementwise_affine", bool, True)
    if is_affine:
        norm.expect("bias", False, default=True)
    if is_affine != (kind != "default"):
        has = "with" if is_affine else "without"
        raise ValueError(
            f"{norm.where}: a norm {kind!r} {has} weights; olmo_jax has RMSNorm with, and LayerNorm"
            " without"
        )
    eps = norm.number("eps", float, 1e-5)
    norm.ignore("full_precision", "dtype", "bias")
    norm.done()
    return "rms" if is_affine else "nonparametric", eps


def _window(window: Fields | None, i: int, n_layers: int) -> int | None:
    """Positions that a layer sees, its own included; None: all."""
    if window is None:
        return None
    pattern = window.need("pattern")
    first = window.number("force_full_attention_on_first_layer", bool, True)
    last = window.number("force_full_attention_on_last_layer", bool, True)
    window.done()
    sizes = pattern if isinstance(pattern, list) else []
    if not sizes or not all(type(n) is int and (n > 0 or n == -1) for n in sizes):
        raise ValueError(
            f"{window.where}.pattern is {reprlib.repr(pattern)}, need numbers of tokens"
        )
    if (first and i == 0) or (last and i == n_layers - 1):
        return None
    size = sizes[(i - first) % len(sizes)]
    return None if size == -1 else size


def _yarn(scaling: Fields | None, theta: float, head_dim: int) -> tuple | None:
    """Factor, original length and betas of YaRN; None: none."""
    if scaling is None:
        return None
    if scaling.name_of_class != "YaRNRoPEScalingConfig":
        raise ValueError(f"{scaling.where} is {scaling.name_of_class!r}; olmo_jax has only YaRN")
    factor = scaling.number("factor", float, 8.0)
    length = scaling.number("old_context_len", int, 8192)
    fast = scaling.number("beta_fast", float, 32.0)
    slow = scaling.number("beta_slow", float, 1.0)
    scaling.done()
    # OLMo-core cuts the ramp at half of the dimensions, transformers and olmo_jax do not.
    end = head_dim * math.log(length / (slow * 2 * math.pi)) / (2 * math.log(theta))
    if math.ceil(end) > head_dim // 2 - 1:
        raise ValueError(
            f"{scaling.where}: the ramp ends at dimension {math.ceil(end)} of {head_dim // 2},"
            " where OLMo-core's formula departs from YaRN's"
        )
    return factor, length, fast, slow


def _kinds(layers: list[_Layer], where: str) -> dict[str, Any]:
    """Windows and YaRN as options of the whole model."""
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if len(windows) > 1:
        raise ValueError(f"{where}: sliding windows of {windows}; olmo_jax has one size")
    scaled = {layer.yarn for layer in layers if layer.window is None}
    if len(scaled) > 1 or any(layer.yarn for layer in layers if layer.window is not None):
        raise ValueError(
            f"{where}: rope.scaling: olmo_jax scales all full layers alike, and no sliding ones"
        )
    kinds = ["full" if layer.window is None else "sliding" for layer in layers]
    fields: dict[str, Any] = {
        "layer_types": shortest(kinds),
        "window": windows[0] if windows else None,
    }
    if yarn := next(iter(scaled), None):
        keys = ("yarn_factor", "yarn_original_len", "yarn_beta_fast", "yarn_beta_slow")
        fields |= dict(zip(keys, yarn, strict=True))
    return fields


def _longest(config: Mapping[str, Any], layers: list[_Layer]) -> int:
    """Tokens of the longest sequence that the model is meant for, from the parts about training."""
    lengths = [
        find(config, "train_module", "max_sequence_length"),
        find(config, "dataset", "sequence_length"),
        find(config, "dataset", "effective_sequence_length"),
        *(round(layer.yarn[0] * layer.yarn[1]) for layer in layers if layer.yarn),
    ]
    known = [n for n in lengths if type(n) is int and n > 0]
    return max(known, default=ModelConfig.max_seq_len)


def token_ids(config: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """The special tokens of the data's tokenizer, by Hugging Face's names."""
    tokenizer = find(config, "dataset", "tokenizer") or find(config, "tokenizer") or {}
    ids = {key: find(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if odd := odd_ids(ids):
        raise ValueError(f"{where}: {'; '.join(odd)}")
    return ids


def train(config: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """The losses of the routers, as options of `TrainConfig`; none without experts.

    Raises:
      ValueError: if they are taken in a way that olmo_jax has not.
    """
    moe = find(config, "model", "block", "feed_forward_moe")
    if not model.n_experts or moe is None:
        return {}
    Fields(moe, f"{where}: model.block.feed_forward_moe").expect(
        "lb_loss_granularity", "local_batch", default="local_batch"
    )
    # The sum over layers of what ours is the mean of.
    scale = 1.0 if moe.get("scale_loss_by_num_layers", True) else model.n_layers
    weights = {"load_balancing_loss": moe.get("lb_loss_weight", 0.01)}
    weights["router_z_loss"] = moe.get("z_loss_weight")
    for name, weight in weights.items():
        if weight is not None and not isinstance(weight, (int, float)):
            raise ValueError(f"{where}: {name} is {reprlib.repr(weight)}, need a number")
    known = {name: scale * w for name, w in weights.items() if w}  # 0 and None: none
    return {"router_loss_form": "olmo_core"} | known


def optim(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The optimizer's options in our words; None for those that are not said.

    Raises:
      ValueError: if olmo_jax has no such optimizer.
    """
    options = find(config, "train_module", "optim") or find(config, "optim") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: optim is {reprlib.repr(options)}, need a group of options")
    name = str(options.get("_CLASS_", "AdamWConfig")).rpartition(".")[2]
    if name not in OPTIMIZERS:
        raise ValueError(f"{where}: the optimizer is {name}; olmo_jax has AdamW and SkipStepAdamW")
    betas = options.get("betas") or [None, None]
    if not isinstance(betas, list) or len(betas) != 2:
        raise ValueError(f"{where}: optim.betas is {reprlib.repr(betas)}, need two numbers")
    return {
        "name": OPTIMIZERS[name],
        "lr": options.get("lr"),
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": options.get("eps"),
        "weight_decay": options.get("weight_decay"),
        "skip_window": Fields(options, f"{where}: optim").number(
            "rolling_interval_length", int, 128, MOST
        ),
        "skip_sigma": options.get("sigma_factor"),
    }
