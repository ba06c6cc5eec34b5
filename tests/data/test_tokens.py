import csv
import gzip
import json
import resource

import numpy as np
import pytest

from olmo_jax.config.data import FixedLength
from olmo_jax.data import batch, checks, documents, repetition
from olmo_jax.data.documents import Boundaries, read_boundaries, starts_after, write_documents
from olmo_jax.data.fixed_length import FixedLengthSource
from olmo_jax.data.source import Take
from olmo_jax.data.token_files import TokenFiles

U16 = np.dtype("<u2")


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/data_order.json").read_text())


def write(folder, dtype=np.uint16, **files):
    """Token files `name.npy` in `folder`, as their makers write them."""
    for name, ids in files.items():
        np.asarray(ids, dtype).tofile(folder / f"{name}.npy")
    return [str(folder / f"{name}.npy") for name in files]


def source(files, seq_len, longest=None, vocab_size=2**16, boundaries=None):
    options = FixedLength(seq_len=seq_len, max_target_seq_len=longest)
    return FixedLengthSource(files, options, vocab_size, boundaries)


def lengths_of(segment_ids):
    return [np.bincount(row).tolist() for row in segment_ids]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["legacy_memmap_toy", "core_fsl_toy"])
def test_instances_and_their_documents_are_those_of_olmo(golden, tmp_path, name):
    case = golden[name]
    files = TokenFiles(write(tmp_path, a=case["files"]["a.npy"], b=case["files"]["b.npy"]), U16)
    rows = source(files, 4, vocab_size=32_000)
    assert rows.n_rows == len(case["instances"]) == case["offsets"][-1][1]
    assert [rows.locate(first) for first, _ in case["offsets"]] == [(0, 0), (1, 0)]
    found = rows.read(Take(np.arange(6, dtype=np.uint32), 4)).tokens
    assert found.dtype == np.int32
    assert found.tolist() == case["instances"]
    segment_ids, _ = batch.segments(documents.starts_after(found, case["eos_token_id"]))
    assert lengths_of(segment_ids) == case["doc_lens"]


def test_files_shorter_than_a_row_and_remainders_are_left_out(tmp_path):
    rows = source(TokenFiles(write(tmp_path, a=[1] * 3, b=[2] * 9, c=[3] * 4), U16), 4)
    assert rows.read(Take(np.arange(3), 4)).tokens[:, 0].tolist() == [2, 2, 3]
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows.locate(3)


def test_a_target_length_drops_the_remainder_in_its_own_multiples(tmp_path):
    files = TokenFiles(write(tmp_path, a=np.arange(23), b=np.arange(17)), U16)
    assert source(files, 2).n_rows == 11 + 8
    assert source(files, 2, 8).n_rows == 8 + 8
    assert source(files, 2, 8).locate(8) == (1, 0)


def test_tokens_beyond_two_to_the_31st_are_found_with_little_memory(tmp_path):  # P21
    first, known = 2**31 + 1024, np.arange(1000, 1064, dtype=np.uint16)
    path = tmp_path / "big.npy"
    with path.open("wb") as file:
        file.truncate(2 * (2**31 + 4096))  # sparse
        file.seek(2 * first)
        known.tofile(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = TokenFiles([str(path)], U16)
    checks.check(files, 65_536)
    rows = source(files, 64)
    assert rows.n_rows == 2**25 + 64
    row = np.uint32(first // 64)
    assert rows.locate(row) == (0, first)
    np.testing.assert_array_equal(rows.read(Take(np.array([row]), 64)).tokens[0], known)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # KiB
    with pytest.raises(ValueError, match=rf"big\.npy has id 1000 at token {first}, need"):
        source(files, 64, vocab_size=1000).read(Take(np.array([row]), 64))


def test_labels_are_those_of_olmo(golden):
    case = golden["labels_doclens"]
    ids = np.array(case["input_ids"], np.int32)
    for mask, labels in (
        (None, "labels"),
        (np.array(case["label_mask"], bool), "labels_with_mask"),
    ):
        targets, weights = batch.next_tokens(ids, mask)
        assert np.where(weights > 0, targets, -100).tolist() == case[labels]
        assert (targets.dtype, weights.dtype) == (np.int32, np.float32)
        assert targets[:, -1].tolist() == [0]
    segment_ids, positions = batch.segments(documents.starts_after(ids, case["eos"]))
    assert lengths_of(segment_ids) == [case["doc_lens"]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]


def test_documents_of_the_toy_file_are_those_of_olmo(golden):
    case = golden["toy_docs"]
    segment_ids, _ = batch.segments(documents.starts_after(np.array([case["d1"]]), 0))
    assert lengths_of(segment_ids) == [case["doc_lens"]["d1"]]


def test_repetitions_are_those_of_olmo(golden):
    for case in golden["repetition_filter"]:
        ids = np.array([case["ids"]])
        found = {p: int(repetition.repeats(ids, p)[0]) for p in range(1, len(case["ids"]) + 2)}
        known = {p: times for _, _, p, times in case["matches_start_end_period_times"]}
        assert {p: times for p, times in found.items() if times >= 3} == known


def test_repetitions_equal_a_count_by_hand():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (60, 40))
    for period in (1, 2, 3, 5):
        best = []
        for row in rows.tolist():
            lengths = [0]
            for j in range(period, len(row)):
                lengths.append(lengths[-1] + 1 if row[j] == row[j - period] else 0)
            best.append((max(lengths) + period) // period)
        assert repetition.repeats(rows, period).tolist() == best


def test_the_filter_masks_a_row_from_the_set_number_of_repetitions_on():
    rows = np.arange(5 * 512).reshape(5, 512)
    rows[1, 100:132] = 7  # 32 times one token
    rows[2, 100:131] = 7
    rows[3, : 13 * 32] = np.tile(np.arange(13), 32)
    rows[4, : 14 * 32] = np.tile(np.arange(14), 32)  # of a period that is not looked at
    assert repetition.is_repetitive(rows, 13, 32).tolist() == [False, True, False, True, False]


# --- documents ------------------------------------------------------------------------------------


def test_written_documents_come_back_with_their_side_file(tmp_path):
    path = tmp_path / "x.npy"
    documents = [[1, 2, 0], [], np.array([3, 0]), [4, 5, 6, 0]]
    assert write_documents(path, documents, "uint16", ["a,b.py", "c", 'd"', "é"]) == 9
    assert np.fromfile(path, "<u2").tolist() == [1, 2, 0, 3, 0, 4, 5, 6, 0]
    with gzip.open(tmp_path / "x.csv.gz", "rt", encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert [line[:3] for line in lines] == [
        ["0", "3", "0"], ["3", "3", "1"], ["3", "5", "2"], ["5", "9", "3"],
    ]  # fmt: skip
    assert [line[3:] for line in lines] == [["a,b.py", "1"], ["c", "1"], ['d"', "1"], ["é", "1"]]
    assert read_boundaries(str(path), 9).tolist() == [3, 3, 5, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv.gz", "x.npy"]


def test_equal_documents_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        documents.write_documents(tmp_path / folder / "x.npy", [[1, 0], [2, 0]], np.uint8)
    for name in ("x.npy", "x.csv.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_write_leaves_the_old_files(tmp_path):
    path = tmp_path / "x.npy"
    documents.write_documents(path, [[1, 0]], np.uint8)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="document 1 has ids outside uint8"):
        documents.write_documents(path, [[1, 0], [256]], np.uint8)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_boundaries_equal_eos_where_each_document_ends_with_it(tmp_path):
    rng = np.random.default_rng(1)
    paths = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    for path in paths:
        documents = [[*rng.integers(1, 9, n), 0] for n in rng.integers(0, 30, 40)]
        write_documents(path, documents, np.uint8)
    files = TokenFiles(paths, np.dtype("u1"))
    source_of = source(files, 16, boundaries=Boundaries(files))
    rows = source_of.read(Take(np.arange(source_of.n_rows), 16))
    expected = starts_after(rows.tokens, 0)
    assert expected.sum() > 50
    np.testing.assert_array_equal(rows.starts, expected)


def test_documents_of_a_row_follow_the_side_file_whatever_the_tokens(tmp_path):  # P28
    path = tmp_path / "x.npy"
    documents.write_documents(path, [[5] * 10, [], [5] * 27, [5] * 27, [5] * 64], np.uint8)
    files = TokenFiles([str(path)], np.dtype("u1"))
    rows = source(files, 64, boundaries=Boundaries(files)).read(Take(np.arange(2), 64))
    segment_ids, positions = batch.segments(rows.starts)
    assert lengths_of(segment_ids) == [[10, 27, 27], [64]]
    assert positions[0].tolist() == [*range(10), *range(27), *range(27)]
    assert segment_ids.dtype == positions.dtype == np.int32


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0,4,a\n4,9,b\n", r"x\.csv\.gz ends at token 9, but .*x\.npy has 10"),
        ("0,4,a\n5,10,b\n", r"x\.csv\.gz: document 1 is \[5, 10\) after 4"),
        ("0,4,a\nfour,10,b\n", r"x\.csv\.gz: invalid literal for int"),
        ("", r"x\.csv\.gz ends at token 0, but .*x\.npy has 10"),
    ],
)
def test_a_side_file_that_does_not_fit_is_refused(tmp_path, lines, message):
    files = TokenFiles(write(tmp_path, x=[1] * 10), U16)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(ValueError, match=r"config\.data\.document_mask=boundaries: .*" + message):
        Boundaries(files)


def test_a_damaged_or_missing_side_file_is_named(tmp_path):
    files = TokenFiles(write(tmp_path, x=[1] * 10), U16)
    with pytest.raises(FileNotFoundError, match=r"document_mask=boundaries: .*x\.csv\.gz"):
        Boundaries(files)
    whole = bytearray(gzip.compress(b"0,10,a,b,1\n"))
    for broken in (whole[:-9], b"plain text", whole[:10] + b"\xff" * 10 + whole[20:]):
        (tmp_path / "x.csv.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"document_mask=boundaries: .*x\.csv\.gz: "):
            Boundaries(files)
