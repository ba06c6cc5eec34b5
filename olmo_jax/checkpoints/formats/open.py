"""The readers of all formats behind one door."""

import pathlib
import re

from olmo_jax import files
from olmo_jax.checkpoints.formats import hf, hub, legacy, native, olmo_core, orbax
from olmo_jax.checkpoints.weights import Weights
from olmo_jax.data import foreign

OTHERS = (hf, legacy, olmo_core, orbax)


def is_foreign(src: str) -> bool:
    """Whether a path, address or Hub id names a checkpoint that olmo_jax did not write."""
    folder = files.expand(src)
    if re.match(r"https?://", src):
        return True
    if "://" in src:
        return False
    if not pathlib.Path(folder).exists():
        return foreign.is_hub_id(src)
    return not native.recognises(folder) and any(each.recognises(folder) for each in OTHERS)


def open_weights(src: str, *, optimizer: bool = False, revision: str | None = None) -> Weights:
    """The checkpoint at a path, address or Hub id, after finding out which kind it is.

    Args:
      src: a folder (Hugging Face, olmo_jax's checkpoint or run, legacy OLMo, OLMo-core, Orbax),
        local or `https://`, or an id on the Hugging Face Hub such as `allenai/OLMo-2-1124-7B`.
      optimizer: whether Adam's moments and the step are wanted too, where the source has them.
      revision: branch, tag or commit on the Hub.
    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if it is no checkpoint that is known, or one that cannot be right.
    """
    folder = files.expand(src)
    if "://" not in src and not pathlib.Path(folder).exists():
        if not foreign.is_hub_id(src):
            raise FileNotFoundError(f"{src} does not exist")
        folder = str(hub.download(src, revision))
    elif revision is not None:
        raise ValueError(f"--revision={revision} is for ids on the Hugging Face Hub; {src} is none")
    for reader in (native, *OTHERS):
        if reader.recognises(folder):
            return reader.read(folder, optimizer=optimizer)
    what = None if "://" in folder else foreign.describe(pathlib.Path(folder))
    raise ValueError(
        f"{src} is no checkpoint that is known here: "
        + (
            f"it is {what}"
            if what
            else "found neither config.json with safetensors (Hugging Face), nor"
            " commit_success.txt (olmo_jax), nor config.yaml (legacy OLMo), nor model_and_optim"
            " (OLMo-core), nor _METADATA (Orbax)"
        )
    )
