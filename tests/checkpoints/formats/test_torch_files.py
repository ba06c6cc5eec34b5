"""torch.save and torch.distributed.checkpoint, written by torch and read without it."""

import collections
import io
import json
import pathlib
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.distributed.checkpoint as dist_cp
from jax import numpy as jnp

from olmo_jax.checkpoints.formats import folders
from olmo_jax.checkpoints.formats.distcp import Distributed
from olmo_jax.checkpoints.formats.torch_files import (
    Archive,
    Tensor,
    unpickle,
)


def save(path: pathlib.Path, value) -> Archive:
    torch.save(value, path)
    return Archive(folders.open(str(path.parent)), path.name)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "bool"])
def test_a_tensor_of_each_dtype_is_read(tmp_path, dtype):
    tensor = torch.arange(24).reshape(6, 4) % 2 if dtype == "bool" else torch.arange(24) - 7.5
    tensor = tensor.reshape(6, 4).to(getattr(torch, dtype))
    archive = save(tmp_path / "a.pt", {"x": tensor})
    found = archive.read(archive.tree["x"])
    want = tensor.float().numpy() if dtype == "bfloat16" else tensor.numpy()
    assert found.dtype == (jnp.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(found.astype(want.dtype), want)


def test_views_of_one_storage_keep_their_place_and_strides(tmp_path):
    base = torch.arange(60.0).reshape(5, 12)
    views = {"rows": base[1:4], "columns": base[:, 3:7], "transposed": base.T, "scalar": base[2, 5]}
    archive = save(tmp_path / "a.pt", views)
    for name, view in views.items():
        np.testing.assert_array_equal(archive.read(archive.tree[name]), view.numpy())
    np.testing.assert_array_equal(
        archive.read(archive.tree["transposed"], slice(2, 5)), base.T[2:5].numpy()
    )


def test_only_the_rows_that_are_asked_for_are_read(tmp_path):
    archive = save(tmp_path / "a.pt", {"x": torch.arange(400_000.0).reshape(4000, 100)})
    calls = []
    inner = archive._folder.read
    archive._folder.read = lambda file, a, b: calls.append(b - a) or inner(file, a, b)
    rows = archive.read(archive.tree["x"], slice(3990, 3993))
    np.testing.assert_array_equal(rows, np.arange(399_000.0, 399_300.0).reshape(3, 100))
    assert sum(calls) < 20_000


def test_plain_values_and_modules_states_are_read(tmp_path):
    module = torch.nn.Linear(3, 2)
    value = {"state": module.state_dict(), "step": 3, "betas": (0.9, 0.95), "none": None}
    tree = save(tmp_path / "a.pt", value).tree
    assert (tree["step"], tree["betas"], tree["none"]) == (3, (0.9, 0.95), None)
    assert isinstance(tree["state"], collections.OrderedDict)
    assert isinstance(tree["state"]["weight"], Tensor)
    assert tree["state"]["weight"].shape == (2, 3)


# --- pickles are not executed ---------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.parametrize("lenient", [False, True])
def test_a_pickle_is_never_executed(tmp_path, lenient):
    bomb = Bomb()
    bomb.path = str(tmp_path / "exploded")
    torch.save({"x": bomb, "step": 3}, tmp_path / "a.pt")
    folder = folders.open(str(tmp_path))
    if lenient:
        assert Archive(folder, "a.pt", lenient=True).tree["step"] == 3
    else:
        with pytest.raises(
            ValueError, match=r"refused, not executed: it asks for \S+touch|getattr"
        ):
            Archive(folder, "a.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("call", ["os.system", "builtins.eval", "builtins.exec", "builtins.open"])
def test_dangerous_names_are_refused_by_name(call):
    module, name = call.split(".")
    program = b"c" + f"{module}\n{name}\n".encode() + b"(S'touch exploded'\ntR."
    with pytest.raises(ValueError, match=f"x.pt: refused, not executed: it asks for {call}"):
        unpickle(program, "x.pt")


def test_attributes_that_a_pickle_puts_on_a_dict_do_not_count():
    parts = [collections.OrderedDict(a=1), {"items": 5, "keys": 5}]
    state, attributes = (pickle.dumps(part, 2)[2:-1] for part in parts)
    tree = unpickle(state + attributes + b"b.", "x.pt")
    assert list(tree.items()) == [("a", 1)]
    assert list(tree.keys()) == ["a"]


def test_a_pickle_cannot_ask_for_memory_that_it_does_not_fill():
    """One flipped byte: the machine would make room for two billion objects."""
    program = b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b"."
    with pytest.raises(
        ValueError, match=r"x\.pt is damaged: ValueError: an object with the number"
    ):
        unpickle(program, "x.pt")


@pytest.mark.parametrize(
    "place", [(-1, (3,), (1,)), (0, (3.0,), (1,)), (0, (3,), (-1,)), (0, (3,), ())]
)
def test_a_tensor_outside_of_its_storage_is_none(place):
    program = b"ctorch._utils\n_rebuild_tensor_v2\n("
    program += b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI3\ntQ"
    program += b"".join(pickle.dumps(value, 0)[:-1] for value in place) + b"tR."
    with pytest.raises(ValueError, match=r"x\.pt is damaged: ValueError: no tensor has shape"):
        unpickle(program, "x.pt")


def test_damaged_pickles_say_so():
    with pytest.raises(ValueError, match=r"x\.pt is damaged"):
        unpickle(pickle.dumps({"a": [1, 2, 3]})[:-4], "x.pt")


def test_a_trainers_state_is_read_around_what_is_unknown(tmp_path):
    state = {
        "rng": {"numpy": np.random.default_rng(0).bit_generator.state, "array": np.arange(3)},
        "path": tmp_path,
        "kind": torch.nn.Linear,
        "global_step": 3,
    }
    torch.save(state, tmp_path / "rank0.pt")
    tree = Archive(folders.open(str(tmp_path)), "rank0.pt", lenient=True).tree
    assert tree["global_step"] == 3


# --- files in bad shape ---------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 10, 500, -40])
def test_a_truncated_file_is_named(tmp_path, left):
    torch.save({"x": torch.arange(4000.0)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:left])
    with pytest.raises(ValueError, match=r"a\.pt is damaged, truncated, or older than torch 1\.6"):
        Archive(folders.open(str(tmp_path)), "a.pt")


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    torch.save([1], tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"older than torch 1\.6"):
        Archive(folders.open(str(tmp_path)), "a.pt")


# --- distributed checkpoints ----------------------------------------------------------------------


def save_distributed(folder: pathlib.Path, state: dict, **options) -> Distributed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants a process group
        writer = dist_cp.FileSystemWriter(folder, **options)
        dist_cp.save(state, storage_writer=writer, no_dist=True)
    return Distributed(folders.open(str(folder)))


def test_any_part_of_any_tensor_is_read(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "a": torch.from_numpy(rng.standard_normal((7, 5)).astype(np.float32)),
        "b": {"c": torch.arange(12).reshape(2, 3, 2).to(torch.bfloat16), "lr": 0.1},
        "scalar": torch.tensor(3.0),
    }
    stored = save_distributed(tmp_path, state)
    assert stored.shapes["a"] == ((7, 5), np.float32)
    np.testing.assert_array_equal(stored.read("a", np.s_[2:6, 1:4]), state["a"][2:6, 1:4].numpy())
    part = stored.read("b.c", np.s_[1:2, 0:3, 1:2]).astype(np.float32)
    np.testing.assert_array_equal(part, state["b"]["c"].float()[1:2, :, 1:].numpy())
    assert float(stored.read("scalar", ())) == 3.0


def shards_of(value: np.ndarray, folder: pathlib.Path) -> None:
    """A checkpoint of one tensor in four parts, as four processes of a 2 x 2 mesh write it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )  # fmt: skip

    rows, columns = value.shape
    places, storage = [], {}
    for rank, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        at = (i * rows // 2, j * columns // 3)
        end = (rows if i else rows // 2, columns if j else columns // 3)
        part = torch.from_numpy(value[at[0] : end[0], at[1] : end[1]].copy())
        buffer = io.BytesIO()
        torch.save(part, buffer)
        file, offset = f"__{rank}_0.distcp", 13 * rank  # something else stands before it
        (folder / file).write_bytes(b"x" * offset + buffer.getvalue() + b"y" * 100)
        places.append(ChunkStorageMetadata(torch.Size(at), part.shape))
        info = _StorageInfo(file, offset, len(buffer.getvalue()))
        storage[MetadataIndex("x", torch.Size(at), rank)] = info
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), torch.Size(value.shape), places
    )
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"x": tensor}, None, storage)))


@pytest.mark.parametrize(
    "part", [np.s_[0:8, 0:9], np.s_[3:5, 2:4], np.s_[5:8, 0:9], np.s_[1:2, 3:9]]
)
def test_shards_of_a_mesh_are_put_together(tmp_path, part):
    value = np.random.default_rng(0).standard_normal((8, 9)).astype(np.float32)
    shards_of(value, tmp_path)
    found = Distributed(folders.open(str(tmp_path))).read("x", part)
    np.testing.assert_array_equal(found, value[part])


def test_a_missing_shard_is_named(tmp_path):
    shards_of(np.zeros((8, 9), np.float32), tmp_path)
    (tmp_path / "__2_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__2_0\.distcp is missing"):
        Distributed(folders.open(str(tmp_path)))


def test_metadata_that_lead_out_of_the_folder_are_refused(tmp_path):
    shards_of(np.zeros((8, 9), np.float32), tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        ValueError, match=r"\.metadata .*'../__0_0.distcp' is no file of this folder"
    ):
        Distributed(folders.open(str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chunks: chunks[1].__setattr__("offsets", chunks[0].offsets), "parts of x overlap"),
        (lambda chunks: chunks[3].__setattr__("sizes", (9, 9)), "parts of x overlap, or lie out"),
        (lambda chunks: chunks.pop(), "parts of x are missing: 48 of 72 values"),
        (lambda chunks: chunks[0].__setattr__("sizes", (4.0, 3)), "4.0, 3.* are no whole numbers"),
        (lambda chunks: chunks[0].__setattr__("sizes", (-4, 3)), "-4, 3.* are no whole numbers"),
        (lambda chunks: chunks[0].__setattr__("sizes", (4,)), "a part of 1 dimensions at 2"),
    ],
)
def test_parts_that_do_not_fill_their_tensor_are_refused(tmp_path, change, message):
    shards_of(np.zeros((8, 9), np.float32), tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    change(metadata.state_dict_metadata["x"].chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/\.metadata is no metadata .*{message}"):
        Distributed(folders.open(str(tmp_path)))


def test_a_truncated_shard_is_named(tmp_path):
    shards_of(np.zeros((8, 9), np.float32), tmp_path)
    whole = (tmp_path / "__1_0.distcp").read_bytes()
    (tmp_path / "__1_0.distcp").write_bytes(whole[:300])
    with pytest.raises(ValueError, match=r"__1_0\.distcp is truncated: 300 bytes of at least"):
        Distributed(folders.open(str(tmp_path)))


def test_a_shard_with_something_else_in_it_is_named(tmp_path):
    shards_of(np.zeros((8, 9), np.float32), tmp_path)
    data = (tmp_path / "__0_0.distcp").read_bytes()
    buffer = io.BytesIO()
    torch.save(torch.zeros(4, 4), buffer)
    (tmp_path / "__0_0.distcp").write_bytes(buffer.getvalue().ljust(len(data), b"z"))
    stored = Distributed(folders.open(str(tmp_path)))
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        stored.read("x", np.s_[0:8, 0:9])


def test_missing_parts_are_no_zeros(tmp_path):
    value = np.ones((8, 9), np.float32)
    shards_of(value, tmp_path)
    stored = Distributed(folders.open(str(tmp_path)))
    stored._chunks["x"] = stored._chunks["x"][:3]
    with pytest.raises(ValueError, match="parts of x are missing"):
        stored.read("x", np.s_[0:8, 0:9])


def test_metadata_that_is_none_says_so(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="no metadata of a distributed checkpoint"):
        Distributed(folders.open(str(tmp_path)))
    (tmp_path / ".metadata").write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        Distributed(folders.open(str(tmp_path)))
