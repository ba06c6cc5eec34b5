"""Where a run starts: what depends on the machine, on its last checkpoint, or on another run's."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import compilation_cache  # in public it cannot be read
from jax.sharding import Mesh

from olmo_jax import files
from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats import native
from olmo_jax.config import changes
from olmo_jax.config.model import LANES
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config
from olmo_jax.config.text import to_dict
from olmo_jax.data.source import Position, Source
from olmo_jax.kernels import attention
from olmo_jax.parallel import processes, sharding
from olmo_jax.parallel.processes import say
from olmo_jax.records import jsonl
from olmo_jax.training.optim import ROUTER_BIAS
from olmo_jax.training.origin import Origin
from olmo_jax.training.state import (
    TrainState,
    abstract_state,
    init_opt_state,
    init_state,
    replicated,
)

KEPT_FROM_S = 0.5  # a program that is compiled in less is not worth a file
# Files that are a tokenizer; others say how it is used.
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}
_read_compiled = compilation_cache.get_executable_and_time


def resolve(config: Config) -> Config:
    """The config with what depends on this machine filled in: fp32 on a CPU."""
    if config.compute.compilation_cache is not None:
        _keep_compiled(config.compute.compilation_cache)
    if jax.default_backend() == "cpu" and config.compute.dtype != "float32":
        say("compute.dtype: float32 on a CPU, where bfloat16 is far slower")
        config = _replace(config, "compute", dtype="float32")
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not files.path(tokenizer).exists():
        raise FileNotFoundError(f"config.data.tokenizer: no such file: {tokenizer}")
    return config


def _keep_compiled(name: str) -> None:
    try:
        folder = files.path(name)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:  # slower starts are no reason to end a run
        reason = getattr(error, "strerror", None) or error
        say(f"compute.compilation_cache: cannot write {files.brief(name)}: {reason}")
        return
    say(f"compilation cache: {folder}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM_S)
    compilation_cache.get_executable_and_time = _compiled


def _compiled(key: str, *arguments: Any) -> Any:
    """JAX's own function, but an entry that a kill tore is removed.

    JAX warns of it at every start, and never writes it anew.
    """
    try:
        return _read_compiled(key, *arguments)
    except OSError:  # of the disk
        raise
    except Exception as error:
        entry = files.path(jax.config.jax_compilation_cache_dir) / f"{key}-cache"  # type: ignore
        entry.unlink(missing_ok=True)
        why = storage.cause(error)
        say(f"compute.compilation_cache: removed {entry.name}, which is damaged ({why})")
        return None, None


def _replace(config: Config, part: str, **changes: Any) -> Config:
    changed = dataclasses.replace(getattr(config, part), **changes)
    return dataclasses.replace(config, **{part: changed})


def check_attention(config: Config, mesh: Mesh) -> None:
    """Say what attention computes with on these devices.

    Raises:
      ConfigError: if they cannot compute it so.
    """
    impl, ways = config.compute.attention, mesh.shape["context"]
    has_documents = config.data.document_mask != "none"
    of_kernel = config.compute.dtype, config.model.head_dim, has_documents
    target = mesh.devices.flat[0], ways > 1
    if impl == "auto":
        impl = attention.choose(*target, *of_kernel)
        say(f"attention: {impl}" + (f" in a ring of {ways}" if ways > 1 else ""))
    elif impl != "reference" and (found := attention.obstacle(impl, *target, *of_kernel)):
        raise ConfigError([f"config.compute.attention={impl}: {found}"])
    seq_lens = {"data": config.data.seq_len, "eval": config.eval.seq_len}
    problems = [
        f"config.{part}.seq_len={seq} over 2 x mesh.context={2 * ways} is chunks of"
        f" {seq // (2 * ways)}, on a TPU they are multiples of {LANES}; use a multiple of"
        f" {2 * ways * LANES}, a smaller mesh.context or compute.attention=blocked"
        for part, seq in seq_lens.items()
        if impl == "pallas" and ways > 1 and seq is not None and seq % (2 * ways * LANES)
    ]
    if problems:
        raise ConfigError(problems)


def first_step(config: Config, origin: Origin | None) -> int:
    """Finished steps; says where they come from and what changed."""
    if origin is None:
        return 0
    say(origin.line)
    found = changes.between(origin.meta["config"], to_dict(config))
    changes.refuse(found, config.checkpoint.allow_changes, origin.parts)
    if "step" not in origin.parts:
        return 0
    shown = [c for c in found if c.key not in changes.RECORDS]
    for change in shown if origin.is_resume else ():
        say(f"changed since the checkpoint: {change}")
    return origin.step()


def position(origin: Origin | None, data: Source) -> Position:
    """Where the run stands in its data; says if they are not those of before."""
    if origin is None or "step" not in origin.parts:
        return data.start()
    if origin.meta.get("fingerprint") not in (None, data.fingerprint):
        say(
            "changed since the checkpoint: names, sizes or ids of the token files; the data comes"
            " in another order from here on"
        )
    return origin.position(data)


def with_loss_ranks(config: Config, mesh: Mesh) -> Config:
    """The config with the number of ranks that the loss depends on, for checkpoints to hold."""
    t = config.train
    if t.loss_normalization != "per_rank_tokens" or t.loss_ranks is not None:
        return config
    ranks = sharding.data_parallel_ways(mesh)
    say(f"train.loss_ranks: {ranks}, the data-parallel ways of this mesh; set it to keep the loss"
        " the same on another")  # fmt: skip
    return _replace(config, "train", loss_ranks=ranks)


def initial_state(config: Config, mesh: Mesh, origin: Origin | None, first: int) -> TrainState:
    """The state after `first` steps: fresh, or with the parts that the origin gives."""
    if origin is None:
        return init_state(config.model, config.optim, mesh, config.train.seed)
    new = ()
    if config.model.router_bias_gamma is not None and not _has_biases(origin):
        say("model.router_bias_gamma: biases of the routers begin at 0, the checkpoint has none")
        new = (ROUTER_BIAS,)
    loaded = origin.load(abstract_state(config.model, config.optim, mesh), new)
    if "opt_state" not in loaded:  # never hold fresh and loaded parameters at once
        loaded["opt_state"] = init_opt_state(config.model, config.optim, mesh, loaded["params"])
    if "step" not in loaded:
        loaded["step"] = replicated(mesh, np.int32(first))
    return TrainState(**loaded)


def _has_biases(origin: Origin) -> bool:
    return origin.meta["model"].get("router_bias_gamma") is not None


class Kept(NamedTuple):
    """What all checkpoints of a run hold beside its state; in processes but 0, that is nothing."""

    meta: dict[str, Any]  # added to what `checkpoint.meta` gives
    carried: dict[str, bytes]  # files by name


def kept(config: Config, origin: Origin | None) -> Kept:
    """Special tokens and files of the checkpoint that a run starts from, and `data.tokenizer`.

    Where these are two tokenizers, nothing that belongs to the first is kept. `data.eos_id` is
    where documents end, and replaces no special token.

    Raises:
      ValueError, OSError: if a file is damaged, or cannot be read.
    """
    meta: dict[str, Any] = {}
    carried: dict[str, bytes] = {}

    def read() -> None:
        if origin is not None:
            said = origin.meta
            ids = native.token_ids(said)
            # Where nothing is said, a run that goes on may know better by now.
            follows = origin.is_resume or ids.get("eos_token_id") is None
            if "token_ids" in said or not follows:
                meta["token_ids"] = ids
            carried.update(origin.carried())
        if config.data.tokenizer is None:
            return
        path = files.path(config.data.tokenizer)
        name = f"tokenizer{'.model' if path.suffix == '.model' else '.json'}"
        own = path.read_bytes()
        if origin is not None and carried.keys() & VOCABULARIES and carried.get(name) != own:
            gone = ", ".join(sorted(carried))
            say(f"data.tokenizer: not the one of {origin.place}, so its special tokens and files"
                f" are not kept: {gone}")  # fmt: skip
            carried.clear()
            meta.clear()
        carried[name] = own

    processes.from_process_0(read)
    return Kept(meta, carried)


def write_config(config: Config) -> None:
    """Write `config.json`, whole or not at all.

    Raises:
      OSError: if the folder cannot be written.
      ValueError: if the file is there and somebody else's (OSError in processes but 0).
    """
    folder = files.path(config.run_dir)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_a_runs_config(folder / "config.json"):
            raise ValueError(
                f"config.dir: {folder / 'config.json'} is not the config of a run of olmo_jax and"
                " is not overwritten; set another config.dir"
            )
        new = folder / "config.json.new"
        new.write_bytes(json.dumps(to_dict(config), indent=2).encode())
        new.replace(folder / "config.json")

    try:
        processes.from_process_0(write)
    except OSError as error:
        raise OSError(f"config.dir: cannot write {folder}: {error}") from error


def _is_a_runs_config(path: files.Path) -> bool:
    """Whether it is one, or nothing: a folder of Hugging Face has a file of that name too."""
    if not path.exists():
        return True
    try:
        found = files.json_object(path.read_bytes(), str(path))
    except ValueError:
        return False
    return found.keys() >= {"model", "optim", "checkpoint"}


def is_complete(config: Config, last: int) -> bool:
    """Whether a run that has trained its last step has its last evaluation too."""
    return not (config.eval.paths and config.eval.at_finish and lacks_eval(config, last))


def lacks_eval(config: Config, step: int) -> bool:
    """Whether a run was stopped between the checkpoint of a step and its evaluation."""

    def read() -> bool:
        folder = files.path(config.run_dir)
        names = jsonl.read(folder).get(step, {}) if (folder / jsonl.NAME).exists() else {}
        is_recorded = step == 0 or any(name.startswith("train/") for name in names)
        return is_recorded and not any(name.startswith("eval/") for name in names)

    return processes.from_process_0(read)
