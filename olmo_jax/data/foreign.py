"""What a folder is that is no checkpoint of ours, and what to do with it."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

CONVERT = "python -m olmo_jax.convert"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
TOKENS = (".npy", ".csv.gz")


def describe(path: Any) -> str | None:
    """What is there, for people, with the command that takes it; None: nothing that is known.

    Args:
      path: that is there, a file or a folder, local or `gs://`.
    """
    if not path.is_dir():
        return _file(path)
    names = sorted(child.name for child in path.iterdir())
    if not names:
        return "an empty folder"
    return next((text for kind in KINDS if (text := kind(path, names))), None)


def taken(source: Any) -> str:
    """The command that makes a checkpoint of ours of another, as the end of a sentence."""
    return f"taken by: {CONVERT} to_jax {source} OUT"


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here reads like `organisation/model`."""
    match = re.fullmatch(r"([\w.-]+)/[\w.-]+", name)
    return match is not None and not pathlib.Path(match[1]).exists()


def _file(path: Any) -> str | None:
    name = path.name
    if name.endswith(".gguf"):
        return "a GGUF file, whose weights are quantized; use the model that it was made from"
    if name.endswith(WEIGHTS):
        return f"one file of weights; name its folder, {path.parent}"
    if name.endswith(TOKENS):
        return "a file of tokens; it goes to config.data.paths"
    return "a file, no folder"


def _hub_cache(path: Any, names: list[str]) -> str | None:
    """The Hub's cache of one model, or of many."""
    models = [name for name in names if name.startswith("models--")]
    if "snapshots" in names and path.name.startswith("models--"):
        found = sorted(child.name for child in (path / "snapshots").iterdir())
        model = path.name.removeprefix("models--").replace("--", "/")
        where = f"; its folder is {path / 'snapshots' / found[-1]}" if found else ""
        return f"the Hub's cache of {model}{where}, {taken(model)}"
    if models:
        model = models[0].removeprefix("models--").replace("--", "/")
        rest = f" and {len(models) - 1} more" if len(models) > 1 else ""
        return f"the Hub's cache of {model}{rest}; a model is {taken(model)}"
    return None


def _adapter(path: Any, names: list[str]) -> str | None:
    if "adapter_config.json" not in names:
        return None
    base = _json(path / "adapter_config.json").get("base_model_name_or_path")
    return (
        f"an adapter (PEFT) of {base if isinstance(base, str) else 'a model'}, no model by itself;"
        " merge it into that first (PEFT's merge_and_unload and save_pretrained)"
    )


def _olmo_core(path: Any, names: list[str]) -> str | None:
    if "config.json" in names and ("model_and_optim" in names or ".metadata" in names):
        return f"a checkpoint of OLMo-core, {taken(path)} [--optimizer]"
    if "model_and_optim" in names or ".metadata" in names:
        return "a part of a checkpoint of OLMo-core; name the folder that has its config.json"
    return None


def _legacy(path: Any, names: list[str]) -> str | None:
    if "config.yaml" in names and {"model.pt", "model.safetensors"} & {*names}:
        return f"a checkpoint of OLMo's first trainer, {taken(path)} [--optimizer]"
    return None


def _hugging_face(path: Any, names: list[str]) -> str | None:
    config = _json(path / "config.json") if "config.json" in names else {}
    kind = config.get("architectures") or config.get("model_type")
    if not kind:
        return None
    kind = kind[0] if isinstance(kind, list) else kind
    return f"a Hugging Face folder ({str(kind)[:60]}), {taken(path)}"


def _steps(path: Any, names: list[str]) -> str | None:
    """The folder of a run of another trainer, which has its checkpoints below."""
    found = [name for name in names if re.fullmatch(r"(step|checkpoint-)\d+(-\w+)?", name)]
    for name in sorted(found, key=lambda name: int(re.sub(r"\D", "", name)), reverse=True):
        child = path / name
        inner = sorted(c.name for c in child.iterdir()) if child.is_dir() else []
        for kind in (_olmo_core, _legacy, _hugging_face):
            if text := kind(child, inner):
                return f"a folder of checkpoints; {name} is {text}"
    return None


def _orbax(path: Any, names: list[str]) -> str | None:
    if {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "_sharding"} & {*names}:
        return (
            "a checkpoint that Orbax wrote for another program, with names of its own; export it"
            " there to Hugging Face's format"
        )
    return None


def _gguf(path: Any, names: list[str]) -> str | None:
    found = [name for name in names if name.endswith(".gguf")]
    return f"a folder with {found[0]}: {_file(path / found[0])}" if found else None


def _tokens(path: Any, names: list[str]) -> str | None:
    if any(name.endswith(".npy") for name in names):
        return f"a folder of token files: config.data.paths={path}/*.npy"
    return None


def _own_run(path: Any, names: list[str]) -> str | None:
    config = _json(path / "config.json") if "config.json" in names else {}
    if {"model", "data", "optim", "checkpoint"} <= config.keys() and "checkpoints" not in names:
        return "the folder of a run that has saved no checkpoint yet"
    return None


def _tokenizer(path: Any, names: list[str]) -> str | None:
    found = {"tokenizer.json", "tokenizer.model"} & {*names}
    return "a tokenizer without a model; it goes to config.data.tokenizer" if found else None


KINDS: tuple[Callable[[Any, list[str]], str | None], ...] = (
    _hub_cache, _adapter, _olmo_core, _legacy, _hugging_face, _own_run, _steps, _orbax, _gguf,
    _tokens, _tokenizer,
)  # fmt: skip


def _json(path: Any) -> dict[str, Any]:
    """The object in a file; what is wrong with it is not the question here."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
