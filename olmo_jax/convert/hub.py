"""Models by their id on the Hugging Face Hub, fetched once and kept in its cache."""

import pathlib

from olmo_jax.convert.hf import CARRIED

# Weights in one format are enough; safetensors first.
SMALL = ["config.json", *CARRIED]
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a model, downloaded if it is not in the cache; a broken download goes on.

    Args:
      name: such as `allenai/OLMo-2-1124-7B`.
      revision: branch, tag or commit; None: the main branch.
    Raises:
      ImportError: if huggingface_hub is not installed.
      FileNotFoundError: if there is no such model or revision.
      OSError: if the Hub cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(
            f"{name} is no path here; to fetch it from the Hugging Face Hub: pip install"
            " huggingface_hub"
        ) from None
    where = f"{name} at {revision}" if revision else name
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        weights = SAFETENSORS if any(f.endswith(".safetensors") for f in listed) else PICKLES
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*SMALL, *weights]
        )
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name} has no revision {revision} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name} is no path here and no public model on the Hub; a gated or private one needs"
            " `hf auth login`"
        ) from None
    except Exception as error:  # of its HTTP client: they have no common public base
        folder = _cached(name, revision, where, error)
    return pathlib.Path(folder)


def _cached(name: str, revision: str | None, where: str, error: Exception) -> str:
    """What was downloaded before, where there is no network now."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        raise OSError(
            f"{where} is no path here, is not in the cache, and the Hugging Face Hub cannot be"
            f" reached ({type(error).__name__}); fetch it where there is a network (hf download"
            f" {name}) and name the folder"
        ) from None
