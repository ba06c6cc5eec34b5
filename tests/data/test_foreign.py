"""What is no checkpoint of ours is said to be what it is, with the command that takes it."""

import json

import pytest

from olmo_jax.checkpoints.formats import native
from olmo_jax.checkpoints.formats.open import open_weights

TAKEN = "taken by: python -m olmo_jax.convert to_jax"
HF = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
RUN = {"model": {}, "data": {}, "optim": {}, "checkpoint": {}}
# Its files -> what it is, with {0} for its path.
FOLDERS = {
    "nothing": ({}, "an empty folder"),
    "hugging face": (
        {"config.json": HF, "model.safetensors": ""},
        f"a Hugging Face folder (Olmo2ForCausalLM), {TAKEN} {{0}} OUT",
    ),
    "hugging face, older": (
        {"config.json": {"model_type": "olmo"}, "pytorch_model.bin": ""},
        f"a Hugging Face folder (olmo), {TAKEN} {{0}} OUT",
    ),
    "unsloth": (
        {"config.json": HF | {"unsloth_version": "2025.9.1", "unsloth_fixed": True}},
        f"a Hugging Face folder (Olmo2ForCausalLM), {TAKEN} {{0}} OUT",
    ),
    "hugging face's trainer": (
        {"checkpoint-9/config.json": HF, "checkpoint-10/config.json": HF},
        "a folder of checkpoints; checkpoint-10 is a Hugging Face folder (Olmo2ForCausalLM),"
        f" {TAKEN} {{0}}/checkpoint-10 OUT",
    ),
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "allenai/OLMo-2-0425-1B"}},
        "an adapter (PEFT) of allenai/OLMo-2-0425-1B, no model by itself; merge it into that first"
        " (PEFT's merge_and_unload and save_pretrained)",
    ),
    "damaged adapter": (
        {"adapter_config.json": "[" * 100_000},
        "an adapter (PEFT) of a model, no model by itself; merge it into that first"
        " (PEFT's merge_and_unload and save_pretrained)",
    ),
    "hub/models--allenai--OLMo-2-0425-1B": (
        {"snapshots/abc/config.json": HF, "refs/main": "abc", "blobs/1": ""},
        "the Hub's cache of allenai/OLMo-2-0425-1B; its folder is {0}/snapshots/abc,"
        f" {TAKEN} allenai/OLMo-2-0425-1B OUT",
    ),
    "hub": (
        {"models--a--b/refs/main": "x", "models--c--d/refs/main": "x"},
        f"the Hub's cache of a/b and 1 more; a model is {TAKEN} a/b OUT",
    ),
    "olmo-core": (
        {"config.json": {"model": {}}, "model_and_optim/.metadata": ""},
        f"a checkpoint of OLMo-core, {TAKEN} {{0}} OUT [--optimizer]",
    ),
    "olmo-core's arrays": (
        {".metadata": "", "__0_0.distcp": ""},
        "a part of a checkpoint of OLMo-core; name the folder that has its config.json",
    ),
    "a run of olmo-core": (
        {f"step{n}/{name}": {"model": {}} for n in (9, 10)
         for name in ("config.json", "model_and_optim/.metadata")},
        "a folder of checkpoints; step10 is a checkpoint of OLMo-core,"
        f" {TAKEN} {{0}}/step10 OUT [--optimizer]",
    ),
    "olmo": (
        {"config.yaml": "", "model.pt": "", "optim.pt": ""},
        f"a checkpoint of OLMo's first trainer, {TAKEN} {{0}} OUT [--optimizer]",
    ),
    "a run of olmo": (
        {"step100-unsharded/config.yaml": "", "step100-unsharded/model.safetensors": ""},
        "a folder of checkpoints; step100-unsharded is a checkpoint of OLMo's first trainer,"
        f" {TAKEN} {{0}}/step100-unsharded OUT [--optimizer]",
    ),
    "orbax": (
        {"_CHECKPOINT_METADATA": "", "manifest.ocdbt": "", "d/1": ""},
        "a checkpoint that Orbax wrote for another program, with names of its own; export it there"
        " to Hugging Face's format",
    ),
    "gguf": (
        {"olmo2.Q4_K_M.gguf": "GGUF"},
        "a folder with olmo2.Q4_K_M.gguf: a GGUF file, whose weights are quantized; use the model"
        " that it was made from",
    ),
    "tokens": (
        {"a.npy": "", "a.csv.gz": ""}, "a folder of token files: config.data.paths={0}/*.npy"
    ),
    "a run without checkpoints": (
        {"config.json": RUN, "metrics.jsonl": ""},
        "the folder of a run that has saved no checkpoint yet",
    ),
    "tokenizer": (
        {"tokenizer.json": "{}"}, "a tokenizer without a model; it goes to config.data.tokenizer"
    ),
}  # fmt: skip
FILES = {
    "a.gguf": "a GGUF file, whose weights are quantized; use the model that it was made from",
    "model.safetensors": "one file of weights; name its folder, {0.parent}",
    "tokens.npy": "a file of tokens; it goes to config.data.paths",
    "notes": "a file, no folder",
}


def make(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_kind_is_named_with_what_takes_it(tmp_path, name):
    files, what = FOLDERS[name]
    make(tmp_path / name, files)
    with pytest.raises(ValueError) as caught:
        native.find(str(tmp_path / name))
    line = f"config.checkpoint.load_path: no complete checkpoint in {tmp_path / name}; it is "
    assert str(caught.value) == line + what.format(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_named_too(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    what = FILES[name].format(tmp_path / name)
    with pytest.raises(ValueError, match="no complete checkpoint in") as caught:
        native.find(str(tmp_path / name))
    assert str(caught.value).endswith(f"; it is {what}")
    with pytest.raises(ValueError, match="is no checkpoint that is known here") as caught:
        open_weights(str(tmp_path / name))
    assert str(caught.value).endswith(f"here: it is {what}")


# What the converter reads, or says by itself.
READ = {"hugging face", "hugging face, older", "unsloth", "olmo-core", "olmo"}


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - READ))
def test_the_converter_says_the_same_of_what_it_does_not_read(tmp_path, name):
    files, what = FOLDERS[name]
    make(tmp_path / name, files)
    with pytest.raises(ValueError, match=r"^(SRC: no complete|.* is no checkpoint)") as caught:
        open_weights(str(tmp_path / name))
    assert str(caught.value).endswith(f"it is {what.format(tmp_path / name)}")


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError) as caught:
        native.find("runs/mine")
    assert str(caught.value) == "config.checkpoint.load_path: runs/mine does not exist"
