"""Any stretch of a file, from a folder or from a web server that behaves badly."""

import itertools
import os

import numpy as np
import pytest
import web

from olmo_jax.checkpoints.formats import folders

DATA = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(DATA.tobytes())
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(folders, "PART_BYTES", 9_000)
    with web.serving(folder) as server:
        yield server


@pytest.fixture(params=["local", "remote"])
def opened(request, folder, server):
    return folders.open(str(folder) if request.param == "local" else server.url)


def test_every_stretch_is_the_files(opened):
    for start, stop in itertools.combinations((0, 1, 8_999, 9_000, 50_001, 100_000), 2):
        np.testing.assert_array_equal(opened.read("sub/a.bin", start, stop), DATA[start:stop])
    np.testing.assert_array_equal(opened.read("sub/a.bin"), DATA)


def test_sizes_and_presence(opened):
    assert opened.size("sub/a.bin") == 100_000
    assert opened.has("sub/a.bin")
    assert not opened.has("b.bin")
    assert opened.size("empty") == len(opened.read("empty")) == 0


def test_files_inside_are_listed_where_there_is_a_list(folder, server):
    assert folders.open(str(folder)).inside("sub") == ["sub/a.bin"]
    assert folders.open(str(folder)).inside("none") == []
    assert folders.open(server.url).inside("sub") == []


def test_a_missing_file_is_named(opened):
    with pytest.raises(FileNotFoundError, match=r"b\.bin is missing"):
        opened.read("b.bin")


def test_reading_behind_the_end_says_that_the_file_is_truncated(opened):
    with pytest.raises(ValueError, match=r"a\.bin is truncated: it has 100,000 bytes, 100,001"):
        opened.read("sub/a.bin", 99_000, 100_001)


def test_a_file_that_shrinks_is_an_error_and_not_the_end_of_the_process(folder, monkeypatch):
    opened = folders.open(str(folder))
    before = opened.read("sub/a.bin")
    os.truncate(folder / "sub" / "a.bin", 50_000)
    np.testing.assert_array_equal(before, DATA)
    message = r"sub/a\.bin is truncated: it has 50,000 bytes, 60,000 are needed$"
    with pytest.raises(ValueError, match=message):
        opened.read("sub/a.bin", 40_000, 60_000)
    monkeypatch.setattr(folders.Local, "size", lambda *_: 100_000)  # as it was a moment ago
    with pytest.raises(ValueError, match=message):
        opened.read("sub/a.bin", 40_000, 60_000)


def test_a_stretch_costs_its_bytes_and_no_more(server):
    remote = folders.open(server.url)
    remote.read("sub/a.bin", 70_000, 70_100)
    assert server.n_bytes < 200


def test_errors_and_broken_connections_are_repeated(server):
    remote = folders.open(server.url)
    server.faults = ["503", "cut", "", "cut", "503", "503", "cut"]
    np.testing.assert_array_equal(remote.read("sub/a.bin"), DATA)
    assert not server.faults


def test_what_a_broken_connection_left_is_kept(server):
    remote = folders.open(server.url)
    remote.size("sub/a.bin")
    sent = server.n_bytes
    server.faults = ["cut"]
    remote.read("sub/a.bin", 0, 8_000)
    assert server.n_bytes - sent == 8_000


def test_a_server_that_stays_away_ends_in_one_line(server):
    server.faults = ["503"] * 100
    with pytest.raises(OSError, match=r"a\.bin: no answer after 6 attempts: HTTP 503") as error:
        folders.open(server.url).read("sub/a.bin")
    assert "\n" not in str(error.value)
    assert server.n_requests == 6


def test_no_server_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.001)
    with pytest.raises(OSError, match="no answer after 6 attempts"):
        folders.open("http://127.0.0.1:9").has("config.json")


def test_a_file_that_changes_while_it_is_read_is_refused(server):
    remote = folders.open(server.url)
    remote.size("sub/a.bin")
    for n in (50_000, 100_001):
        (server.folder / "sub" / "a.bin").write_bytes(bytes(n))
        with pytest.raises(OSError, match=r"a\.bin changed while it was read"):
            remote.read("sub/a.bin", 60_000, 60_010)


def test_a_server_without_ranges_is_refused_instead_of_read_whole(server):
    server.knows_ranges = False
    with pytest.raises(OSError, match="does not answer range requests"):
        folders.open(server.url).read("sub/a.bin", 10, 20)
