"""Files of others are read strictly, and say in one line what is wrong with them."""

import json
import os

import pytest

from olmo_jax import files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f.json is no JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"a": 1', "f.json is no JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b"[1]", "f.json is no JSON object"),
        (b"null", "f.json is no JSON object"),
        (b'{"a": 1, "b": 2, "a": 1}', "f.json is no JSON: 'a' is there twice"),
        (b'{"x": {"a": 1, "a": 2}}', "f.json is no JSON: 'a' is there twice"),
        (b'{"a": NaN}', "f.json is no JSON: NaN is no number of JSON"),
        (b'{"a": -Infinity}', "f.json is no JSON: -Infinity is no number of JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f.json is no JSON: an integer of 5000 digits"),
        (b"\xef\xbb\xbf{}", "f.json is no JSON: Unexpected UTF-8 BOM (decode using utf-8-sig)"),
        (b'{"a": "\xff"}', "f.json is no JSON: 'utf-8' codec can't decode byte 0xff in position 7"),
        ("{}".encode("utf-16"), "f.json is no JSON: 'utf-8' codec can't decode byte 0xff in"),
        (b"[" * 100_000, "f.json is damaged: more than 100 groups within each other"),
        (b'{"a":' * 100_000, "f.json is damaged: more than 100 groups within each other"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "f.json is damaged: more than 100 groups within"),
    ],
)
def test_what_is_no_object_of_json_is_refused_in_a_line_with_the_file(data, message):
    with pytest.raises(ValueError) as caught:
        files.json_object(data, "f.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_sound_objects_are_what_json_says():
    value = {"a": [1, 2.5, -(2**63), True, None, {"ü": "\U0001f600 \\ \n"}], "b": {}}
    assert files.json_object(json.dumps(value).encode(), "f.json") == value
    deep = b'{"a":' * 100 + b"1" + b"}" * 100
    assert files.json_object(deep, "f.json") == json.loads(deep)


@pytest.mark.parametrize("name", ["a", "a.b", "a/b.json", "...", "ü", "a b"])
def test_names_of_files_in_a_folder_are_inside_it(name):
    assert files.is_inside(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", "C:\\a", "C:a", "..\\a", "a\0", "a\nb", 5,
     None, ["a"]],
)  # fmt: skip
def test_names_that_may_lead_out_of_it_are_not(name):
    assert not files.is_inside(name)


def test_a_file_written_whole_keeps_its_mode_its_links_and_what_is_no_file(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    with files.whole(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new", 0o600)
    with pytest.raises(ValueError, match="no"), files.whole(target) as file:
        file.write(b"half")
        raise ValueError("no")
    assert target.read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with files.whole(tmp_path / "pipe") as file:
        file.write(b"bytes")
    assert os.read(reader, 10) == b"bytes"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]
