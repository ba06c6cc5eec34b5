import dataclasses
import gzip
import os
import re

import numpy as np
import pytest

from olmo_jax.config.data import FixedLength
from olmo_jax.data import checks, documents
from olmo_jax.data.open import open_source
from olmo_jax.data.token_files import TokenFiles

U16 = np.dtype("<u2")


def write(folder, dtype=np.uint16, **named):
    """Token files `name.npy` in `folder`, as their makers write them."""
    for name, ids in named.items():
        np.asarray(ids, dtype).tofile(folder / f"{name}.npy")
    return [str(folder / f"{name}.npy") for name in named]


def test_a_wrong_type_is_told_at_start_by_file_offset_and_id(tmp_path):
    (path,) = write(tmp_path, np.uint32, a=[5, 6, 70_000, 7])
    checks.check(TokenFiles([path], np.dtype("<u4")), 100_000)
    with pytest.raises(ValueError, match=r"a\.npy has id 4464 at token 4.*config\.data\.dtype"):
        checks.check(TokenFiles([path], U16), 100)


def test_a_type_that_is_too_narrow_is_told_at_start_though_all_ids_are_valid(tmp_path):
    (path,) = write(tmp_path, np.uint32, a=np.arange(1, 100))
    with pytest.raises(ValueError, match=r"a\.npy every second id is 0.*config\.data\.dtype"):
        checks.check(TokenFiles([path], U16), 50_280)


def test_padding_with_little_else_at_the_end_is_no_other_type(tmp_path):
    ids = np.zeros(4_000_000, np.uint16)
    ids[:2_500_000] = np.random.default_rng(0).integers(1, 500, 2_500_000)
    ids[-7] = 3
    (path,) = write(tmp_path, a=ids)
    checks.check(TokenFiles([path], U16), 512)


def test_the_sample_takes_the_beginning_the_middle_and_the_end_of_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SAMPLE_BYTES", 20)
    paths = write(tmp_path, a=np.arange(30), b=np.arange(101))
    found = [
        [(at, ids.size) for at, ids in one] for one in checks.each_sampled(TokenFiles(paths, U16))
    ]
    assert found == [[(0, 30)], [(0, 10), (45, 10), (91, 10)]]


def test_an_eos_that_never_occurs_is_told_with_both_options(tmp_path):
    files = TokenFiles(write(tmp_path, a=[1, 2, 3], b=[4, 9]), U16)
    checks.check(files, 10, eos_id=9)
    message = r"config\.data\.eos_id=0 never occurs in the 5 .*config\.data\.document_mask=eos"
    with pytest.raises(ValueError, match=message):
        checks.check(files, 10, eos_id=0)


# --- another type, all ids valid ------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(1, 100_278, 20_000)
OVERRIDE = "config.data.check_dtype=false reads it all the same"


def looked_at(paths, dtype, vocab_size, **options):
    checks.check(TokenFiles(paths, np.dtype(dtype)), vocab_size, **options)


@pytest.mark.parametrize(
    ("written", "read", "vocab_size", "name", "need"),
    [
        ("<u4", "<u2", 100_278, "uint32", "config.data.dtype=uint32"),
        (">u4", "<u2", 100_278, "big-endian uint32", "a file of uint16 or uint32"),
        ("<i8", "<u2", 100_278, "int64", "a file of uint16 or uint32"),
        (">i8", "<u2", 100_278, "big-endian int64", "a file of uint16 or uint32"),
        ("<f4", "<u2", 100_278, "float32", "a file of uint16 or uint32"),
        ("<f8", "<u2", 100_278, "float64", "a file of uint16 or uint32"),
        ("<u4", "u1", 100_278, "uint32", "config.data.dtype=uint32"),
        ("<u2", "u1", 50_304, "uint16", "config.data.dtype=uint16"),
    ],
)
def test_a_file_of_a_wider_type_is_told_by_its_halves(
    tmp_path, written, read, vocab_size, name, need
):
    (path,) = write(tmp_path, written, a=IDS % vocab_size)
    dtype, n = np.dtype(read), np.dtype(written).itemsize // np.dtype(read).itemsize
    message = (
        f"config.data.paths: {path} looks like {name}, not {dtype.name}: of 4096 sampled tokens"
        f" every {n} make one id for config.model.vocab_size={vocab_size}; need {need}; {OVERRIDE}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        looked_at([path], dtype, vocab_size)
    looked_at([path], dtype, vocab_size, check_dtype=False)


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "ids"),
    [
        ("<u4", 100_278, IDS),
        ("<u2", 100_278, IDS % 65_536),  # none above by chance
        ("<u2", 50_304, IDS % 50_304),
        ("<u2", 50_304, IDS % 50),
        ("<u2", 100_278, IDS % 2),
        ("<u2", 100_278, IDS * (IDS < 60)),  # nearly all are padding
        ("<u2", 100_278, IDS * 0),
        ("<u4", 100_278, IDS * 0 + 2**16),
        ("<u4", 2**20, 2**16 * (IDS % 16)),
        ("u1", 256, IDS % 256),
        ("u1", 256, IDS % 2),
        ("u1", 100_278, IDS % 128),
    ],
)
def test_a_file_of_the_right_type_raises_no_alarm(tmp_path, dtype, vocab_size, ids):
    (path,) = write(tmp_path, dtype, a=ids)
    looked_at([path], dtype, vocab_size)


def test_short_files_are_judged_when_they_are_enough_together(tmp_path):
    parts = {f"f{i}": IDS[1000 * i : 1000 * (i + 1) - 1] for i in range(3)}
    paths = write(tmp_path, "<u4", **parts)
    looked_at(paths[:2], "<u2", 100_278)  # 3,996 tokens
    with pytest.raises(
        ValueError, match=r"f0\.npy and 2 more looks like uint32, not uint16: of 59"
    ):
        looked_at(paths, "<u2", 100_278)
    (long,) = write(tmp_path, "<u4", g=IDS)
    right = write(tmp_path, "<u2", **{f"r{i}": IDS[:4000] % 65_536 for i in range(2)})
    with pytest.raises(ValueError, match=r"g\.npy looks like uint32"):
        looked_at([right[0], long, right[1]], "<u2", 100_278)


@pytest.mark.parametrize("mask", ["none", "eos", "boundaries"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_loader_refuses_another_type_unless_it_is_told_to_read_it(tmp_path, mask, beside):
    ids = IDS.astype("<u4")
    ids[99::100] = 5
    documents.write_documents(tmp_path / "a.npy", ids.reshape(-1, 100), "uint32")
    if not beside:
        (tmp_path / "a.csv.gz").unlink()
    data = FixedLength(
        paths=(str(tmp_path / "a.npy"),), dtype="uint16", seq_len=64, global_batch_size=64,
        document_mask=mask, eos_id=5,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.npy looks like uint32, not uint16"):
        open_source(data, 100_278)
    if mask != "boundaries":
        assert open_source(dataclasses.replace(data, check_dtype=False), 100_278).n_rows == 625
    if beside or mask != "boundaries":
        assert open_source(dataclasses.replace(data, dtype=None), 100_278).n_rows == 312


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ['{"text": "All of it can be printed.\\n"}\n', "Größe 漢字 – ок!\t"]
)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_text_is_no_token_file_but_of_bytes(tmp_path, monkeypatch, line, dtype):
    monkeypatch.setattr(checks, "SAMPLE_BYTES", 1002)  # cuts characters
    path = tmp_path / "a.jsonl"
    path.write_bytes((line * 1000).encode())
    n = path.stat().st_size
    os.truncate(path, n - n % 4)
    message = (
        f"config.data.paths: {path} is text, not ids of {np.dtype(dtype).name}: all bytes that were"
        f" sampled can be printed; need what a tokenizer makes of it; {OVERRIDE}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        looked_at([path], dtype, 2**32)
    looked_at([path], dtype, 2**32, check_dtype=False)
    looked_at([path], "u1", 256)


@pytest.mark.parametrize("ids", [[8224] * 31, [8224] * 100 + [7], [0x2020] * 99 + [0xFFFE]])
def test_what_is_not_all_text_is_none(tmp_path, ids):
    looked_at(write(tmp_path, a=ids), "<u2", 100_278)


# --- side files -----------------------------------------------------------------------------------


def side(folder, lines):
    (path,) = write(folder, a=[1] * 10)
    (folder / "a.csv.gz").write_bytes(
        lines if isinstance(lines, bytes) else gzip.compress(lines.encode())
    )
    checks.check_side_files(TokenFiles([path], U16))


def test_a_side_file_that_ends_elsewhere_is_told_whatever_the_mask(tmp_path):
    message = (
        f"config.data.paths: {tmp_path}/a.csv.gz ends at token 5, but {tmp_path}/a.npy has 10 of"
        f" uint16; another config.data.dtype, or file? {OVERRIDE}"
    )
    for lines in (
        "0,2,x,y,1\n2,5,x,y,1\n",
        "0,5\r\n",
        "0,1\n1,5",
        "0,5," + "x" * 2**17 + "\n0,5,\n",
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            side(tmp_path, lines)


@pytest.mark.parametrize(
    "lines",
    [
        "0,2,x,y,1\n2,10,x,y,1\n",
        "", "start,end\n", "a table of something else\n1;2\n", '0,4,x,"a\n1,b",2\n', "-1,5,x\n",
        b"", b"plain", gzip.compress(b"0,5,x\n" * 99, mtime=0)[:-12],
    ],
)  # fmt: skip
def test_a_side_file_that_says_nothing_is_not_needed(tmp_path, lines):
    side(tmp_path, lines)


def test_only_so_many_side_files_are_unpacked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ends at token 5"):
        side(tmp_path, "0,5,x\n")
    for name in ("SIDE_BUDGET", "SIDE_FILES"):
        with monkeypatch.context() as patch:
            patch.setattr(checks, name, 0)
            side(tmp_path, "0,5,x\n")
