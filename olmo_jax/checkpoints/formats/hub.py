"""Models by their id on the Hugging Face Hub, fetched once and kept in its cache."""

import pathlib
from typing import Any

# Copied byte for byte: tokenizer, chat template, options of generation.
CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json"
    " merges.txt tokenizer.model chat_template.jinja chat_template.json generation_config.json"
).split()
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, which are carried as well

SMALL = ["config.json", *CARRIED, f"{TEMPLATES}/*.jinja"]
# Weights in one format are enough, the better one first.
SAFETENSORS = [*SMALL, "model*.safetensors", "model.safetensors.index.json"]
PICKLES = [*SMALL, "pytorch_model*.bin", "pytorch_model.bin.index.json"]
ANSWER_S = 20  # that the Hub has to say which files there are


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a model, downloaded if it is not in the cache; a broken download goes on.

    Args:
      name: such as `allenai/OLMo-2-1124-7B`.
      revision: branch, tag or commit; None: the main branch.
    Raises:
      ImportError: if huggingface_hub is not installed.
      FileNotFoundError: if there is no such model or revision.
      OSError: if the Hub cannot be reached and the model is not in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ImportError(
            f"{name} is no path here; to fetch it from the Hugging Face Hub: pip install"
            " huggingface_hub"
        ) from None
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=ANSWER_S)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        wanted = SAFETENSORS if any(f.endswith(".safetensors") for f in files) else PICKLES
        return _fetch(name, revision=revision, allow_patterns=wanted)
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name} has no revision {revision} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name} is no path here and no public model on the Hub; a gated or private one needs"
            " `hf auth login`"
        ) from None
    except Exception as error:  # of its HTTP client: they have no common public base
        unreachable = error
    for patterns in (SAFETENSORS, PICKLES):
        try:
            return _fetch(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            continue
    where = f"{name} at {revision}" if revision else name
    raise OSError(
        f"{where} is no path here and not whole in the cache, and the Hugging Face Hub cannot be"
        f" reached ({type(unreachable).__name__}); fetch it where there is a network (hf download"
        f" {name}) and name the folder"
    )


def _fetch(name: str, **options: Any) -> pathlib.Path:
    import huggingface_hub

    return pathlib.Path(huggingface_hub.snapshot_download(name, **options))
