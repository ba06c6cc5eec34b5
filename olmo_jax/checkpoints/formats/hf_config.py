"""Hugging Face's `config.json` as our ModelConfig, and back.

Whatever is read has a place here or is refused by name: a field that is passed over is how a
converted model becomes gibberish. Whatever is written is explicit, since defaults differ between
models and between versions of transformers.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from olmo_jax.checkpoints.formats import hf_rope
from olmo_jax.checkpoints.formats.fields import LARGEST, MOST, number, odd_ids
from olmo_jax.checkpoints.formats.hf_rope import KINDS, ConfigValues
from olmo_jax.config.changes import shortest
from olmo_jax.config.model import ModelConfig

# What the architectures say without a field in config.json. transformers: models/olmo*/.
# No architecture there computes with anything else.
OTHERWISE = (("router", "token_choice"), ("router_bias_gamma", None), ("dense_layers", ()))
FAMILIES: dict[str, ConfigValues] = {
    "Olmo": {
        "norm": "nonparametric",
        "norm_position": "before",
        "norm_eps": 1e-5,
        "qk_norm": "none",
    },
    "Olmo2": {"norm": "rms", "norm_position": "after", "qk_norm": "full", "clip_qkv": None},
    "Olmo3": {"norm": "rms", "norm_position": "after", "qk_norm": "full", "clip_qkv": None},
    # It clips after the QK-norm and we before, as OLMoE's trainer: no released model clips.
    "Olmoe": {"norm": "rms", "norm_position": "before", "qk_norm": "full", "clip_qkv": None},
    "FlexOlmo": {"norm": "rms", "norm_position": "after", "qk_norm": "full", "clip_qkv": None},
}
NOT_YET = ("OlmoHybrid",)  # known, but not in our model
MODEL_TYPES = {"FlexOlmo": "flex_olmo", "OlmoHybrid": "olmo_hybrid"}  # others: in small letters

# Theirs -> ours, and in which families.
RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
_EXPERTS = {
    "rms_norm_eps": "norm_eps",
    "num_experts": "n_experts",
    "num_experts_per_tok": "n_experts_per_token",
    "norm_topk_prob": "normalize_expert_weights",
}
NUMBERS = {"norm_eps": float, "clip_qkv": float, "normalize_expert_weights": bool}  # others: int
DEFAULTED = {  # and their kinds
    "tie_word_embeddings": ("tie_embeddings", bool),
    "initializer_range": ("init_std", float),
    "num_key_value_heads": ("n_kv_heads", int),
    "head_dim": ("head_dim", int),
}
QUANTIZED = "quantization_config"
BUILT_ON_OTHERS = ("layer_types", "rope_parameters", "rope_scaling", "rope_theta")
OPTIONAL = ("clip_qkv", "norm_topk_prob")  # off where they are missing
OWN = {
    "Olmoe": _EXPERTS,
    "FlexOlmo": _EXPERTS,
    "Olmo": {"clip_qkv": "clip_qkv"},
    "Olmo2": {"rms_norm_eps": "norm_eps"},
    "Olmo3": {"rms_norm_eps": "norm_eps", "sliding_window": "window"},
}
# The only values that OLMo models have.
FIXED: ConfigValues = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
}
TOKEN_IDS: ConfigValues = {"bos_token_id": None, "eos_token_id": 50_279, "pad_token_id": 1}
# Other names of tokens, written where they were.
OTHER_IDS = frozenset(
    "sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id bad_words_ids"
    " suppress_tokens begin_suppress_tokens tokenizer_class".split()
)
# What the weights and the function do not depend on: book-keeping, and options of generation that
# older versions of transformers kept here.
FREE = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path
    router_aux_loss_coef output_router_logits
    use_cache output_attentions output_hidden_states return_dict is_decoder torchscript
    use_bfloat16 tf_legacy_loss pruned_heads id2label label2id num_labels problem_type
    finetuning_task prefix task_specific_params tokenizer_class sep_token_id
    decoder_start_token_id cross_attention_hidden_size _attn_implementation
    _attn_implementation_autoset attn_implementation max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens unsloth_fixed unsloth_version
    """.split()
)


# --- reading --------------------------------------------------------------------------------------


def family(config: Mapping[str, Any], where: str) -> str:
    """The family of a config: Olmo, Olmo2, Olmo3, Olmoe or FlexOlmo.

    Raises:
      ValueError: if it is another architecture, or two fields name two.
    """
    known = [*FAMILIES, *NOT_YET]
    by_type = {MODEL_TYPES.get(name, name.lower()): name for name in known}
    architectures, kind = config.get("architectures") or [], config.get("model_type")
    found = {by_type.get(kind, kind)} if isinstance(kind, str) else set()
    if is_list := isinstance(architectures, list):
        found |= {str(name).removesuffix("ForCausalLM") for name in architectures}
    if not is_list or not isinstance(kind, str | None) or len(found) != 1 or not found <= {*known}:
        named = f"architectures={reprlib.repr(architectures)}, model_type={reprlib.repr(kind)}"
        need = ", ".join(f"{name}ForCausalLM" for name in FAMILIES)
        raise ValueError(f"{where}: {named} is none of {need}")
    (name,) = found
    if name in NOT_YET:
        raise ValueError(f"{where}: {name}ForCausalLM is known, but this version has no such model")
    return str(name)


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      config: its content.
      where: the file, for errors.
    Raises:
      ValueError: with every field that is missing, unknown, or at odds with another.
    """
    name = family(config, where)
    rest = {key: value for key, value in config.items() if key not in FREE | TOKEN_IDS.keys()}
    problems: list[str] = []
    fields = dict(FAMILIES[name])
    for key, ours in (RENAMED | OWN[name]).items():
        value = rest.pop(key, None)
        if value is not None:
            most = MOST if ours in ("n_layers", "n_experts") else LARGEST
            fields[ours] = number(key, value, NUMBERS.get(ours, int), problems, most)
        elif key not in OPTIONAL:
            problems.append(f"{key} is missing")
    if not problems and fields.get("n_experts_per_token", 0) > fields.get("n_experts", 0):
        chosen, there = fields["n_experts_per_token"], fields["n_experts"]
        problems.append(f"num_experts_per_tok={chosen} is above num_experts={there}")
    heads = {"n_kv_heads": fields.get("n_heads")}
    if not problems:
        heads["head_dim"] = fields["d_model"] // fields["n_heads"]
    for key, (ours, kind) in DEFAULTED.items():
        default = heads.get(ours, getattr(ModelConfig, ours))
        value = rest.pop(key, None)
        fields[ours] = default if value is None else number(key, value, kind, problems)
    problems += odd_ids({key: config.get(key) for key in TOKEN_IDS})
    if not problems and fields["n_heads"] % fields["n_kv_heads"]:
        problems.append(
            f"num_attention_heads={fields['n_heads']} is no multiple of"
            f" num_key_value_heads={fields['n_kv_heads']}"
        )
    if not problems and fields["head_dim"] % 2:
        problems.append(f"head_dim={fields['head_dim']}: rotary embedding needs an even one")
    if problems:  # what builds on those fields cannot be read
        rest = {key: value for key, value in rest.items() if key not in BUILT_ON_OTHERS}
    else:
        _add_layers(fields, rest.pop("layer_types", None), name, problems)
        fields |= hf_rope.read(rest, fields, name, problems)
    for key, need in FIXED.items():
        if (value := rest.pop(key, need)) not in (need, None):
            problems.append(f"{key}={reprlib.repr(value)}, but OLMo models have {need!r}")
    problems += [
        f"{key}={reprlib.repr(value)} is no field of {name}ForCausalLM that is known here"
        + (": take the weights before they were quantized" if key == QUANTIZED else "")
        for key, value in rest.items()
        if value is not None
    ]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return ModelConfig(**fields)


def _add_layers(fields: ConfigValues, types: Any, name: str, problems: list[str]) -> None:
    n_layers = fields["n_layers"]
    if types is None and name == "Olmo3":  # as transformers fills it in
        types = [
            "full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(n_layers)
        ]
    if types is None:
        return
    if not isinstance(types, list) or not types:
        problems.append(f"layer_types={reprlib.repr(types)}: need a list with one of"
                        f" {', '.join(KINDS)} for each layer")  # fmt: skip
        return
    unknown = sorted({str(kind) for kind in types} - KINDS.keys())
    if name != "Olmo3" and any(kind != "full_attention" for kind in types):
        problems.append(f"layer_types={reprlib.repr(types)} is no field of {name}ForCausalLM")
    elif unknown:
        problems.append(f"layer_types has {', '.join(unknown)}; known: {', '.join(KINDS)}")
    elif len(types) != n_layers:
        problems.append(f"layer_types has {len(types)} entries for {n_layers} layers")
    elif name == "Olmo3":
        fields["layer_types"] = shortest([KINDS[kind] for kind in types])


def token_ids(config: Mapping[str, Any]) -> ConfigValues:
    """The special tokens of a config.json; what it leaves out is what transformers fills in."""
    others = {key: config[key] for key in config if key in OTHER_IDS and config[key] is not None}
    return {key: config.get(key, default) for key, default in TOKEN_IDS.items()} | others


# --- writing --------------------------------------------------------------------------------------


def family_of(model: ModelConfig) -> str:
    """The architecture that computes what a model of ours does.

    Raises:
      ValueError: if there is none.
    """
    slides = "sliding" in model.layer_types or model.window is not None
    name = "Olmo" if model.norm == "nonparametric" else "Olmo3" if slides else "Olmo2"
    if model.n_experts:
        name = "Olmoe" if model.norm_position == "before" else "FlexOlmo"
    clashes = [
        f"{key}={getattr(model, key)!r} (need {need!r})"
        for key, need in FAMILIES[name].items()
        if getattr(model, key) != need
    ]
    if slides and name != "Olmo3":
        clashes.append("layer_types with sliding layers (need full ones)")
    clashes += [
        f"{key}={getattr(model, key)!r} (need {need!r})"
        for key, need in OTHERWISE
        if getattr(model, key) != need
    ]
    if clashes:
        raise ValueError(
            f"no Hugging Face model is like this one: {name} with {', '.join(clashes)}"
        )
    return name


def write(model: ModelConfig, ids: Mapping[str, Any], dtype: str) -> ConfigValues:
    """The config.json of a model, which transformers 4.57 and 5 read as the same.

    Args:
      model: rows of padding are left out, they never score.
      ids: of special tokens, as `token_ids` gives them.
      dtype: of the weights in the files.
    Raises:
      ValueError: if Hugging Face has no such model.
    """
    name = family_of(model)
    rope = hf_rope.write(model)
    fields: ConfigValues = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": MODEL_TYPES.get(name, name.lower()),
        **{key: getattr(model, ours) for key, ours in (RENAMED | OWN[name]).items()},
        "num_key_value_heads": model.n_kv_heads,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "use_cache": True,
        # The older form, in which the released models are written, and that of transformers 5.
        "rope_theta": model.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}
        if model.yarn_factor is not None
        else None,
        "rope_parameters": rope,
        **TOKEN_IDS,
        **{key: value for key, value in ids.items() if key in TOKEN_IDS.keys() | OTHER_IDS},
        "dtype": dtype,
    }
    if model.n_experts:
        fields |= {"router_aux_loss_coef": 0.01, "output_router_logits": False}
    if model.head_dim * model.n_heads != model.d_model:
        fields["head_dim"] = model.head_dim
    if name == "Olmo3":
        theirs = {ours: kind for kind, ours in KINDS.items()}
        fields["layer_types"] = [theirs[kind] for kind in model.layer_kinds]
        plain = {"rope_type": "default", "rope_theta": model.rope_theta}
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain}
    return fields
