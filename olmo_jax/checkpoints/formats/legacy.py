"""Checkpoints of OLMo's first trainer: `config.yaml` with `model.pt` or `model.safetensors`.

Unsharded ones, as released for OLMo 1, 0424, 0724, OLMoE and OLMo 2 up to 13B; the optimizer is in
`optim.pt`, the trainer in `train.pt`. Sources: OLMo olmo/config.py, model.py, checkpoint.py,
safetensors_util.py.
"""

import base64
import functools
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from olmo_jax.checkpoints import names
from olmo_jax.checkpoints.formats import folders, resume, safetensors, stacked
from olmo_jax.checkpoints.formats.fields import MOST, Fields, odd_ids, real
from olmo_jax.checkpoints.formats.folders import SourceFolder
from olmo_jax.checkpoints.formats.stacked import Shapes, Stacked, narrowed
from olmo_jax.checkpoints.formats.torch_files import Archive, Tensor, unpickle
from olmo_jax.checkpoints.weights import Index
from olmo_jax.config.model import ModelConfig

CONFIG = "config.yaml"
FSDP = "_fsdp_wrapped_module."  # left in names by old versions
ROUTER_LOSSES = {
    "load_balancing_loss": "moe_loss_weight",
    "router_z_loss": "moe_zloss_weight",
}
TRAINERS = ("train.pt", "other.pt")  # newer, older


def recognises(src: str) -> bool:
    """Whether this is a folder of OLMo's first trainer."""
    return folders.open(src).has(CONFIG)


def read(src: str, *, optimizer: bool = False) -> Stacked:
    """The checkpoint in a folder.

    Args:
      src: path or `https://` address of a step's folder.
      optimizer: whether the moments, the step and the place in the data are wanted.
    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if one is damaged, does not fit the config, or has what olmo_jax has not.
    """
    folder = folders.open(src)
    where = f"{folder.name.rstrip('/')}/{CONFIG}"
    try:
        config = yaml.safe_load(folders.text(folder, CONFIG))
    except OSError:
        raise
    except Exception as error:  # PyYAML has no common base of what its types make of odd text
        text = reprlib.repr(" ".join(str(error).split()))
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {text}") from None
    model = read_config(config, where)
    kinds = ("model.safetensors", "model.pt")  # in OLMo's own order
    file = next((file for file in kinds if folder.has(file)), None)
    if file is None:
        raise FileNotFoundError(f"{folder.name}: need {' or '.join(kinds)}, found neither")
    state = _File(folder, file)
    store = _Store(state, state.tree)
    weights = Stacked(model, is_remote=isinstance(folder, folders.Remote))
    rows = names.rows(model, "OLMo")
    weights.add("params/", store, rows, lambda key: key, store.shapes)
    if optimizer:
        _add_optimizer(weights, folder, rows, config, where)
        _add_trainer(weights, folder, config, where)
    ids = config["model"]
    token_ids = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if odd := odd_ids(token_ids):
        raise ValueError(f"{where}: {'; '.join(odd)}")
    weights.meta |= {"token_ids": token_ids, "dtype": stacked.dtype(weights.leaves)}
    weights.line = f"OLMo (config.yaml), {len(store.shapes)} tensors in {file}"
    if optimizer:
        weights.line += f", with the optimizer after {weights.meta['step']:,} steps"
    return weights


# --- config.yaml ----------------------------------------------------------------------------------


def read_config(config: Any, where: str) -> ModelConfig:
    """The model that a config.yaml builds.

    Args:
      config: its content.
      where: its name, for errors.
    Raises:
      ValueError: with the first option that olmo_jax has not, or does not know.
    """
    c = Fields(Fields(config, where).need("model"), f"{where}: model")
    d_model, n_heads = c.number("d_model", int, 768), c.number("n_heads", int, 12)
    n_kv_heads = c.number("n_kv_heads", int)
    if c.number("multi_query_attention", bool, False):
        n_kv_heads = n_kv_heads or 1
    c.expect("activation_type", "swiglu", default="swiglu")
    is_moe = c.expect("block_type", "sequential", "moe", default="sequential") == "moe"
    c.expect("block_group_size", 1, default=1)
    c.expect("alibi", False, default=False)
    c.expect("rope", True, default=False)
    c.expect("scale_logits", False, default=False)
    c.expect("embedding_layer_norm", False, default=False)
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        c.expect(name, 0.0, default=0.1)
    parts = _norm(c) | (_experts(c) if is_moe else {})
    width = c.number("mlp_hidden_size", int) or c.number("mlp_ratio", float, 4) * d_model
    c.ignore("mlp_ratio")
    vocab_size = c.number("vocab_size", int, 50_257)
    model = ModelConfig(
        **parts,
        vocab_size=c.number("embedding_size", int) or vocab_size,
        d_model=d_model,
        n_layers=c.number("n_layers", int, 12, MOST),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=d_model // n_heads,
        d_ff=int(width) // 2,  # theirs counts gate and up together
        max_seq_len=c.number("max_sequence_length", int, 1024),
        clip_qkv=c.number("clip_qkv", float),
        tie_embeddings=c.number("weight_tying", bool, True),
        rope_theta=c.number("rope_theta", float, 10_000.0),
        init="mitchell" if c.take("init_fn", "normal") == "mitchell" else "normal",
        init_std=c.number("init_std", float, 0.02),
        embed_init_std=c.number("emb_init_std", float),
    )
    c.ignore(
        "alibi_bias_max", "rope_full_precision", "flash_attention", "init_device",
        "init_cutoff_factor", "precision", "eos_token_id", "pad_token_id", "scale_emb_init",
    )  # fmt: skip
    c.done()
    return model


def _experts(c: Fields) -> dict[str, Any]:
    """The options of a mixture of experts (branch Muennighoff/MoE: olmo/config.py)."""
    c.expect("moe_dropless", True, default=True)
    for option in ("moe_shared_expert", "moe_interleave"):
        c.expect(option, False, default=False)
    c.ignore(
        "moe_mlp_impl", "moe_log_expert_assignment", "moe_capacity_factor", "moe_lbl_in_fp32",
        *ROUTER_LOSSES.values(),
    )  # fmt: skip
    return {
        "n_experts": c.number("moe_num_experts", int, 8, MOST),
        "n_experts_per_token": c.number("moe_top_k", int, 2),
    }


def _train(model: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of the routers; none without experts."""
    if model.get("block_type") != "moe":
        return {}
    weights = {name: model.get(theirs) for name, theirs in ROUTER_LOSSES.items()}
    weights["load_balancing_loss"] = model.get("moe_loss_weight", 0.1)
    known = {name: real(weight) for name, weight in weights.items() if weight}
    return {"router_loss_form": "olmoe"} | known


def _norm(c: Fields) -> dict[str, Any]:
    """The options of the norms: RMSNorm with weights, or LayerNorm without."""
    kind = c.expect("layer_norm_type", "rms", "default", "low_precision", "amd_compatible",
                    default="default")  # fmt: skip
    is_affine = c.number("layer_norm_with_affine", bool, True)
    has_qk_norm = c.number("attention_layer_norm", bool)
    has_bias = c.number("include_bias", bool, True)
    has_norm_bias = c.number("bias_for_layer_norm", bool, has_bias)
    if has_bias:
        raise ValueError(f"{c.where}.include_bias is True; olmo_jax has no biases")
    if is_affine != (kind == "rms") or (is_affine and has_norm_bias):
        raise ValueError(
            f"{c.where}: layer_norm_type {kind!r} with layer_norm_with_affine {is_affine} and"
            f" bias_for_layer_norm {has_norm_bias}; olmo_jax has RMSNorm with weights and LayerNorm"
            " without"
        )
    is_qk_affine = c.number("attention_layer_norm_with_affine", bool, True)
    if has_qk_norm and not (is_qk_affine and kind == "rms"):
        raise ValueError(f"{c.where}.attention_layer_norm: olmo_jax has only RMSNorm with weights")
    return {
        "norm": "rms" if is_affine else "nonparametric",
        "norm_position": "after" if c.number("norm_after", bool, False) else "before",
        "norm_eps": c.number("layer_norm_eps", float, 1e-5),
        "qk_norm": "full" if has_qk_norm else "none",
    }


# --- optimizer and trainer ------------------------------------------------------------------------


def _optimizer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    options = config.get("optimizer")
    return options if isinstance(options, Mapping) else {}


def _add_optimizer(
    weights: Stacked, folder: SourceFolder, rows: list[names.Row], config: Any, where: str
) -> None:
    """Moments and Adam's step of `optim.pt`."""
    name = _optimizer(config).get("name", "lionw")
    if name != "adamw":
        raise ValueError(f"{where}: the optimizer is {name}; of OLMo's, olmo_jax has only adamw")
    archive = _File(folder, "optim.pt")
    try:
        by_name = _by_name(archive.tree, archive.where)
        steps = {key: _number(archive, state.get("step")) for key, state in by_name.items()}
    except (LookupError, TypeError, AttributeError) as error:
        text = reprlib.repr(" ".join(str(error).split()))
        raise ValueError(f"{archive.where} is no state of an optimizer: {text}") from None
    for ours, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        tensors = {key: state[theirs] for key, state in by_name.items() if theirs in state}
        store = _Store(archive, tensors)
        weights.add(f"opt_state/{ours}/", store, rows, lambda key: key, store.shapes, np.float32)
    weights.add_value("opt_state/count", resume.count(steps, archive.where))


def _optim(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The optimizer's options in our words; what is not said is OLMo's default, not ours."""
    betas = options.get("betas") or (0.9, 0.95)
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(f"{where}: optimizer.betas is {reprlib.repr(betas)}, need two numbers")
    floats = {
        "lr": options.get("learning_rate", 1e-4),
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": options.get("eps", 1e-5),
        "weight_decay": options.get("weight_decay", 0.01),
    }
    return {"name": "adamw"} | {name: real(value) for name, value in floats.items()}


def _by_name(state: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """The state of each parameter by its name, which PyTorch itself has as a number."""
    groups = state["param_groups"]
    name_of: dict[Any, str] = {}
    for group in groups:
        keys = group["params"]
        known = group.get("param_names", keys)
        if len(known) != len(keys) or not all(isinstance(name, str) for name in known):
            raise ValueError(f"{where}: param_groups say no names of their params")
        name_of |= dict(zip(keys, (name.replace(FSDP, "") for name in known), strict=True))
    return {name_of[key]: value for key, value in state["state"].items()}


def _number(archive: "_File", value: Any) -> float:
    """A step, which is a tensor or, in old versions, a number."""
    if isinstance(value, Tensor) and math.prod(value.shape) == 1:
        return float(archive.read(value).item())
    if not isinstance(value, int | float | None):
        raise TypeError(f"its step is {reprlib.repr(value)}")
    return float(value or 0)


def _add_trainer(weights: Stacked, folder: SourceFolder, config: Any, where: str) -> None:
    """Finished steps and the place in the data."""
    file = next((file for file in TRAINERS if folder.has(file)), None)
    if file is None:
        raise FileNotFoundError(f"{folder.name}: {TRAINERS[0]}, which has the step, is missing")
    archive = Archive(folder, file, lenient=True)
    state = archive.tree if isinstance(archive.tree, Mapping) else {}
    step = resume.step(state.get("global_step"), archive.where)
    weights.add_value("step", step)
    seq_len, optim = weights.model.max_seq_len, _optim(_optimizer(config), where)
    train = _train(config["model"])
    known = resume.config(weights.model, seq_len, "legacy", optim, train, where)
    weights.meta |= {"step": int(step), "config": known}
    total = state.get("global_train_examples_seen")  # as older versions say, of one epoch
    rows = state.get("global_train_examples_seen_this_epoch", total)
    tokens = state.get("global_train_tokens_seen")
    if rows is not None and tokens is not None:
        place = {"epoch": state.get("epoch") or 0, "row": rows, "tokens": tokens}
        for name, value in place.items():
            resume.whole(value, name, archive.where)
        weights.meta["position"] = place


# --- files ----------------------------------------------------------------------------------------


class _File:
    """`model.pt`, `optim.pt`, or `model.safetensors` as OLMo writes it."""

    def __init__(self, folder: SourceFolder, file: str):
        self.where = f"{folder.name.rstrip('/')}/{file}"
        if file.endswith(".pt"):
            archive = Archive(folder, file)
            self.tree, self.read = archive.tree, archive.read
            return
        entries = safetensors.entries(folder, file)
        self.read = lambda entry, rows=slice(None): safetensors.load(folder, entry, rows)
        self.tree: Any = {self._key(name): entry for name, entry in entries.items()}

    def _key(self, name: str) -> str:
        """The key that OLMo hides in base64 of a pickle: ((key,), whether the value is pickled)."""
        if "." in name:  # as everybody else writes it
            return name
        try:
            pickled = base64.urlsafe_b64decode(name)
        except ValueError:
            raise ValueError(f"{self.where}: {name} is no name of a parameter") from None
        path, _ = unpickle(pickled, f"{self.where}: {name}")
        return ".".join(map(str, path))


class _Store:
    """Tensors of a file by key, as `Stacked` reads them."""

    def __init__(self, file: _File, tensors: Mapping[str, Any]):
        self.where = file.where
        self._file = file
        if not isinstance(tensors, Mapping) or not all(
            isinstance(key, str) and isinstance(tensor, Tensor | safetensors.Entry)
            for key, tensor in tensors.items()
        ):
            raise ValueError(f"{file.where} holds more than tensors by name")
        self._tensors = {key.replace(FSDP, ""): tensor for key, tensor in tensors.items()}
        self.shapes: Shapes = {k: (tuple(t.shape), t.dtype) for k, t in self._tensors.items()}

    def read(self, key: str, index: Index) -> np.ndarray:
        """A part of a tensor."""
        load = functools.partial(self._file.read, self._tensors[key])
        return narrowed(load, index, *self.shapes[key])
