"""Where a run starts from: its own last checkpoint, or another one, of whatever kind."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax import files
from olmo_jax.checkpoints import layout, storage
from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.checkpoints.derived import Padded
from olmo_jax.checkpoints.formats import native
from olmo_jax.checkpoints.formats.open import is_foreign, open_weights
from olmo_jax.checkpoints.load import read_leaf
from olmo_jax.checkpoints.weights import NoOptimizerError, Weights
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.options import INT32
from olmo_jax.config.renamed import modern
from olmo_jax.config.text import to_dict
from olmo_jax.config.training import CheckpointConfig, OptimConfig
from olmo_jax.data.source import NoPlaceError, Position, Source
from olmo_jax.parallel import processes
from olmo_jax.parallel.processes import say
from olmo_jax.training.optim import ROUTER_BIAS
from olmo_jax.training.state import (
    TrainState,
    abstract_state,
    init_opt_state,
    init_state,
    replicated,
)

# Files that are a tokenizer; others say how it is used.
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}
NEW_STATE = "config.checkpoint.load_optimizer=False starts with a new optimizer state"


@dataclass(frozen=True)
class Origin:
    """Where a run starts from."""

    place: Any  # the folder of a checkpoint of ours, or the name of another
    parts: tuple[str, ...]  # of the state that are taken from there
    is_resume: bool  # the run's own checkpoint: it continues
    line: str  # says which was taken and why
    weights: Weights | None = None  # of a checkpoint that is not ours

    def load(self, state: Any, new: Sequence[str] = ()) -> dict[str, Any]:
        """The taken parts of the state by name.

        Args:
          state: the abstract TrainState, with shardings.
          new: ends of the names of leaves that the checkpoint has not: they become 0.
        Raises:
          ValueError: if a leaf is missing, left over, damaged, or of another shape or dtype.
        """
        wanted = {part: getattr(state, part) for part in self.parts}
        try:
            if self.weights is not None:
                return _read(self.weights, wanted, new)
            return storage.restore(self.place, wanted, partial=not self.is_resume, new=new)
        except ValueError as error:
            others_fit = "opt_state" in str(error) and "leaf params/" not in str(error)
            if self.is_resume or not others_fit:
                raise
            raise ValueError(f"{error}; {NEW_STATE}") from None

    @functools.cached_property
    def meta(self) -> Mapping[str, Any]:
        """What the checkpoint says beside its arrays; of another kind, in our words.

        Raises:
          ValueError: if that is not what a checkpoint says.
        """
        if self.weights is not None:
            model = {"model": to_dict(self.weights.model)}
            return {"config": model, **model, **self.weights.meta}
        found = layout.read_meta(self.place)
        for key in ("model", "config"):
            if not isinstance(found.get(key), Mapping):
                raise ValueError(f"{self.place}/meta.json has no {key}")
        if not isinstance(found.get("token_ids", {}), Mapping):
            raise ValueError(f"{self.place}/meta.json: token_ids is no group of values")
        return found

    def carried(self) -> dict[str, bytes]:
        """The files that lie beside the arrays, such as a tokenizer."""
        if self.weights is not None:
            return dict(self.weights.files)
        return {name: layout.read(self.place, name) for name in layout.files(self.place)}

    def step(self) -> int:
        """Steps that were finished there.

        Raises:
          ValueError: if the checkpoint does not say it.
        """
        step = self.meta.get("step")
        if type(step) is not int or not 0 <= step <= INT32:
            raise self._unplaced()
        return step

    def position(self, data: Source) -> Position:
        """The place in the data of the run.

        Raises:
          ValueError: if the checkpoint does not say it, or it is none in these data.
        """
        position, old = self.meta.get("position"), modern(self.meta["config"]).get("data")
        if not isinstance(position, Mapping) or not isinstance(old, Mapping):
            raise self._unplaced()
        try:
            return data.resume(position, old)
        except NoPlaceError:
            raise self._unplaced() from None

    def _unplaced(self) -> ValueError:
        where = self.place if self.weights is not None else f"{self.place}/meta.json"
        return ValueError(
            f"{where} has no step and place in the data; to start at the beginning:"
            " config.checkpoint.load_position=False"
        )


def find_origin(
    options: CheckpointConfig, model: ModelConfig, checkpointer: Checkpointer
) -> Origin | None:
    """The run's own newest checkpoint, else `checkpoint.load_path`, else None: new parameters.

    Args:
      options: of checkpoints.
      model: of the run: a vocabulary that it pads is padded when it is read.
      checkpointer: of the run.
    Raises:
      ValueError: if load_path is needed and holds no checkpoint (OSError in processes but 0).
    """
    step = checkpointer.latest()
    if step is not None:
        folder = checkpointer.folder_of(step)
        unused = f"; config.checkpoint.load_path={options.load_path} is not used"
        line = f"resuming after step {step}: this run's own newest checkpoint is {folder}"
        line += unused if options.load_path is not None else ""
        return Origin(folder, ("step", "params", "opt_state"), True, line)
    if options.load_path is None:
        return None
    name = options.load_path
    is_ours = processes.from_process_0(lambda: not is_foreign(name))
    weights = None if is_ours else _open(name, options, model)
    place: Any = name
    if is_ours:
        place = files.path(processes.from_process_0(lambda: str(native.find(name))))
    taken = {"params": True, "opt_state": options.load_optimizer, "step": options.load_position}
    words = {"params": "parameters", "opt_state": "optimizer state", "step": "step and data"}
    what = f" ({weights.line})" if weights is not None else ""
    line = f"starting from {place}{what} (config.checkpoint.load_path; this run has no checkpoint"
    line += " yet): "
    line += ", ".join(f"{words[part]} {'loaded' if yes else 'new'}" for part, yes in taken.items())
    return Origin(place, tuple(part for part, yes in taken.items() if yes), False, line, weights)


def _open(name: str, options: CheckpointConfig, model: ModelConfig) -> Weights:
    try:
        weights = open_weights(name, optimizer=options.load_optimizer or options.load_position)
    except NoOptimizerError as error:
        fresh = "config.checkpoint.load_position=False" if options.load_position else NEW_STATE
        raise ValueError(f"config.checkpoint.load_path: {error}; {fresh}") from None
    except (ValueError, OSError, ImportError) as error:
        said = re.sub(r"^config\.checkpoint\.load_path: ", "", str(error))
        raise ValueError(f"config.checkpoint.load_path: {said}") from error
    is_padded = model.vocab_size == weights.model.vocab_size
    if is_padded and model.vocab_rows > weights.model.vocab_rows:
        return Padded(weights, model.vocab_rows)
    return weights


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _read(weights: Weights, wanted: dict[str, Any], new: Sequence[str]) -> dict[str, Any]:
    """The leaves of `wanted`, in its dtypes and on its shardings."""
    leaves = storage.names(wanted)
    known = {name: leaf for name, leaf in leaves.items() if not name.endswith(tuple(new))}
    stored = {name: x for name, x in weights.leaves.items() if name.split("/")[0] in wanted}
    problems = storage.differences(stored, known, cast=True)
    problems += [  # a float may be another float, and nothing else
        f"{name} is {stored[name].dtype}, need {leaf.dtype}"
        for name, leaf in known.items()
        if name in stored and _is_float(stored[name]) != _is_float(leaf)
    ]
    if problems:
        raise ValueError(f"{weights.line} does not fit: " + "; ".join(problems))
    filled = [
        read_leaf(weights, name, leaf)
        if name in known
        else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(wanted), filled)


def initial_state(
    m: ModelConfig, o: OptimConfig, seed: int, mesh: Mesh, origin: Origin | None, first: int
) -> TrainState:
    """The state after `first` steps: fresh, or with the parts that the origin gives."""
    if origin is None:
        return init_state(m, o, mesh, seed)
    new = ()
    if m.router_bias_gamma is not None and not _has_biases(origin):
        say("model.router_bias_gamma: biases of the routers begin at 0, the checkpoint has none")
        new = (ROUTER_BIAS,)
    loaded = origin.load(abstract_state(m, o, mesh), new)
    if "opt_state" not in loaded:  # never hold fresh and loaded parameters at once
        loaded["opt_state"] = init_opt_state(m, o, mesh, loaded["params"])
    if "step" not in loaded:
        loaded["step"] = replicated(mesh, np.int32(first))
    return TrainState(**loaded)


def _has_biases(origin: Origin) -> bool:
    return origin.meta["model"].get("router_bias_gamma") is not None


# --- what checkpoints carry along -----------------------------------------------------------------


class Kept(NamedTuple):
    """What all checkpoints of a run hold beside its state; in processes but 0, that is nothing."""

    meta: dict[str, Any]  # added to what `start.checkpoint_meta` gives
    carried: dict[str, bytes]  # files by name


def kept(origin: Origin | None, tokenizer: str | None) -> Kept:
    """Special tokens and files of the checkpoint that a run starts from, and its tokenizer.

    Where these are two tokenizers, nothing that belongs to the first is kept. `data.eos_id` is
    where documents end, and replaces no special token.

    Args:
      origin: where the run starts from.
      tokenizer: of `data.tokenizer`.
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
        if tokenizer is None:
            return
        path = files.path(tokenizer)
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
