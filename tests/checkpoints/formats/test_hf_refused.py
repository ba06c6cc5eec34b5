"""Hugging Face folders that cannot be right are refused by name, and nothing is left behind."""

import json
import os
import pathlib
import re

import jax.numpy as jnp
import made
import numpy as np
import pytest
from hf import random_model
from safetensors.numpy import load_file, save_file
from test_hf import TOKENS, convert, quiet, save, tensors, theirs

import olmo_jax
from olmo_jax.checkpoints import compare, conversion, layout, weights
from olmo_jax.checkpoints.formats import hf
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.logits import logits


def refused(folder: pathlib.Path, tmp_path: pathlib.Path, message: str) -> None:
    """All ways in refuse the folder with one line, and leave nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    ways = (
        lambda: conversion.to_jax(str(folder), str(tmp_path / "new"), say=quiet),
        lambda: conversion.to_hf(str(folder), str(tmp_path / "new"), say=quiet),
        lambda: conversion.check(str(folder), str(folder), say=quiet),
        lambda: olmo_jax.load(str(folder)),
    )
    for way in ways:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            way()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def edit(folder: pathlib.Path, change) -> None:
    """Change the one safetensors file of a folder."""
    state = load_file(folder / "model.safetensors")
    change(state)
    state = {key: np.ascontiguousarray(value) for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_shard_is_named(tmp_path):
    folder = save(tmp_path, "olmo2", max_shard_size="40KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    refused(folder, tmp_path, f"{lost.name}, which model.safetensors.index.json names, is missing")


@pytest.mark.parametrize("keep", [3, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = save(tmp_path, "olmo2") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(file.parent, tmp_path, r"model\.safetensors is truncated")


def test_a_file_that_shrinks_under_way_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    file = save(tmp_path, "olmo2") / "model.safetensors"
    assign, size = conversion.arrays.assign, file.stat().st_size

    def shrinking(out, values):  # what was read before is used after
        os.truncate(file, size - 100)
        assign(out, values)

    monkeypatch.setattr(conversion.arrays, "assign", shrinking)
    message = rf"{file} is truncated: it has {size - 100:,} bytes, {size:,} are needed"
    with pytest.raises(ValueError, match=message):
        conversion.to_jax(str(file.parent), str(tmp_path / "new"), say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == [file.parent.name]


def test_a_tensor_that_no_shard_has_is_named(tmp_path):
    folder = save(tmp_path, "olmo2", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra.weight"] = value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))
    refused(folder, tmp_path, r"lists model\.extra\.weight in .*which is not there")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/tmp/x.safetensors", "C:\\x.safetensors", "a/../../x", "..", "", None, 5],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, file):
    folder, name = save(tmp_path, "olmo2", max_shard_size="40KB"), "model.safetensors.index.json"
    index = json.loads((folder / name).read_text())
    (tmp_path / "x.safetensors").write_bytes((folder / "config.json").read_bytes())
    index["weight_map"]["model.norm.weight"] = file
    (folder / name).write_text(json.dumps(index))
    message = f"{name}: model.norm.weight is in {file!r}, which is no file of this folder"
    refused(folder, tmp_path, re.escape(message))


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path):
    folder = save(tmp_path, "olmo2", max_shard_size="40KB")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    key = "model.embed_tokens.weight"
    save_file(load_file(last) | {key: load_file(first)[key]}, last, metadata={"format": "pt"})
    refused(folder, tmp_path, f"{key} is there twice: in {first.name} and in {last.name}")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    folder = save(tmp_path, "olmo2")

    def change(state):
        state["model.norm.weight"] = state["model.norm.weight"][:-1]
        state["model.layers.2.mlp.bias"] = state.pop("model.layers.2.mlp.up_proj.weight")

    edit(folder, change)
    refused(folder, tmp_path, r"missing model\.layers\.2\.mlp\.up_proj\.weight")
    refused(folder, tmp_path, r"left over model\.layers\.2\.mlp\.bias")
    refused(folder, tmp_path, r"model\.norm\.weight has shape \[63\], need \[64\]")


def test_a_dtype_that_is_no_weight_is_refused(tmp_path):
    folder = save(tmp_path, "olmo2")
    edit(folder, lambda state: state.update({"model.norm.weight": np.zeros(64, np.int8)}))
    refused(folder, tmp_path, r"model\.norm\.weight is I8; weights are one of")


def test_old_tables_of_frequencies_are_no_weights(tmp_path):
    folder = save(tmp_path, "olmo2")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda state: state.update({name: np.ones(8, np.float32)}))
    assert np.array_equal(theirs_params(folder), theirs_params(save(tmp_path / "b", "olmo2")))


def theirs_params(folder: pathlib.Path) -> np.ndarray:
    return logits(open_weights(str(folder)), TOKENS)


def test_olmo_2_presented_as_olmo_1_is_refused(tmp_path):
    folder = save(tmp_path, "olmo2")
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"]
    config |= {"architectures": ["OlmoForCausalLM"], "model_type": "olmo"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, r"left over .*layernorm|left over .*norm")


def test_no_weights_at_all_is_said(tmp_path):
    folder = save(tmp_path, "olmo2")
    (folder / "model.safetensors").unlink()
    refused(folder, tmp_path, "no weights beside config.json")


def test_what_is_there_is_not_overwritten(tmp_path):
    folder = save(tmp_path, "olmo2")
    there = tmp_path / "there"
    there.mkdir()
    for verb in (conversion.to_jax, conversion.to_hf):
        with pytest.raises(FileExistsError, match="is there already and is not overwritten"):
            verb(str(folder), str(there), say=quiet)
    assert not list(there.iterdir())


REST = "weights that are not finite are not converted; take an earlier checkpoint"


@pytest.mark.parametrize(
    ("value", "found", "options"),
    [
        (np.nan, "nan", {}),
        (-np.inf, "-inf", {}),
        (3.4e38, "inf", {"dtype": "bfloat16"}),  # rounds up to it
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name_and_place(tmp_path, value, found, options):
    folder, new = save(tmp_path, "olmo2"), str(tmp_path / "new")
    key, ours = "model.layers.2.mlp.down_proj.weight", "params/layers/mlp/w_down"
    edit(folder, lambda state: state[key].__setitem__((41, 7), value))
    dtype = options.get("dtype", "float32")
    ways = {
        f"{key} is {found} at [41, 7] as {dtype}": [
            lambda: conversion.to_hf(str(folder), new, **options, say=quiet)
        ],
        f"{ours} is {found} at [2, 7, 41] as {dtype}": [
            lambda: conversion.to_jax(str(folder), new, **options, say=quiet),
            *([] if options else [lambda: conversion.average([str(folder)] * 2, new, say=quiet)]),
        ],
    }
    for line, calls in ways.items():
        for call in calls:
            with pytest.raises(ValueError) as caught:
                call()
            assert str(caught.value) == f"{line}: {REST}"
            assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_row_of_a_table_that_is_not_finite_is_named_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 8 * 64 * 4)  # the table in pieces of eight rows
    folder = save(tmp_path, "olmo2")
    key = "model.embed_tokens.weight"
    edit(folder, lambda state: state[key].__setitem__((90, 3), np.inf))
    for verb, name in ((conversion.to_hf, key), (conversion.to_jax, "params/embed")):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)} is inf at \[90, 3\] as float32"):
            verb(str(folder), str(tmp_path / "new"), say=quiet)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_all_finite_numbers_are_finite_and_no_others(dtype):
    dtype = jnp.dtype(dtype)
    largest = float(jnp.finfo(dtype).max)
    values = np.array([[0.0, -0.0, 1e-7], [largest, -largest, -1e-7]], dtype)
    compare.refuse_nonfinite("x", values, (0, 0))
    compare.refuse_nonfinite("x", values.T, (0, 0))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values[1, 2] = bad
        with pytest.raises(ValueError, match=rf"^x is {bad} at \[5, 2\]"):
            compare.refuse_nonfinite("x", values, (4, 0))


# --- tied tables: transformers#38870 and its like -------------------------------------------------


def test_a_tied_model_of_which_only_the_head_is_stored_is_read(tmp_path):
    folder = save(tmp_path, "olmo1 tied")
    want = theirs(folder)

    def rename(state):
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")

    edit(folder, rename)
    model, params = olmo_jax.load(str(folder))
    assert np.abs(np.asarray(made.logits_of(model, params, TOKENS)) - want).max() < 2e-5
    back = convert(folder, tmp_path)
    assert np.array_equal(theirs(back), want)
    assert conversion.check(str(folder), str(back), say=quiet)


@pytest.mark.parametrize("same", [True, False])
def test_tied_tables_stored_twice_must_be_the_same(tmp_path, same):
    folder = save(tmp_path, "olmo1 tied")

    def add(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
        state["lm_head.weight"][96, 63] += 0 if same else 1e-3

    edit(folder, add)
    if same:
        assert tensors(convert(folder, tmp_path)).keys() == tensors(folder).keys() - {
            "lm_head.weight"
        }
    else:
        message = "lm_head.weight and model.embed_tokens.weight differ"
        refused(folder, tmp_path, re.escape(message))


@pytest.mark.parametrize("name", ["olmo1 untied", "olmo2"])
def test_an_untied_head_that_is_missing_is_never_made_up(tmp_path, name):
    folder = save(tmp_path, name)
    edit(folder, lambda state: state.pop("lm_head.weight"))
    refused(folder, tmp_path, r"missing lm_head\.weight")


def test_a_tied_model_in_small_shards_has_an_index_that_says_the_truth(tmp_path):
    """pytorch/torchtitan#3764: an index with the tied head, a shard with nothing in it."""
    folder = save(tmp_path, "olmo1 tied")
    back = convert(folder, tmp_path, max_shard_bytes=10_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    stored = {}
    for file in back.glob("*.safetensors"):
        found = load_file(file)
        assert found, file
        stored |= dict.fromkeys(found, file.name)
    assert index["weight_map"] == stored
    assert "lm_head.weight" not in stored
    n_bytes = sum(len(data) for *_, data in tensors(back).values())
    assert index["metadata"]["total_size"] == n_bytes
    model = random_model("olmo1 tied")[0]
    assert n_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert np.array_equal(theirs(back), theirs(folder))
    assert hf.recognises(str(back))
