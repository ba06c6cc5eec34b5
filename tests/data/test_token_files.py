import concurrent.futures
import errno
import gzip
import json
import os
import re
import resource

import numpy as np
import pytest

from olmo_jax import files
from olmo_jax.data import token_files
from olmo_jax.data.token_files import TokenFile, TokenFiles

U16 = np.dtype("<u2")


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/data_order.json").read_text())


def write(folder, dtype=np.uint16, **named):
    """Token files `name.npy` in `folder`, as their makers write them."""
    for name, ids in named.items():
        np.asarray(ids, dtype).tofile(folder / f"{name}.npy")
    return [str(folder / f"{name}.npy") for name in named]


def test_the_source_permutation_is_that_of_olmo_core(golden, tmp_path):
    for case in golden["source_permutation"]:
        names = write(tmp_path, **{f"p{i:02}": [1] for i in range(case["n"])})
        found = token_files.resolve_paths(names, permutation_seed=case["seed"])
        assert found == [names[i] for i in case["order"]]


def test_globs_are_sorted_in_place_and_leave_side_files_out(tmp_path):
    write(tmp_path, b=[1], a=[1], z=[1])
    (tmp_path / "a.csv.gz").touch()
    (tmp_path / "part[0].npy").write_bytes(b"\1\0")
    paths = ["z.npy", "[ab].*", "part[0].npy", str(tmp_path / "b.npy")]
    found = token_files.resolve_paths(paths, root=str(tmp_path))
    names = ["z.npy", "a.npy", "b.npy", "part[0].npy", "b.npy"]
    assert found == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.npy", r"config\.data\.paths: no such token file: .*none\.npy"),
        ("none*.npy", r"config\.data\.paths: no token file matches .*none\*\.npy"),
        (".", r"config\.data\.paths: no such token file"),
    ],
)
def test_a_missing_file_is_named(tmp_path, path, message):
    with pytest.raises(FileNotFoundError, match=message):
        token_files.resolve_paths([path], root=str(tmp_path))


def test_no_files_are_refused():
    with pytest.raises(ValueError, match=r"config\.data\.paths: no token files"):
        TokenFiles([], U16)


def test_a_remote_file_is_refused():
    with pytest.raises(ValueError, match=r"config\.data\.paths: gs://b/a\.npy is remote"):
        token_files.resolve_paths(["a.npy"], root="gs://b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"config\.data\.paths: .*a\.npy is empty"),
        (b"\0" * 7, r"a\.npy has 7 bytes, no multiple of the 2 of uint16.*config\.data\.dtype"),
        (b"\x93NUMPY\1\0" * 16, r"a\.npy has a NumPy header; need the bare array"),
        (gzip.compress(b"0,5,x\n", mtime=0), r"a\.npy is a gzip file; need the bare array of ids"),
        (b"PAR1\x15\4\x15", r"a\.npy is a Parquet file"),  # whatever its size
        (b'\x40\1\0\0\0\0\0\0{"__met', r"a\.npy is a safetensors file"),
        (b"MMIDIDX\0\0\1", r"a\.npy is Megatron's index, whose ids are in the \.bin file"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenFiles([str(tmp_path / "a.npy")], U16)


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(200, "uint8"), (256, "uint8"), (257, "uint16"), (50_280, "uint16"), (65_536, "uint16"),
     (65_537, "uint32"), (100_278, "uint32")],
)  # fmt: skip
def test_the_type_of_tokens_is_the_smallest_that_holds_the_vocabulary(vocab_size, name):
    assert token_files.token_dtype(None, vocab_size) == np.dtype(name)
    assert token_files.token_dtype("uint32", vocab_size) == np.uint32


def test_the_fingerprint_is_that_of_olmo_core(golden, tmp_path):
    case = golden["core_fsl_toy"]
    listed = TokenFiles(write(tmp_path, a=case["files"]["a.npy"], b=case["files"]["b.npy"]), U16)
    found = token_files.fingerprint(listed, case["vocab_size"], case["eos_token_id"], pad_id=1)
    assert found == case["fingerprint"]


# --- what is there instead ------------------------------------------------------------------------


def folder_of(tmp_path, *names):
    for name in names:
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    return tmp_path / "there"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["a.npy", "b.npy"], "a folder of token files: config.eval.paths={}/*.npy"),
        (["dolma/a.npy"], "a folder with token files further below: config.eval.paths={}/**/*.npy"),
        (["commit_success.txt"], "a run or a checkpoint of olmo_jax; it goes to config.checkpoint"),
        (["checkpoints/step1/x"], "a run or a checkpoint of olmo_jax; it goes to config.checkpoin"),
        (["adapter_config.json"], "an adapter (PEFT) of a model, no model by itself"),
        (
            ["models--allenai--OLMo-2-1124-7B/refs/main"],
            "the Hub's cache of allenai/OLMo-2-1124-7B",
        ),
        (["config.json", "model_and_optim/.metadata"], "a checkpoint of OLMo-core, taken by: pyth"),
        (["0000.parquet", "dataset_info.json"], "a folder of documents such as 0000.parquet; a to"),
        (["part.jsonl.zst"], "a folder of documents such as part.jsonl.zst; a tokenizer makes tok"),
        (["x.py"], "a folder without token files"),
    ],
)
@pytest.mark.parametrize("pattern", ["{}", "{}[e]"])
def test_a_folder_is_told_with_what_takes_it(tmp_path, names, what, pattern):
    folder = folder_of(tmp_path, *names)
    path = pattern.format(str(folder)[:-1] if "[" in pattern else folder)
    begin = "no token file matches {}, but {}, " if "[" in pattern else "no such token file: {}, "
    message = f"config.eval.paths: {begin.format(path, folder)}{what.format(folder)}"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}") as caught:
        token_files.resolve_paths([path], option="config.eval.paths")
    assert "\n" not in str(caught.value)


def test_a_hugging_face_folder_is_told_with_the_command_that_takes_it(tmp_path):
    folder = folder_of(tmp_path, "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["Olmo2ForCausalLM"]}')
    message = (
        f"config.data.paths: no such token file: {folder}, a Hugging Face folder"
        f" (Olmo2ForCausalLM), taken by: python -m olmo_jax.convert to_jax {folder} OUT"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        token_files.resolve_paths([str(folder)])


@pytest.mark.parametrize("pattern", ["x.npy", "*.npy"])
def test_what_is_no_regular_file_is_refused_and_never_left_out(tmp_path, pattern):
    write(tmp_path, a=[1])
    odd = tmp_path / "x.npy"
    os.mkfifo(odd)
    makers = {
        "which is no regular file": lambda: os.mkfifo(odd),
        "a link to gone.npy, which leads nowhere": lambda: odd.symlink_to("gone.npy"),
        "a link to x.npy, which leads nowhere": lambda: odd.symlink_to("x.npy"),  # in a circle
    }
    for what, make in makers.items():
        odd.unlink()
        make()
        message = f"config.data.paths: no such token file: {odd}, {what}"
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            token_files.resolve_paths([pattern], root=str(tmp_path))
    odd.unlink()
    odd.symlink_to("a.npy")
    assert str(odd) in token_files.resolve_paths([pattern], root=str(tmp_path))
    odd.unlink()
    odd.mkdir()
    if pattern == "x.npy":
        with pytest.raises(FileNotFoundError, match=r"x\.npy, an empty folder$"):
            token_files.resolve_paths([pattern], root=str(tmp_path))
    else:  # folders beside token files are none of them
        assert token_files.resolve_paths([pattern], root=str(tmp_path)) == [str(tmp_path / "a.npy")]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (path,) = write(tmp_path, a=[1])

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(OSError, match=rf"^config\.data\.paths: cannot read {path}: Permission den"):
        TokenFiles([path], U16)


# --- files that change under the run --------------------------------------------------------------


def test_a_file_that_shrinks_is_one_error_with_its_sizes(tmp_path):
    (path,) = write(tmp_path, a=np.arange(100))
    listed = TokenFiles([path], U16)
    assert listed.read(0, 90, 100).tolist() == [*range(90, 100)]
    os.truncate(path, 51)
    assert listed.read(0, 20, 25).tolist() == [*range(20, 25)]  # what is left is what it was
    message = f"config.data.paths: {path} shrank while it was read: found 51 bytes, need 200"
    for start in (25, 90):  # within it, and behind its new end
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            listed.read(0, start, start + 1)


def test_a_file_that_is_replaced_or_deleted_is_told_where_it_is_not_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_OPEN", 1)
    paths = write(tmp_path, a=[1, 2, 3], b=[4, 5, 6], c=[7])
    listed = TokenFiles(paths, U16)
    assert listed.read(0, 0, 3).tolist() == [1, 2, 3]
    np.array([9], np.uint16).tofile(tmp_path / "new.npy")
    os.replace(tmp_path / "new.npy", paths[0])
    os.remove(paths[1])
    assert listed.read(0, 0, 3).tolist() == [1, 2, 3]  # it is still open
    with pytest.raises(OSError, match=rf"^config\.data\.paths: cannot read {paths[1]}: No such f"):
        listed.read(1, 0, 3)
    assert listed.read(2, 0, 1).tolist() == [7]
    with pytest.raises(ValueError, match=rf"{paths[0]} shrank .* found 2 bytes, need 6$"):
        listed.read(0, 0, 3)


def test_what_the_disk_cannot_give_is_told_with_the_file(tmp_path, monkeypatch):
    (path,) = write(tmp_path, a=[1, 2, 3])
    listed = TokenFiles([path], U16, "config.eval.paths")

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match=rf"^config\.eval\.paths: cannot read {path}: Input/output e"):
        listed.read(0, 0, 3)


def test_threads_read_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_OPEN", 2)
    paths = write(tmp_path, **{f"f{i}": np.arange(100 * i, 100 * i + 100) for i in range(20)})
    listed = TokenFiles(paths, U16)

    def read(i):
        file, start = divmod(i * 37 % 2000, 100)
        return listed.read(file, start, 100).tolist() == [
            *range(100 * file + start, 100 * file + 100)
        ]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(2000)))
    if os.path.exists("/proc/self/fd"):
        numbers = os.listdir("/proc/self/fd")
        assert sum(os.path.realpath(f"/proc/self/fd/{n}") in paths for n in numbers) == 2


def test_few_files_stay_open_where_the_process_may_have_few(monkeypatch):
    for limit, expected in ((1024, 256), (2, 1), (2**20, 16_384), (resource.RLIM_INFINITY, 16_384)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert files.most_open() == expected


def test_a_read_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    (path,) = write(tmp_path, a=np.arange(1000))
    listed, whole = TokenFiles([path], U16), os.preadv

    def a_little(number, buffers, at):
        return whole(number, [memoryview(buffers[0]).cast("B")[:701]], at)

    monkeypatch.setattr(os, "preadv", a_little)
    assert listed.read(0, 1, 1000).tolist() == [*range(1, 1000)]


def test_a_file_is_read_by_slices_and_by_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "PIECE_BYTES", 8)
    listed = TokenFiles(write(tmp_path, a=[5], b=np.arange(10)), U16)
    one = TokenFile(listed, 1)
    assert len(one) == 10
    for part in (slice(0, 3), slice(8, 20), slice(20, 25), slice(5, 5), slice(5, 2), slice(None)):
        assert one[part].tolist() == [*range(10)][part]
    found = [(start, ids.tolist()) for start, ids in listed.pieces(1)]
    assert found == [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9])]
