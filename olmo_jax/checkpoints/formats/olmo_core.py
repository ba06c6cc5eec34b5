"""Checkpoints of OLMo-core: `config.json`, `model_and_optim/` and the trainer's `train/rank0.pt`.

Written by OLMo-core 1 to 3, with and without optimizer state. Sources: OLMo-core
train/checkpoint.py, distributed/checkpoint/, optim/adamw.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from olmo_jax import files
from olmo_jax.checkpoints import names
from olmo_jax.checkpoints.formats import folders, olmo_core_config, resume, stacked
from olmo_jax.checkpoints.formats.distcp import Distributed
from olmo_jax.checkpoints.formats.fields import find
from olmo_jax.checkpoints.formats.folders import SourceFolder
from olmo_jax.checkpoints.formats.stacked import Stacked, is_same
from olmo_jax.checkpoints.formats.torch_files import Archive

STATE, TRAINER = "model_and_optim/", "train/rank0.pt"
PREFIXES = ("model.", "", "module.", "model.module.")  # of parameters; later ones are rarer
MOMENTS = {"mu": "exp_avg", "nu": "exp_avg_sq"}


def recognises(src: str) -> bool:
    """Whether this is a folder of OLMo-core."""
    folder = folders.open(src)
    return folder.has("config.json") and _state(folder) is not None


def _state(folder: SourceFolder) -> str | None:
    """Where the arrays are: in a folder of their own, or (weights only) beside the config."""
    return next((at for at in (STATE, "") if folder.has(f"{at}.metadata")), None)


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
    where = f"{folder.name.rstrip('/')}/config.json"
    config = files.json_object(folder.read("config.json").tobytes(), where)
    model, is_fused = olmo_core_config.read(config, where)
    stored = Distributed(folder, _state(folder) or "")
    weights = Stacked(model, is_remote=isinstance(folder, folders.Remote))
    rows = names.rows(model, "OLMo-core")
    if is_fused:
        part = {"w_q": 0, "w_k": 1, "w_v": 2}
        rows = [_fused(row, part) for row in rows]
    prefix = next((p for p in PREFIXES if f"{p}embeddings.weight" in stored.shapes), PREFIXES[0])
    own = [
        key
        for key in stored.shapes
        if key.startswith(prefix) and not key.startswith(("optim.", "model_buffer."))
    ]
    n_tensors = len(own)
    if model.tie_embeddings:
        own = _without_second_table(stored, prefix, own)
    weights.add("params/", stored, rows, lambda key: prefix + key, own)
    if optimizer:
        _add_optimizer(weights, stored, rows, config, where)
        _add_trainer(weights, folder, config, where)
    weights.meta |= {
        "token_ids": olmo_core_config.token_ids(config, where),
        "dtype": stacked.dtype(weights.leaves),
    }
    n_files = len(stored.files)
    weights.line = f"OLMo-core, {n_tensors} tensors in {n_files} file{'s' * (n_files != 1)}"
    if optimizer:
        weights.line += f", with the optimizer after {weights.meta['step']:,} steps"
        if weights.meta["config"]["optim"]["freeze_adam_step"]:
            weights.line += "; Adam's step stood still: go on with optim.freeze_adam_step=True"
    return weights


def _without_second_table(stored: Distributed, prefix: str, own: list[str]) -> list[str]:
    """The keys but for the head of a tied model, which is saved too and must be the embedding."""
    embed, head = f"{prefix}embeddings.weight", f"{prefix}lm_head.w_out.weight"
    if head in stored.shapes and not is_same(stored, embed, head):
        raise ValueError(
            f"{stored.where}: tie_word_embeddings is set, but {embed} and {head} differ"
        )
    return [key for key in own if key != head]


def _fused(row: names.Row, part: Mapping[str, int]) -> names.Row:
    """The row of a model whose q, k and v are rows of one matrix."""
    name = row.key.split(".")[-2]
    if name not in part:
        return row
    return row._replace(key=row.key.replace(name, "w_qkv"), part=part[name])


# --- optimizer and trainer ------------------------------------------------------------------------


def _add_optimizer(
    weights: Stacked,
    stored: Distributed,
    rows: list[names.Row],
    config: Mapping[str, Any],
    where: str,
) -> None:
    """Moments and Adam's step. OLMo-core does not save the history of its skipping optimizer."""
    optim = olmo_core_config.optim(config, where)
    keys = [key for key in stored.shapes if key.startswith("optim.state.")]
    if not keys:
        raise ValueError(f"{stored.where} holds weights only: there is no optim.state")
    kinds = {theirs: [k for k in keys if k.endswith(f".{theirs}")] for theirs in MOMENTS.values()}
    for ours, theirs in MOMENTS.items():
        form = f"optim.state.{{}}.{theirs}".format
        weights.add(f"opt_state/{ours}/", stored, rows, form, kinds[theirs], np.float32)
    steps = [key for key in keys if key.endswith(".step")]
    if left := set(keys).difference(steps, *kinds.values()):
        raise ValueError(f"{stored.where}: {min(left)} is no state of Adam")
    count = resume.count(stored.scalars(steps), stored.where)
    weights.add_value("opt_state/count", count)
    if optim["name"] == "skip_step_adamw":
        for name, value in resume.fresh_history(optim["skip_window"]).items():
            weights.add_value(f"opt_state/history/{name}", value)


def _add_trainer(
    weights: Stacked, folder: SourceFolder, config: Mapping[str, Any], where: str
) -> None:
    """Finished steps and the place in the data, from the first process' state."""
    state: Any = {}
    step = count = int(weights.read("opt_state/count"))
    if folder.has(TRAINER):
        archive = Archive(folder, TRAINER, lenient=True)
        state, step = archive.tree, find(archive.tree, "global_step")
        step = int(resume.step(step, archive.where))
    elif not step:
        raise FileNotFoundError(f"{folder.name}: {TRAINER}, which has the step, is missing")
    weights.add_value("step", np.asarray(step, np.int32))
    loader = find(state, "data_loader")
    read, seq_len = find(loader, "tokens_processed"), find(loader, "sequence_length")
    seq_len = seq_len or find(config, "dataset", "sequence_length") or weights.model.max_seq_len
    seq_len = max(1, resume.whole(seq_len, "sequence_length", f"{folder.name}/{TRAINER}"))
    optim = olmo_core_config.optim(config, where) | {"freeze_adam_step": bool(step) and not count}
    train = olmo_core_config.train(config, weights.model, where)
    known = resume.config(weights.model, seq_len, "core", optim, train, where)
    weights.meta |= {"step": step, "config": known}
    epoch = find(loader, "epoch") or find(state, "epoch")
    tokens = find(state, "global_train_tokens_seen")
    if None not in (read, epoch, tokens):
        place = {"epoch": epoch, "tokens_processed": read, "global_train_tokens_seen": tokens}
        for name, value in place.items():
            resume.whole(value, name, f"{folder.name}/{TRAINER}")
        weights.meta["position"] = {"epoch": epoch, "row": read // seq_len, "tokens": tokens}
