"""The table of parameters against the model itself, and the change of layout."""

import numpy as np
import pytest
import safetensors.numpy
from hf import FAMILIES, random_model

from olmo_jax import presets
from olmo_jax.checkpoints import names, storage
from olmo_jax.checkpoints.formats.stacked import keys_of
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import axis_sizes
from olmo_jax.nn import transformer


@pytest.mark.parametrize("name", presets.MODELS)
@pytest.mark.parametrize("whose", names.LAYERS)
def test_the_table_has_exactly_the_parameters_of_the_model(name, whose):
    model = ModelConfig(**presets.MODELS[name])
    tree = transformer.abstract_params(model)
    lengths = axis_sizes(model)
    table = {
        row.ours: (model.n_layers,) * row.is_layered + names.shape(row.axes, lengths)
        for row in names.rows(model, whose)
    }
    assert table == {name: leaf.shape for name, leaf in storage.names(tree).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_layouts_are_those_of_transformers(name, tmp_path):
    theirs, model, params = random_model(name)
    theirs.save_pretrained(tmp_path)  # experts are one tensor in memory and many in the file
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    ours, lengths = storage.names(params), axis_sizes(model)
    seen = set()
    for row in names.rows(model, "Hugging Face"):
        leaf = np.asarray(ours[row.ours])
        leaves = leaf.reshape(-1, *names.shape(row.inner_axes, lengths))
        for key, leaf in zip(keys_of(row, model), leaves, strict=True):
            there = names.view(state[key], row.torch_axes, row.inner_axes, lengths)
            assert np.array_equal(there, leaf), key
            back = names.view(leaf, row.inner_axes, row.torch_axes, lengths)
            assert np.array_equal(back, state[key])
            seen.add(key)
    assert seen == state.keys() - ({"lm_head.weight"} if model.tie_embeddings else set())


def test_reading_in_our_layout_copies_nothing():
    lengths = {"n": 4, "h": 8, "d": 16}
    array = np.arange(32 * 16).reshape(32, 16)
    assert names.view(array, "(n h) d", "d n h", lengths).base is not None
    assert np.shares_memory(names.view(array, "(n h) d", "d n h", lengths), array)
    assert np.shares_memory(names.view(array.T, "d (n h)", "n h d", lengths), array)


def test_a_wrong_shape_is_named_with_the_right_one():
    with pytest.raises(ValueError, match=r"has shape \(16, 32\), need \(32, 16\)"):
        names.view(np.zeros((16, 32)), "(n h) d", "d n h", {"n": 4, "h": 8, "d": 16})
