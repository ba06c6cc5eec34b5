"""Hugging Face folders in and out, with transformers as the judge."""

import dataclasses
import json
import pathlib
import shutil

import jax
import made
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
import torch
import transformers
import web
from hf import FAMILIES, random_model
from safetensors.numpy import load_file, save_file

import olmo_jax
from olmo_jax import files
from olmo_jax.checkpoints import compare, conversion, layout, storage, weights
from olmo_jax.checkpoints.formats import hf, native, safetensors, stacked
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.logits import logits
from olmo_jax.config.model import MeshConfig
from olmo_jax.parallel import sharding

TOKENS = np.random.default_rng(0).integers(2, 97, (2, 29))
TOKENIZER = {
    "tokenizer.json": b'{"version": "1.0"}\n\n',
    "tokenizer_config.json": b'{ "bos_token" : null }',
    "chat_template.jinja": "{{ 'ü' }}".encode(),
    "additional_chat_templates/tool_use.jinja": "{{ 'ß' }}\r\n".encode(),
    "additional_chat_templates/rag.jinja": b"",
    "generation_config.json": b'{"eos_token_id": [2, 3], "temperature": 0.6}',
}


def save(tmp_path: pathlib.Path, name: str, dtype=torch.float32, **options) -> pathlib.Path:
    """A folder as `save_pretrained` writes it; bf16 values are exact in both dtypes."""
    model, _, _ = random_model(name)
    folder = tmp_path / "theirs"
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def theirs(folder: pathlib.Path, dtype=torch.float32) -> np.ndarray:
    """The logits of a folder, by transformers."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def tensors(folder: pathlib.Path) -> dict[str, bytes]:
    """Every stored tensor with dtype and shape, by the safetensors package."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            assert key not in found
            found[key] = (str(value.dtype), value.shape, value.tobytes())
    return found


def quiet(line: str) -> None:
    """Says nothing."""


def convert(folder: pathlib.Path, tmp_path: pathlib.Path, **options) -> pathlib.Path:
    """There and back: to a checkpoint of ours, and from there to a new folder."""
    conversion.to_jax(str(folder), str(tmp_path / "ours"), say=quiet)
    conversion.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), say=quiet, **options)
    return tmp_path / "back"


FAST = ["olmo1 clipped", "olmo1 tied", "olmo2 grouped", "olmo3 yarn grouped", "olmoe"]


@pytest.mark.parametrize(
    "name",
    [*FAST, *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES if x not in FAST)],
)
def test_logits_are_those_of_transformers_and_the_way_back_is_exact(tmp_path, name):
    folder = save(tmp_path, name)
    back = convert(folder, tmp_path)
    want = theirs(folder)
    model, params = olmo_jax.load(str(folder))
    ours = np.asarray(jax.jit(made.logits_of, static_argnums=0)(model, params, TOKENS))
    assert np.abs(ours - want).max() < 2e-5
    streamed = logits(open_weights(str(folder)), TOKENS)
    assert np.abs(streamed - want).max() < 2e-5
    assert tensors(back) == tensors(folder)
    assert np.array_equal(theirs(back), want)
    before, after = (
        transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder, back)
    )
    for fields in (before, after):
        del fields["_name_or_path"]
    assert after.pop("transformers_version") == before.pop("transformers_version")
    assert after == before


@pytest.mark.parametrize("name", ["olmo1 tied", "olmo2 grouped", "olmo3 yarn grouped", "olmoe"])
def test_bf16_is_bitwise_equal_after_the_way_back(tmp_path, name):
    folder = save(tmp_path, name, torch.bfloat16)
    back = convert(folder, tmp_path)
    assert {dtype for dtype, *_ in tensors(folder).values()} == {"bfloat16"}
    assert tensors(back) == tensors(folder)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert np.array_equal(theirs(back, torch.bfloat16), theirs(folder, torch.bfloat16))


FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("name", ["olmoe", "flex olmo"])
def test_experts_in_one_tensor_are_those_in_many(tmp_path, name):
    folder = save(tmp_path, name)
    state = {key: value.numpy() for key, value in random_model(name)[0].state_dict().items()}
    assert state["model.layers.0.mlp.experts.gate_up_proj"].shape[1] == 2 * 48
    (tmp_path / "fused").mkdir()
    save_file(state, tmp_path / "fused" / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "fused")
    many, one = open_weights(str(folder)), open_weights(str(tmp_path / "fused"))
    assert one.leaves == many.leaves
    for leaf in many.leaves:
        assert np.array_equal(one.read(leaf), many.read(leaf))
    part = np.s_[1:2, 2:4, 3:40, 5:33]
    leaf = "params/layers/moe/w_up"
    assert np.array_equal(one.read(leaf, part), many.read(leaf)[part])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {"model.layers.1.mlp.experts.3.up_proj.weight": state["lm_head.weight"]},
            r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is there twice",
        ),
        (
            lambda state: {FUSED: np.pad(state[FUSED], ((0, 0), (0, 1), (0, 0)))},
            r"left over model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
    ],
    ids=["twice", "a row too many"],
)
def test_experts_in_one_tensor_that_cannot_be_right_are_named(tmp_path, change, message):
    folder = save(tmp_path, "olmoe")
    state = {key: value.numpy() for key, value in random_model("olmoe")[0].state_dict().items()}
    save_file(state | change(state), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        open_weights(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["olmoe", "flex olmo"])
def test_experts_are_converted_some_at_a_time(tmp_path, monkeypatch, name):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2 * 64 * 48 * 4)  # two experts
    folder = save(tmp_path, name)
    back = convert(folder, tmp_path)
    leaf = native.read(str(tmp_path / "ours")).leaves["params/layers/moe/w_down"]
    n_together = {"olmoe": 2, "flex olmo": 1}[name]  # of eight, of five
    assert len(weights.parts("params/layers/moe/w_down", leaf)) == 4 * leaf.shape[1] // n_together
    assert tensors(back) == tensors(folder)


def test_bf16_may_stay_bf16_on_disk(tmp_path):
    folder = save(tmp_path, "olmo2", torch.bfloat16)
    conversion.to_jax(str(folder), str(tmp_path / "ours"), dtype="bfloat16", say=quiet)
    assert {leaf.dtype.name for leaf in native.read(str(tmp_path / "ours")).leaves.values()} == {
        "bfloat16"
    }
    conversion.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), say=quiet)
    assert tensors(tmp_path / "back") == tensors(folder)


def test_fp32_is_rounded_to_bf16_as_torch_rounds(tmp_path):
    folder = save(tmp_path, "olmo2")
    conversion.to_hf(str(folder), str(tmp_path / "bf16"), dtype="bfloat16", say=quiet)
    rounded = random_model("olmo2")[0].to(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "torch")
    assert tensors(tmp_path / "bf16") == tensors(tmp_path / "torch")


@pytest.mark.parametrize("options", [dict(max_shard_size="20KB"), dict()])
def test_shards_in_any_number_are_read(tmp_path, options):
    folder = save(tmp_path, "olmo3", **options)
    assert len(list(folder.glob("*.safetensors"))) == (1 if not options else 30)
    found = open_weights(str(folder))
    assert found.line.startswith("Hugging Face Olmo3ForCausalLM, 47 tensors in ")
    assert np.abs(logits(found, TOKENS) - theirs(folder)).max() < 2e-5


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_are_read_as_safetensors_are(tmp_path, shards):
    folder = save(tmp_path, "olmo2 grouped", torch.bfloat16)
    state = random_model("olmo2 grouped")[0].to(torch.bfloat16).state_dict()
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folder / "config.json", old)
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    names = names if shards > 1 else ["pytorch_model.bin"]
    parts = [dict(list(state.items())[i::shards]) for i in range(shards)]
    for file, part in zip(names, parts, strict=True):
        torch.save(part, old / file)
    if shards > 1:
        weight_map = {k: f for f, part in zip(names, parts, strict=True) for k in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert conversion.check(str(folder), str(old), say=quiet)


def test_of_several_weights_those_are_read_that_transformers_takes(tmp_path):
    folder = save(tmp_path, "olmo2", max_shard_size="40KB")
    shards = {file.name: file.read_bytes() for file in folder.glob("model-*.safetensors")}
    old = theirs(folder)
    model = random_model("olmo2")[0]
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(folder)  # a second save: its one file, and the index of the first
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", hf.INDEX}  # fmt: skip

    def ours(note: str) -> np.ndarray:
        found = open_weights(str(folder))
        assert found.line.endswith(note)
        return logits(found, TOKENS)

    new = theirs(folder)
    assert np.abs(new - old).max() > 0.1
    alone = f"in 1 file (model.safetensors, as transformers; {hf.INDEX} not used)"
    assert np.abs(ours(alone) - new).max() < 2e-5
    for name, data in shards.items():  # both whole
        (folder / name).write_bytes(data)
    assert np.abs(theirs(folder) - new).max() == 0
    assert np.abs(ours(alone) - new).max() < 2e-5
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert np.abs(theirs(folder) - old).max() == 0
    note = f"files ({hf.INDEX}, as transformers; pytorch_model.bin not used)"
    assert np.abs(ours(note) - old).max() < 2e-5
    (folder / min(shards)).unlink()  # nothing falls back to what is left
    with pytest.raises(FileNotFoundError, match=f"{min(shards)}, which {hf.INDEX} names, is miss"):
        open_weights(str(folder))
    (folder / hf.INDEX).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "gone.bin"}}')
    assert np.abs(theirs(folder) - new).max() == 0
    note = "file (pytorch_model.bin, as transformers; pytorch_model.bin.index.json not used)"
    assert np.abs(ours(note) - new).max() < 2e-5


@pytest.mark.parametrize("stale", [True, False])
def test_weights_with_an_adapter_beside_them_are_refused_naming_both(tmp_path, stale):
    folder = save(tmp_path, "olmo2")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if stale:
        (folder / hf.INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    message = r"theirs: adapter_config\.json beside model\.safetensors: .* merge it into them"
    with pytest.raises(ValueError, match=message):
        open_weights(str(folder))
    (folder / "model.safetensors").unlink()
    beside = "model.safetensors.index.json" if stale else "config.json"
    with pytest.raises(ValueError, match=f"adapter_config.json beside {beside}: "):
        open_weights(str(folder))


def test_files_beside_the_weights_are_carried_byte_for_byte(tmp_path):
    folder = save(tmp_path, "olmo2")
    (folder / "additional_chat_templates" / "more").mkdir(parents=True)
    (folder / "additional_chat_templates" / "notes.txt").write_text("no template")
    for name, data in TOKENIZER.items():
        (folder / name).write_bytes(data)
    back = convert(folder, tmp_path)
    assert {name: (back / name).read_bytes() for name in TOKENIZER} == TOKENIZER
    in_folder = {name for name in TOKENIZER if name.startswith("additional_chat_templates/")}
    assert {f"additional_chat_templates/{file.name}" for file in
            (back / "additional_chat_templates").iterdir()} == in_folder  # fmt: skip


@pytest.mark.parametrize("ids", [dict(eos_token_id=[5, 2], bos_token_id=7, pad_token_id=None), {}])
def test_special_tokens_are_as_the_source_had_them(tmp_path, ids):
    folder = save(tmp_path, "olmo2")
    config = json.loads((folder / "config.json").read_text())
    if ids:
        config |= ids
    else:  # what the file leaves out is what transformers fills in
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    back = convert(folder, tmp_path)
    want, found = (transformers.AutoConfig.from_pretrained(path) for path in (folder, back))
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(found, key) == getattr(want, key)
    generation = transformers.GenerationConfig.from_pretrained(back)
    assert generation.eos_token_id == want.eos_token_id


@pytest.mark.parametrize("name", ["olmo1 tied", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_rows_of_padding_are_added_on_request_and_not_exported(tmp_path, name):
    folder = save(tmp_path, name)
    conversion.to_jax(str(folder), str(tmp_path / "ours"), padded_vocab_size=128, say=quiet)
    ours = native.read(str(tmp_path / "ours"))
    assert (ours.model.vocab_size, ours.model.padded_vocab_size) == (97, 128)
    assert ours.leaves["params/embed"].shape == (128, 64)
    model, params = olmo_jax.load(str(tmp_path / "ours"))
    found = np.asarray(made.logits_of(model, params, TOKENS))
    assert np.abs(found - theirs(folder)).max() < 2e-5
    assert conversion.check(str(folder), str(tmp_path / "ours"), say=quiet)
    assert conversion.check(str(tmp_path / "ours"), str(folder), say=quiet)
    conversion.to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), say=quiet)
    assert tensors(tmp_path / "back") == tensors(folder)
    with pytest.raises(ValueError, match="padded_vocab_size=96 is below the 97 rows"):
        conversion.to_jax(str(folder), str(tmp_path / "new"), padded_vocab_size=96, say=quiet)


def test_load_spreads_any_source_over_a_mesh(tmp_path):
    folder = save(tmp_path, "olmo3 yarn grouped", max_shard_size="40KB")
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    model, params = olmo_jax.load(str(folder), mesh=mesh)
    assert params["layers"]["attn"]["wq"].sharding.num_devices == 8
    assert params["layers"]["attn"]["wq"].addressable_shards[0].data.shape == (4, 16, 2, 16)
    assert params["lm_head"].shape == (64, 98)  # 97 tokens on two devices
    with jax.set_mesh(mesh):
        ours = np.asarray(jax.jit(made.logits_of, static_argnums=0)(model, params, TOKENS))
    assert np.abs(ours - theirs(folder)).max() < 2e-5


def test_a_folder_behind_https_is_read_as_one_here(tmp_path):
    folder = save(tmp_path, "olmo1 tied", max_shard_size="40KB")
    with web.serving(tmp_path) as server:
        conversion.to_jax(f"{server.url}/theirs", str(tmp_path / "ours"), say=quiet)
        assert open_weights(f"{server.url}/theirs").files.keys() == {"generation_config.json"}
    assert conversion.check(str(folder), str(tmp_path / "ours"), say=quiet)


@pytest.mark.parametrize("verb", ["to_jax", "average", "check"])
def test_nothing_is_downloaded_twice(tmp_path, monkeypatch, verb):
    folder = save(tmp_path, "olmo2")
    ours = str(tmp_path / "ours")
    conversion.to_jax(str(folder), ours, say=quiet)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4000)  # a quarter of a matrix
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    monkeypatch.setattr(compare, "LOGIT_BYTES", 0)
    monkeypatch.setattr(conversion, "logits", lambda checkpoint, tokens: np.ones((1, 1, 1)))
    new = str(tmp_path / "new")
    with web.serving(folder) as server:
        do = {
            "to_jax": lambda: conversion.to_jax(server.url, new, say=quiet),
            "average": lambda: conversion.average([ours, server.url], new, say=quiet),
            "check": lambda: conversion.check(ours, server.url, say=quiet),
        }
        do[verb]()
        size = (folder / "model.safetensors").stat().st_size
        assert server.n_bytes < 1.1 * size


def test_large_tensors_are_read_in_parts_that_make_the_same_checkpoint(tmp_path, monkeypatch):
    folder = save(tmp_path, "olmo2 grouped")
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4000)
    conversion._write_native(open_weights(str(folder)), files.path(tmp_path / "whole"), "float32")
    monkeypatch.setattr(conversion, "PIECE_BYTES", 4000)
    monkeypatch.setattr(stacked, "BAND_BYTES", 1000)
    most, load = [], safetensors.load

    def watched(*args):
        most.append(load(*args).nbytes)
        return load(*args)

    monkeypatch.setattr(safetensors, "load", watched)
    source = open_weights(str(folder))
    conversion._write_native(source, files.path(tmp_path / "parts"), "float32")
    assert max(most) <= 4000  # a matrix has 16,384 bytes
    assert runs.arrays(tmp_path / "parts", ("params",)) == runs.arrays(
        tmp_path / "whole", ("params",)
    )


def test_a_part_of_a_leaf_is_that_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stacked, "BAND_BYTES", 700)
    folder = save(tmp_path, "olmo2 grouped", max_shard_size="40KB")
    conversion.to_jax(str(folder), str(tmp_path / "ours"), say=quiet)
    rng = np.random.default_rng(1)
    for source in (open_weights(str(folder)), open_weights(str(tmp_path / "ours"))):
        for name, leaf in source.leaves.items():
            everything = source.read(name)
            assert everything.shape == leaf.shape
            for _ in range(3):
                starts = [int(rng.integers(0, n)) for n in leaf.shape]
                index = tuple(
                    slice(a, int(rng.integers(a + 1, n + 1)))
                    for a, n in zip(starts, leaf.shape, strict=True)
                )
                part = source.read(name, index)
                assert part.flags.c_contiguous
                assert np.array_equal(part, everything[index])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("olmo1 clipped", dict(clip_qkv=None)),
        ("olmo3", dict(window=4)),  # the current token not counted
        ("olmo2", {"gate": "up", "up": "gate"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("olmo3", dict(window=6)),  # counted in addition
                ("olmo3", dict(layer_types=("full", "sliding", "sliding", "sliding"))),
                ("olmo3 yarn grouped", dict(yarn_factor=None)),
                ("olmo3 yarn grouped", dict(layer_types=("full",))),
                ("olmo2", dict(rope_theta=10_000.0)),
                ("olmo2", dict(norm_eps=1e-3)),
            )
        ),
    ],
)
def test_each_trap_would_be_seen(tmp_path, name, wrong):
    folder = save(tmp_path, name)
    source, want = open_weights(str(folder)), theirs(folder)
    assert np.abs(logits(source, TOKENS) - want).max() < 2e-5
    if "gate" in wrong:
        read = source.read

        def swapped(name, index=None):
            head, _, last = name.rpartition("w_")
            return read(f"{head}w_{wrong.get(last, last)}" if head else name, index)

        source.read = swapped
    else:
        source.model = dataclasses.replace(source.model, **wrong)
    assert np.abs(logits(source, TOKENS) - want).max() > 1e-2


def test_plain_orbax_restores_a_converted_checkpoint(tmp_path):
    conversion.to_jax(str(save(tmp_path, "olmo3")), str(tmp_path / "ours"), say=quiet)
    _, _, params = random_model("olmo3")
    with ocp.PyTreeCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "ours")
    want = storage.names({"params": params})
    assert storage.names(back).keys() == want.keys()
    for name, value in storage.names(back).items():
        assert np.array_equal(value, want[name])


def test_transformers_4_reads_the_exported_config_as_the_same(tmp_path):
    """Its classes take rope_theta and rope_scaling, those of 5 rope_parameters: both are there."""
    folder = save(tmp_path, "olmo3 yarn grouped")
    config = json.loads((convert(folder, tmp_path) / "config.json").read_text())
    yarn = config["rope_parameters"]["full_attention"]
    assert config["rope_scaling"] == {k: v for k, v in yarn.items() if k != "rope_theta"}
    assert config["rope_theta"] == yarn["rope_theta"] == 500_000.0
    assert config["rope_parameters"]["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": 500_000.0,
    }
