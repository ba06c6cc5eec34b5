"""Files of the safetensors format: what Hugging Face's reader refuses is refused here."""

import json

import numpy as np
import pytest
import safetensors as theirs
from safetensors.numpy import load

from olmo_jax.checkpoints.formats import folders, safetensors


def field(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write(path, header, n_bytes: int = 16, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(range(n_bytes)))


SOUND = {"a": field([2], 0, 8), "b": field([2, 1], 8, 16), "c": field([0, 9], 8, 8)}
REFUSED = {
    "two on the same bytes": ({"a": field([2], 0, 8), "b": field([3], 4, 16)}, "b overlaps with a"),
    "twice the same": ({"a": field([4], 0, 16), "b": field([4], 0, 16)}, "b overlaps with a"),
    "a gap": ({"a": field([1], 0, 4), "b": field([2], 8, 16)}, "b does not begin at the end of a"),
    "a gap at the beginning": ({"a": field([2], 8, 16)}, "does not begin at the end of the header"),
    "a rest": ({"a": field([3], 0, 12)}, "4 bytes behind the last tensor"),
    "beyond the file": ({"a": field([5], 0, 20)}, r"is truncated: \d+ bytes of \d+"),
    "no tensor": ({}, "16 bytes behind the last tensor"),
    "floats": ({"a": field([4], 0.0, 16.0)}, "header is damaged: a is .*need its dtype, shape and"),
    "a float shape": ({"a": field([4.0], 0, 16)}, "header is damaged: a is"),
    "true": ({"a": field([True], False, 4), "b": field([3], 4, 16)}, "header is damaged: a is"),
    "negative": ({"a": field([4], -16, 0)}, "header is damaged: a is"),
    "a negative shape": ({"a": field([-2, -2], 0, 16)}, "header is damaged: a is"),
    "backwards": ({"a": field([4], 16, 0)}, r"header is damaged: a \[4\] in -16 bytes"),
    "another size": ({"a": field([3], 0, 16)}, r"header is damaged: a \[3\] in 16 bytes"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, "header is damaged: a is"),
    "three offsets": ({"a": field([4], 0, 16) | {"data_offsets": [0, 8, 16]}}, "damaged: a is"),
    "null": ({"a": None}, "the header is damaged: a is None"),
    "a dtype that is none": ({"a": field([4], 0, 16, "F31")}, "a is F31; weights are one of"),
    "a dtype of another type": ({"a": field([4], 0, 16, ["F32"])}, "header is damaged: a is"),
    "a list": (b"[]", "header is no JSON object"),
    "text": (b'"abcd"', "header is no JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "header is no JSON: 'utf-8' codec"),
    "UTF-16": ("{}".encode("utf-16"), "header is no JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "more than 100 groups within each other"),
}  # fmt: skip
# What the format's description forbids and their reader lets pass.
ONLY_HERE = {
    "a key twice": (
        json.dumps(SOUND).replace('"b"', '"a"').encode(), "header is no JSON: 'a' is there twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *ONLY_HERE])
def test_a_header_that_cannot_be_right_is_refused_in_a_line_with_the_file(tmp_path, case):
    header, message = (REFUSED | ONLY_HERE)[case]
    write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=message) as caught:
        safetensors.entries(folders.open(str(tmp_path)), "x.safetensors")
    assert str(caught.value).startswith(f"{tmp_path}/x.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    if case in REFUSED:
        with pytest.raises(theirs.SafetensorError):
            theirs.safe_open(tmp_path / "x.safetensors", "np")


@pytest.mark.parametrize("length", [17, 2**40, 2**63])
def test_a_header_of_another_length_is_refused(tmp_path, length):
    write(tmp_path / "x.safetensors", SOUND, length=length)
    with pytest.raises(ValueError, match=r"x\.safetensors.* (is no|is truncated|header)"):
        safetensors.entries(folders.open(str(tmp_path)), "x.safetensors")


def test_tensors_in_any_order_and_empty_ones_are_read(tmp_path):
    write(tmp_path / "x.safetensors", dict(reversed(SOUND.items())))
    data = (tmp_path / "x.safetensors").read_bytes()
    folder = folders.open(str(tmp_path))
    found = safetensors.entries(folder, "x.safetensors")
    for key, want in load(data).items():
        np.testing.assert_array_equal(safetensors.load(folder, found[key]), want)


def test_the_metadata_of_a_header_are_no_tensor(tmp_path):
    write(tmp_path / "x.safetensors", SOUND | {"__metadata__": {"format": "pt"}})
    found = safetensors.entries(folders.open(str(tmp_path)), "x.safetensors")
    assert sorted(found) == ["a", "b", "c"]
