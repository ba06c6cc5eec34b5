import numpy as np
import pytest

from olmo_jax.data import checks
from olmo_jax.data.files import TokenFiles

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


def test_the_sample_takes_the_beginning_the_middle_and_the_end_of_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SAMPLE_BYTES", 20)
    paths = write(tmp_path, a=np.arange(30), b=np.arange(101))
    found = [(f, start, len(ids)) for f, start, ids in checks.samples(TokenFiles(paths, U16))]
    assert found == [(0, 0, 30), (1, 0, 10), (1, 45, 10), (1, 91, 10)]


def test_an_eos_that_never_occurs_is_told_with_both_options(tmp_path):
    files = TokenFiles(write(tmp_path, a=[1, 2, 3], b=[4, 9]), U16)
    checks.check(files, 10, eos_id=9)
    message = r"config\.data\.eos_id=0 never occurs in the 5 .*config\.data\.document_mask=eos"
    with pytest.raises(ValueError, match=message):
        checks.check(files, 10, eos_id=0)
