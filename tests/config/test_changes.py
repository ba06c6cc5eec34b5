"""Which options differ from a checkpoint's, whatever way they are written, and what is refused."""

import re

import pytest

from olmo_jax.config.changes import between, refuse
from olmo_jax.config.run import Config, from_dict
from olmo_jax.config.text import to_dict


def changes_of(**new):
    return between(to_dict(Config()), to_dict(from_dict(new)))


def test_changes_are_listed_with_old_and_new_values():
    found = changes_of(optim={"lr": 5e-4}, data={"seed": 1}, train={"duration": 20})
    assert [tuple(change) for change in found] == [
        ("data.seed", 34521, 1),
        ("optim.lr", 3e-4, 5e-4),
        ("train.duration", 1000, 20),
    ]
    assert [str(change) for change in found] == [
        "config.data.seed: 34521 -> 1; the data comes in another order from here on",
        "config.optim.lr: 0.0003 -> 0.0005",
        "config.train.duration: 1000 -> 20",
    ]
    refuse(found, ())  # LR, durations and data follow the new config


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 1e4), ("norm_eps", 1e-5), ("head_dim", 64), ("clip_qkv", 8.0), ("n_layers", 8)],
)
def test_a_changed_function_is_refused_unless_allowed_by_name(key, value):
    found = changes_of(model={key: value})
    with pytest.raises(ValueError, match=rf"config\.model\.{key}={value}.*allow_changes"):
        refuse(found, ())
    refuse(found, {change.key for change in found})


def test_all_refused_changes_are_named_at_once_and_initialization_is_free():
    found = changes_of(model={"rope_theta": 1e4, "yarn_factor": 8.0, "init_std": 0.01})
    with pytest.raises(ValueError) as caught:
        refuse(found, ("model.yarn_factor",))
    assert "config.model.rope_theta=10000.0, but the checkpoint was trained with 500000.0" in str(
        caught.value
    )
    assert "yarn_factor" not in str(caught.value)
    assert "init_std" not in str(caught.value)


def test_a_repeated_list_of_layer_types_and_an_option_added_later_are_no_changes():
    model = {"n_layers": 4, "layer_types": ("sliding", "full"), "window": 8}
    old, new = to_dict(from_dict({"model": model})), dict(model)
    new["layer_types"] = ("sliding", "full") * 2
    assert between(old, to_dict(from_dict({"model": new}))) == []
    del old["model"]["clip_qkv"]
    assert between(old, to_dict(from_dict({"model": new}))) == []
    only_model = {"model": old["model"]}
    assert between(only_model, to_dict(from_dict({"model": new, "name": "b"}))) == []


SLIDING = {"n_layers": 4, "layer_types": ("sliding", "full"), "window": 8}
YARN = SLIDING | {"yarn_factor": 8.0, "yarn_original_len": 16}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (YARN, YARN | {"yarn_attention_factor": 1.2079441541679836}),  # 0.1 ln 8 + 1
        (YARN, YARN | {"layer_types": ("sliding", "full", "sliding", "full")}),
        ({"vocab_size": 512}, {"vocab_size": 512, "padded_vocab_size": 512}),
        ({}, {"window": 8}),  # no layer slides
        (SLIDING, SLIDING | {"yarn_original_len": 16, "yarn_beta_fast": 16.0}),  # no YaRN
        ({}, {"n_experts_per_token": 2, "normalize_expert_weights": True}),  # no experts
    ],
)
def test_the_same_function_in_other_words_is_no_change(old, new):
    old, new = ({"model": to_dict(from_dict({"model": model}).model)} for model in (old, new))
    assert between(old, new) == between(new, old) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (YARN, YARN | {"yarn_attention_factor": 1.2}, ("yarn_attention_factor", None, 1.2)),
        (YARN, YARN | {"yarn_factor": 4.0}, ("yarn_factor", 8.0, 4.0)),
        (SLIDING, SLIDING | {"window": 4}, ("window", 8, 4)),
        (SLIDING, YARN | {"yarn_beta_fast": 16.0}, ("yarn_factor", None, 8.0)),
        ({"window": 4}, SLIDING | {"n_layers": 16}, ("layer_types", ["full"], ["sliding", "full"])),
        ({}, {"n_experts": 4, "n_experts_per_token": 2}, ("n_experts", 0, 4)),
        ({}, {"padded_vocab_size": 100_480}, ("padded_vocab_size", None, 100_480)),
    ],
)
def test_another_function_is_one_change_in_the_words_of_the_config(old, new, found):
    old, new = ({"model": to_dict(from_dict({"model": model}).model)} for model in (old, new))
    key, *values = found
    assert [tuple(c) for c in between(old, new)] == [(f"model.{key}", *values)]


@pytest.mark.parametrize(
    "wrong",
    [{"yarn_factor": -8.0}, {"yarn_factor": "8"}, {"layer_types": 5}, {"layer_types": "full"},
     {"n_layers": None}, {"n_layers": "4"}, {"layer_types": []}],
)  # fmt: skip
def test_what_a_damaged_checkpoint_says_is_a_change(wrong):
    (key, value), sound = next(iter(wrong.items())), to_dict(from_dict({"model": YARN}).model)
    found = between({"model": sound | wrong}, {"model": sound})
    assert (f"model.{key}", value) in [(c.key, c.old) for c in found]
    with pytest.raises(ValueError, match=f"trained with {re.escape(repr(value))}"):
        refuse(found, ())


def test_options_of_a_guard_that_is_off_are_no_change_of_the_state():
    off = {"name": "adamw", "skip_window": 8}
    old, new = ({"optim": to_dict(from_dict({"optim": o}).optim)} for o in ({"name": "adamw"}, off))
    assert between(old, new) == []
    found = changes_of(optim={"skip_window": 8})
    with pytest.raises(ValueError, match=r"config\.optim\.skip_window=8, but .* trained with 128"):
        refuse(found, (), ("params", "opt_state"))
