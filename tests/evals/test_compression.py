import platform
import random
import sysconfig
from pathlib import Path

import pytest

from olmo_jax.curation import stdlib
from olmo_jax.evals import compression


def test_random_bytes_do_not_compress_and_zeros_do():
    noise = compression.compressed_bits_per_byte(random.Random(0).randbytes(20_000))
    zeros = compression.compressed_bits_per_byte(bytes(20_000))
    assert list(noise) == list(zeros) == ["gzip -9", "xz -9"]
    assert all(8.0 < bits < 8.1 for bits in noise.values())
    assert all(0.0 < bits < 0.1 for bits in zeros.values())


def test_held_out_library_text_compresses_as_measured():
    library = stdlib.read_sources(Path(sysconfig.get_paths()["stdlib"]))
    text = "".join(text for name, text in library.items() if stdlib.is_heldout(name))
    bits = compression.compressed_bits_per_byte(text.encode())
    if platform.python_version() == "3.11.7":
        assert bits == {"gzip -9": pytest.approx(1.926, abs=6e-4), "xz -9": pytest.approx(1.586, abs=6e-4)}  # fmt: skip  # noqa: E501
    assert 1.4 < bits["xz -9"] < bits["gzip -9"] < 2.1


def test_xz_is_left_out_where_python_lacks_it(monkeypatch):
    monkeypatch.setattr(compression, "lzma", None)
    assert list(compression.compressed_bits_per_byte(b"text")) == ["gzip -9"]


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="no held-out text"):
        compression.compressed_bits_per_byte(b"")
