"""A kind of data is a class, chosen by `kind` after the file and all overrides."""

import dataclasses
import pathlib
import re
from typing import Literal

import pytest
import runs

from olmo_jax import config
from olmo_jax.config import changes, typed
from olmo_jax.config.data import KINDS, DataConfig, FixedLength
from olmo_jax.config.options import Count
from olmo_jax.config.renamed import RENAMED, modern
from olmo_jax.config.run import load
from olmo_jax.config.text import flatten, to_dict

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Boxes(DataConfig):
    """A toy kind."""

    kind: Literal["boxes"] = "boxes"
    n_boxes: Count = 7
    sizes: tuple[int, ...] = (1, 2)


@pytest.fixture
def boxes(monkeypatch):
    """The toy kind beside the real ones."""
    monkeypatch.setitem(KINDS, "boxes", Boxes)
    typed.hints.cache_clear()
    yield
    typed.hints.cache_clear()


def loaded(tmp_path, *lines: str, **overrides: str) -> DataConfig:
    path = tmp_path / "c.py"
    body = "".join(f"    {line}\n" for line in ("c = config.default()", *lines, "return c"))
    path.write_text(f"from olmo_jax import config\n\n\ndef get_config():\n{body}")
    return load(str(path), {k.replace("__", "."): v for k, v in overrides.items()}).data


def test_the_kind_is_chosen_after_file_and_overrides_in_any_order(boxes, tmp_path):
    assert loaded(tmp_path) == FixedLength()
    expected = Boxes(n_boxes=3, seq_len=64)
    in_file = ("c.data.kind = 'boxes'", "c.data.n_boxes = 3", "c.data.seq_len = 64")
    assert loaded(tmp_path, *in_file) == loaded(tmp_path, *reversed(in_file)) == expected
    typed_in = {"data__kind": "boxes", "data__n_boxes": "3", "data__seq_len": "64"}
    assert loaded(tmp_path, **typed_in) == expected
    assert loaded(tmp_path, **dict(reversed(typed_in.items()))) == expected
    assert loaded(tmp_path, *in_file, data__kind="fixed_length", data__n_boxes="7") == FixedLength(
        seq_len=64
    )
    assert loaded(tmp_path, data__kind="boxes", data__sizes="3,4").sizes == (3, 4)


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            {"data__n_boxes": "3"},
            ["config.data.n_boxes: an option of config.data.kind=boxes, found kind=fixed_length"],
        ),
        (
            {"data__kind": "boxes", "data__order": "legacy"},
            ["config.data.order: an option of config.data.kind=fixed_length, found kind=boxes"],
        ),
        (
            {"data__kind": "box"},
            ["config.data.kind: found 'box', need one of fixed_length, boxes"],
        ),
        (
            {"data__kind": "boxes", "data__n_box": "3"},
            ["config.data.n_box: unknown option; did you mean n_boxes?"],
        ),
        (
            {"data__kind": "boxes", "data__n_boxes": "x"},
            ["config.data.n_boxes: found 'x', need int"],
        ),
    ],
)
def test_an_option_of_another_kind_is_named_with_its_kind(boxes, tmp_path, overrides, lines):
    with pytest.raises(config.ConfigError) as error:
        loaded(tmp_path, **overrides)
    assert error.value.problems == lines


def test_a_checkpoint_without_a_kind_is_of_fixed_length(boxes):
    old = to_dict(config.Config())
    del old["data"]["kind"]
    assert config.from_dict(old).data == FixedLength()
    assert changes.between(old, to_dict(config.Config())) == []
    now = to_dict(dataclasses.replace(config.Config(), data=Boxes()))
    found = {change.key: str(change) for change in changes.between(old, now)}
    assert found["data.kind"] == (
        "config.data.kind: 'fixed_length' -> 'boxes'; the data comes in another order from here on"
    )


def test_options_of_several_kinds_have_one_default():
    defaults: dict = {}
    for kind in KINDS.values():
        for field in dataclasses.fields(kind):
            if field.name != "kind":
                assert defaults.setdefault(field.name, field.default) == field.default
    assert all(KINDS[name]().kind == name for name in KINDS)


def test_an_attention_that_an_older_version_left_to_choose_is_no_change():
    old, new = (to_dict(config.Config()) for _ in range(2))
    new["compute"]["attention"] = "blocked"
    assert changes.between(old, new) == []
    old["compute"]["attention"] = "reference"
    assert [change.key for change in changes.between(old, new)] == ["compute.attention"]


# --- other names ----------------------------------------------------------------------------------


def test_renamed_options_are_told_by_name_and_read_in_old_checkpoints(tmp_path):
    known = flatten(to_dict(config.Config()))
    text = (ROOT / "docs/changes.md").read_text()
    assert dict(re.findall(r"^\| `([a-z]+\.\w+)` \| `([a-z]+\.\w+)` \|$", text, re.M)) == RENAMED
    for old, new in RENAMED.items():
        assert new in known
        assert old not in known
        result = runs.run("data.paths=x.npy", f"{old}=3", "--dry_run")
        assert result.errors == [f"config.{old}: is now {new}"]
        part, name = old.split(".")
        with pytest.raises(config.ConfigError, match=f"config.{old}: is now {new}"):
            config.from_dict({part: {name: known[new]}})
        found = changes.between({part: {name: 99}}, to_dict(config.Config()))
        assert [(change.key, change.old) for change in found] == [(new, 99)]
    assert modern({"data": {"threads": 3, "seq_len": 4}, "name": "x"}) == {
        "data": {"n_threads": 3, "seq_len": 4},
        "name": "x",
    }
