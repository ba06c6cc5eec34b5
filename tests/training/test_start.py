"""What the checkpoints of a run keep of the one that it starts from."""

import pathlib

import pytest

from olmo_jax import files
from olmo_jax.checkpoints import storage
from olmo_jax.training.origin import Origin, kept

FILES = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "generation_config.json": b"1"}
IDS = {"eos_token_id": [7, 9], "bos_token_id": None, "pad_token_id": 3}


def source(folder: pathlib.Path, meta: dict, carried: dict, *, is_resume: bool = False) -> Origin:
    """A checkpoint without arrays."""
    path = files.path(folder / "source")
    storage.ArrayWriter(path, {}).commit({"model": {}, "config": {}} | meta, files=carried)
    return Origin(path, ("params",), is_resume, "")


@pytest.mark.parametrize("name", ["tokenizer.json", "of_mine", "mine.txt"])
def test_the_same_tokenizer_named_again_keeps_all_that_belongs_to_it(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(FILES["tokenizer.json"])
    before = source(tmp_path, {"token_ids": IDS}, FILES)
    assert kept(before, str(tmp_path / name)) == ({"token_ids": IDS}, FILES)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_another_tokenizer_is_kept_alone_and_a_line_says_so(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"another")
    before = source(tmp_path, {"token_ids": IDS}, FILES)
    assert kept(before, str(tmp_path / name)) == ({}, {name: b"another"})
    assert capsys.readouterr().out == (
        f"data.tokenizer: not the one of {tmp_path}/source, so its special tokens and files are not"
        " kept: chat_template.jinja, generation_config.json, tokenizer.json\n"
    )


def test_a_tokenizer_joins_a_source_that_has_none(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    others = {name: FILES[name] for name in FILES if name != "tokenizer.json"}
    found = kept(source(tmp_path, {}, others), str(tmp_path / "tokenizer.json"))
    assert found.carried == FILES
    assert kept(None, str(tmp_path / "tokenizer.json")).carried == {"tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("meta", "is_resume", "ids"),
    [
        ({"token_ids": dict.fromkeys(IDS)}, False, dict.fromkeys(IDS)),  # said to be none
        ({"token_ids": IDS}, True, IDS),
        ({"config": {"data": {"eos_id": 2}}}, False, dict.fromkeys(IDS) | {"eos_token_id": 2}),
        ({"config": {"data": {"eos_id": 2}}}, True, None),  # the run's own, which may be mended
        ({"config": {"data": {"eos_id": None}}}, False, None),
    ],
)
def test_special_tokens_are_those_of_the_source(tmp_path, meta, is_resume, ids):
    found = kept(source(tmp_path, meta, {}, is_resume=is_resume), None).meta
    assert found.get("token_ids") == ids
