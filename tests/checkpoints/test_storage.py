"""Checkpoints on disk: bitwise, checked, Orbax's layout, safe against every kind of bad end."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
from small_state import abstract, bits, state

from olmo_jax import files
from olmo_jax.checkpoints import layout, snapshot, storage

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return files.path(tmp_path / "run" / "checkpoints" / "step10")


@pytest.fixture
def saved(folder):
    """A complete checkpoint of `state()`."""
    snapshot.save(folder, state(), {"position": {"row": 5}})
    return folder


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_roundtrip_is_bitwise_and_keeps_shardings(folder, background, dtype):
    tree = state(dtype=dtype)
    snapshot.save(folder, tree, {"position": {"row": 5}}, background=background).wait()
    back = storage.restore(folder, abstract(tree))
    assert bits(back) == bits(tree)
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, back, tree))
    assert layout.read_meta(folder) == {"position": {"row": 5}}


def test_names_equal_the_parameter_paths(saved):
    assert {name for name in layout.tree_of(saved) if name.startswith("params/")} == {
        "params/embed",
        "params/layers/wq",
        "params/layers/norm",
    }
    assert layout.tree_of(saved)["opt_state/mu/layers/wq"].shape == (3, 16, 4)


def test_arrays_may_be_donated_as_soon_as_a_background_save_returns(folder):
    tree = state()
    expected = bits(tree)
    job = snapshot.save(folder, tree, {}, background=True)
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    jax.block_until_ready(overwrite(tree))
    job.wait()
    assert bits(storage.restore(folder, abstract(state()))) == expected


def test_restored_arrays_may_be_donated(saved):
    back = storage.restore(saved, abstract(state()))
    stepped = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(back)
    assert bits(stepped) == bits(jax.tree.map(lambda x: x + 1, state()))
    assert bits(storage.restore(saved, abstract(state()))) == bits(state())


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (4, 2)])
def test_restores_onto_another_mesh(saved, shape):
    tree = state(*shape)
    back = storage.restore(saved, abstract(tree))
    assert bits(back) == bits(state())
    assert back["params"]["embed"].sharding.mesh.shape == {"data": shape[0], "fsdp": shape[1]}


def test_reads_parameters_alone_and_casts_when_asked(saved):
    wanted = {"params": abstract(state()["params"])}
    assert bits(storage.restore(saved, wanted, partial=True)) == bits({"params": state()["params"]})
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
    back = storage.restore(saved, halves, partial=True, cast=True)
    assert isinstance(back["params"]["embed"], np.ndarray)
    expected = np.asarray(state()["params"]["embed"]).astype(jnp.bfloat16)
    assert back["params"]["embed"].tobytes() == expected.tobytes()


def test_chunks_are_within_a_layer_and_a_shard_and_not_larger_than_the_limit(saved):
    grid = json.loads((saved / "params.layers.wq" / "zarr.json").read_text())
    assert grid["chunk_grid"]["configuration"]["chunk_shape"] == [1, 4, 4]
    assert [codec["name"] for codec in grid["codecs"]] == ["bytes", "crc32c"]
    big = jax.ShapeDtypeStruct((32, 4096, 11008), jnp.float32)
    assert layout.chunk_shape("params/layers/mlp/w_up", big) == (1, 1024, 11008)
    table = jax.ShapeDtypeStruct((100_352, 4096), jnp.float32)
    assert layout.chunk_shape("params/embed", table) == (3584, 4096)
    assert layout.chunk_shape("step", jax.ShapeDtypeStruct((), jnp.int32)) == ()


def test_plain_orbax_restores_it(saved):
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert bits(checkpointer.restore(saved)) == bits(state())
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(saved, abstract(state(1, 8)))
    assert bits(back) == bits(state())
    assert back["params"]["embed"].sharding == state(1, 8)["params"]["embed"].sharding


def test_a_mark_of_the_beginning_that_outlived_the_save_changes_nothing(saved):
    assert not (saved / layout.BEGUN).exists()
    (saved / layout.BEGUN).write_text("killed between the two")
    assert layout.is_complete(saved)
    assert not layout.is_torn(saved)
    assert bits(storage.restore(saved, abstract(state()))) == bits(state())
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert bits(checkpointer.restore(saved)) == bits(state())


def test_a_checkpoint_written_slice_by_slice_is_the_same(saved, tmp_path):
    tree = state()["params"]
    target = files.path(tmp_path / "converted")
    shapes = {
        f"params/{name}": jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in storage.names(tree).items()
    }
    writer = storage.ArrayWriter(target, shapes)
    writer.write("params/embed", (0, 0), np.asarray(tree["embed"]))
    for i in range(3):
        writer.write("params/layers/wq", (i, 0, 0), np.asarray(tree["layers"]["wq"])[i : i + 1])
        writer.write("params/layers/norm", (i, 0), np.asarray(tree["layers"]["norm"])[i : i + 1])
    assert not layout.is_complete(target)
    writer.commit({"model": {}}, files={"tokenizer.json": b"{}\n"})
    assert bits(storage.restore(target, {"params": abstract(tree)})) == bits({"params": tree})
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert bits(checkpointer.restore(target)) == bits({"params": tree})
    assert layout.read(target, "tokenizer.json") == b"{}\n"
    with pytest.raises(ValueError, match="params/embed is float32, found float64"):
        writer.write("params/embed", (0, 0), np.zeros((24, 16)))


# --- refused by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/b", "a\\..\\b", "a//b", "..", ""])
def test_a_file_that_would_lie_outside_of_the_checkpoint_is_refused(tmp_path, name):
    folder = files.path(tmp_path / "step1")
    writer = storage.ArrayWriter(folder, {})
    refused = re.escape(f"{folder}: {name!r} is no name of a file in a checkpoint")
    with pytest.raises(ValueError, match=refused):
        writer.commit({}, files={name: b""})
    assert not layout.is_complete(folder)
    writer.commit({}, files={"additional/a.jinja": b"a"})
    assert layout.files(folder) == ["additional/a.jinja"]
    assert layout.read(folder, "additional/a.jinja") == b"a"
    marker = json.loads((folder / layout.MARKER).read_text())  # by hand, of an unknown origin
    (folder / layout.MARKER).write_text(json.dumps(marker | {"sha256": {name: "0" * 64}}))
    with pytest.raises(ValueError, match=refused):
        layout.files(folder)


def chunks_in(folder) -> list[pathlib.Path]:
    leaves = [leaf / "c" for leaf in pathlib.Path(folder).iterdir() if leaf.is_dir()]
    files = [file for leaf in leaves for file in (leaf, *leaf.rglob("*")) if file.is_file()]
    return sorted(files)


def flip(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("at", [0, 17, -1])
def test_one_flipped_byte_in_any_chunk_is_refused_by_name(saved, at):
    chunks = chunks_in(saved)
    assert len(chunks) == 3 * (4 + 12 + 3) + 2
    for chunk in chunks[::5]:
        flip(chunk, at)
        leaf = chunk.relative_to(saved).parts[0].replace(".", "/")
        with pytest.raises(ValueError) as caught:
            storage.restore(saved, abstract(state()))
        assert f"leaf {leaf} is damaged" in str(caught.value)
        assert str(chunk) in str(caught.value)
        assert "\n" not in str(caught.value)
        flip(chunk, at)
    storage.restore(saved, abstract(state()))


def test_chunks_that_were_exchanged_by_hand_are_not_noticed_as_the_docs_say(saved):
    one, two = (saved / "params.embed" / "c" / "0" / i for i in "12")
    before, after = one.read_bytes(), two.read_bytes()
    one.write_bytes(after)
    two.write_bytes(before)
    found = np.asarray(storage.restore(saved, abstract(state()))["params"]["embed"])
    want = np.asarray(state()["params"]["embed"])
    assert np.array_equal(found[:, 4:8], want[:, 8:12])
    assert np.array_equal(found[:, 8:12], want[:, 4:8])
    for file in (layout.__doc__, (ROOT / "docs/checkpoints.md").read_text()):
        assert "exchange" in file


def test_lost_or_cut_chunks_and_damaged_small_files_are_refused_by_name(saved):
    chunk = saved / "params.embed" / "c" / "0" / "1"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"leaf params/embed is damaged: .*c/0/1"):
        storage.restore(saved, abstract(state()))
    chunk.unlink()
    with pytest.raises(ValueError, match=r"leaf params/embed is damaged: .*c/0/1.* is missing"):
        storage.restore(saved, abstract(state()))
    chunk.write_bytes(data)

    meta = (saved / "meta.json").read_bytes()
    (saved / "meta.json").write_bytes(meta.replace(b"5", b"6"))
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        layout.read_meta(saved)
    flip(saved / "_METADATA", 40)
    with pytest.raises(ValueError, match=r"_METADATA is damaged"):
        storage.restore(saved, abstract(state()))
    (saved / layout.MARKER).write_text("{")
    with pytest.raises(ValueError, match=r"commit_success.txt is damaged"):
        layout.read_meta(saved)


@pytest.mark.parametrize(
    "marker",
    [
        b"null",
        b"[]",
        b"\xff",
        b'{"format": 1, "kind": "permanent"}',
        b'{"format": 1, "kind": "permanent", "sha256": null}',
        b'{"format": "1", "kind": "permanent", "sha256": {}}',
        b'{"format": 1, "kind": null, "sha256": {}}',
        b'{"format": 1, "kind": "permanent", "sha256": {"meta.json": 5}}',
        b'{"format": 1, "format": 1, "kind": "permanent", "sha256": {}}',
        b'{"format": 1, "kind": "permanent", "sha256": ' + b"[" * 100_000,
    ],
    ids=range(10),
)
def test_a_marker_that_is_not_ours_is_refused(saved, marker):
    (saved / layout.MARKER).write_bytes(marker)
    line = f"^{saved / layout.MARKER} is damaged, or not written by olmo_jax$"
    for way in (layout.kind, layout.files, layout.read_meta, layout.tree_of):
        with pytest.raises(ValueError, match=line):
            way(saved)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("meta.json", b'{"position": NaN}', "meta.json is no JSON: NaN is no number"),
        ("meta.json", b"\xef\xbb\xbf{}", "meta.json is no JSON: Unexpected UTF-8 BOM"),
        ("meta.json", b"[" * 100_000, "meta.json is damaged: more than 100 groups within"),
        ("meta.json", b'{"a":' + b"9" * 5000 + b"}", "meta.json is no JSON: an integer of 5000"),
        ("meta.json", b"[1]", "meta.json is no JSON object"),
        ("_METADATA", b"{}", "_METADATA is damaged: KeyError: 'custom_metadata'"),
        ("_METADATA", b'{"custom_metadata": []}', "_METADATA is damaged: TypeError"),
        ("_METADATA", b'{"custom_metadata": {"leaves": []}}', "_METADATA is damaged: Attribute"),
        *(
            ("_METADATA", json.dumps({"custom_metadata": {"leaves": leaves}}).encode(), message)
            for leaves, message in (
                ({"a": [[2.0], "float32"]}, r"_METADATA is damaged: .*'a' has shape \[2.0\]"),
                ({"a": [[-2], "float32"]}, r"_METADATA is damaged: .*'a' has shape \[-2\]"),
                ({"a": [2, "float32"]}, "_METADATA is damaged: TypeError"),
                ({"a": [[2], "float31"]}, "_METADATA is damaged: TypeError"),
                ({"a": None}, "_METADATA is damaged: TypeError"),
                ({"../a": [[2], "float32"]}, "_METADATA is damaged: .*'../a' has shape"),
            )
        ),
    ],
)  # fmt: skip
def test_a_small_file_that_says_nothing_sound_is_refused_by_name(saved, name, data, message):
    (saved / name).write_bytes(data)
    marker = json.loads((saved / layout.MARKER).read_bytes())
    marker["sha256"][name] = hashlib.sha256(data).hexdigest()  # as somebody wrote it
    (saved / layout.MARKER).write_text(json.dumps(marker))
    read = layout.read_meta if name == "meta.json" else layout.tree_of
    with pytest.raises(ValueError, match=f"^{saved}/{message}") as caught:
        read(saved)
    assert "\n" not in str(caught.value)


SHRINK = """
import os, pathlib, sys, threading
import jax, numpy as np
from olmo_jax import files
from olmo_jax.checkpoints import storage
folder, leaf = files.path(sys.argv[1]), np.arange(2**23, dtype=np.float32).reshape(2048, 4096)
writer = storage.ArrayWriter(folder, {"w": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)})
writer.write("w", (0, 0), leaf)
writer.commit({})
chunk, done, outcomes = pathlib.Path(sys.argv[1]) / "w/c/0/0", False, set()
whole = chunk.read_bytes()
def shrink():
    while not done:
        os.truncate(chunk, len(whole) // 2)
        with chunk.open("r+b") as file:
            file.write(whole)
thread = threading.Thread(target=shrink)
thread.start()
for _ in range(300):
    try:
        part = storage.read_part(folder, "w", (slice(None), slice(None)))
        outcomes.add(str(np.array_equal(part, leaf)))
    except ValueError as error:
        outcomes.add(str(error).split(": ")[1])
done = True
thread.join()
print(sorted(outcomes - {"True"}))
"""


@pytest.mark.by_hand
def test_a_chunk_that_shrinks_while_it_is_read_is_damaged_and_not_the_end_of_the_process(tmp_path):
    command = [sys.executable, "-c", SHRINK, str(tmp_path / "step1")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "['leaf w is damaged']\n"


def test_another_tree_shape_or_dtype_is_refused_with_every_leaf_named(saved):
    wanted = abstract(state())
    params = wanted["params"]
    params["layers"]["q_norm"] = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    params["layers"]["wq"] = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)
    params["layers"]["norm"] = jax.ShapeDtypeStruct((3, 16), jnp.bfloat16)
    del params["embed"]
    with pytest.raises(ValueError) as caught:
        storage.restore(saved, wanted)
    message = str(caught.value)
    assert str(saved) in message
    assert "missing leaf params/layers/q_norm" in message
    assert "extra leaf params/embed" in message
    assert "params/layers/wq has shape (3, 16, 4), need (3, 8, 4)" in message
    assert "params/layers/norm is float32, need bfloat16" in message
    assert "opt_state" not in message
    with pytest.raises(
        ValueError, match="extra leaf opt_state/count; extra leaf opt_state/mu/embed"
    ):
        storage.restore(saved, {"step": wanted["step"], "params": abstract(state()["params"])})


def test_a_folder_without_the_marker_is_no_checkpoint(saved):
    (saved / layout.MARKER).unlink()
    assert not layout.is_complete(saved)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint here"):
        storage.restore(saved, abstract(state()))


def test_an_existing_folder_is_never_overwritten(saved):
    with pytest.raises(OSError, match="is there already and is not overwritten"):
        snapshot.save(saved, state(), {})
    assert bits(storage.restore(saved, abstract(state()))) == bits(state())


# --- bad ends -------------------------------------------------------------------------------------


def test_the_marker_is_written_last(folder, monkeypatch):
    written = []
    write = layout.write_file
    monkeypatch.setattr(
        layout, "write_file", lambda f, name, data: (written.append(name), write(f, name, data))
    )
    snapshot.save(folder, state(), {})
    assert written[-1] == layout.MARKER


SLOW_SAVE = """
import os, sys, time
from olmo_jax import files
from olmo_jax.checkpoints import snapshot, storage
from small_state import state
write = storage.ArrayWriter.write
def slow(self, name, start, block):
    write(self, name, start, block)
    print(name, flush=True)
    time.sleep(0.05)
storage.ArrayWriter.write = slow
snapshot.save(files.path(sys.argv[1]), state(), {}, background=True).wait()
"""


def test_kill_in_the_middle_of_a_save_leaves_no_checkpoint_and_the_previous_one(saved):
    torn = saved.parent / "step20"
    environment = os.environ | {"PYTHONPATH": runs.PATHS}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, torn],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(20):
            assert process.stdout.readline()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < len(chunks_in(torn)) < len(chunks_in(saved))
    assert not layout.is_complete(torn)
    assert layout.is_torn(torn)
    (torn / layout.BEGUN).unlink()  # as older versions left it
    assert layout.is_torn(torn)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint here"):
        storage.restore(torn, abstract(state()))
    with (
        ocp.PyTreeCheckpointer() as checkpointer,
        pytest.raises(Exception, match="No structure"),
    ):
        checkpointer.restore(torn)
    assert bits(storage.restore(saved, abstract(state()))) == bits(state())


@contextlib.contextmanager
def small_files():
    """Writing far into a file fails, as on a full disk; needs no rights."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_failed_write_is_an_error_in_one_line_and_leaves_nothing(folder):
    big = {"params": {"embed": jnp.ones((1000, 16))}}
    with small_files():
        job = snapshot.save(folder, big, {}, background=True)
        with pytest.raises(OSError) as caught:
            job.wait()
    assert str(caught.value).startswith(f"checkpoint {folder} was not saved: ")
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_named_and_the_space_given_back(full_disk):
    small, big = {"w": jnp.ones((64, 64))}, {"w": jnp.ones((1024, 1024))}
    snapshot.save(files.path(full_disk / "step5"), small, {})
    with pytest.raises(OSError, match="No space left on device"):
        snapshot.save(files.path(full_disk / "step10"), big, {})
    assert not (full_disk / "step10").exists()
    restored = storage.restore(files.path(full_disk / "step5"), abstract(small))
    assert bits(restored) == bits(small)
    snapshot.save(files.path(full_disk / "step10"), small, {})


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere; the tests of refused writes are not root's."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_named(saved):
    os.chmod(saved.parent, 0o555)
    try:
        with ordinary_user(), pytest.raises(OSError) as caught:
            snapshot.save(saved.parent / "step20", state(), {})
    finally:
        os.chmod(saved.parent, 0o755)
    assert f"checkpoint {saved.parent / 'step20'} was not saved" in str(caught.value)
    assert "Permission denied" in str(caught.value)
    assert bits(storage.restore(saved, abstract(state()))) == bits(state())


def interrupt(monkeypatch, after: int) -> None:
    """Let the calls that delete fail from the given one on."""
    calls, kind = iter(range(1000)), type(files.path("/"))

    def failing(call):
        def deletes(*args, **keywords):
            if next(calls) >= after:
                raise OSError("killed")
            call(*args, **keywords)

        return deletes

    for name in ("unlink", "rmtree"):
        monkeypatch.setattr(kind, name, failing(getattr(kind, name)))


@pytest.mark.parametrize("left", ["complete", "torn", "torn by an older version"])
def test_a_deletion_takes_the_marker_first_and_its_half_is_known_as_ours(saved, monkeypatch, left):
    if left != "complete":
        (saved / layout.MARKER).unlink()
    if left == "torn":
        (saved / layout.BEGUN).write_text(layout.BEGUN_TEXT)
    for after in range(100):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with contextlib.suppress(OSError):
                layout.remove(saved)
                break
        assert not layout.is_complete(saved)
        assert layout.is_torn(saved)
        assert saved.exists()
    assert after > 3
    assert not saved.exists()
    layout.remove(saved)  # nothing to do


FOREIGN = {
    "OLMo-core": "model_and_optim/.metadata config.json",
    "Hugging Face": "config.json model.safetensors tokenizer.json",
    "Orbax": "_METADATA _CHECKPOINT_METADATA params.embed/zarr.json",
    "notes beside arrays": "params.embed/zarr.json notes.txt",
    "a backup beside arrays": "params.embed/zarr.json notes~",
    "notes inside of an array": "params.embed/zarr.json params.embed/notes.txt",
    "small files alone": "meta.json tokenizer.json",
    "a mark of somebody": f"{layout.BEGUN} thesis.md",
    "nearly our mark": f"{layout.BEGUN}.notes weights.bin",
}


@pytest.mark.parametrize("kind", [*FOREIGN, "a file", "a link", "a link to nothing"])
def test_what_is_not_provably_a_half_of_ours_is_not_ours_and_not_written_into(tmp_path, kind):
    target, other = files.path(tmp_path / "step10"), tmp_path / "other"
    for name in FOREIGN.get(kind, "params.embed/zarr.json").split():
        place = (other if kind.startswith("a link") else target) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    if kind == "a file":
        target.rmtree()
        target.write_text("mine")
    elif kind.startswith("a link"):
        os.symlink(other, target)
    if kind == "a link to nothing":
        other.rename(tmp_path / "moved")
    assert not layout.is_torn(target)
    before = runs.contents(tmp_path)
    with pytest.raises(OSError, match=f"{target} is there already and is not overwritten"):
        snapshot.save(target, state(), {})
    assert runs.contents(tmp_path) == before
    assert os.path.lexists(target)


def test_paths_are_local_or_in_a_bucket(monkeypatch):
    monkeypatch.setattr(files, "_has", lambda package: package == "gcsfs")
    assert str(files.path("runs/a")) == os.path.abspath("runs/a")
    assert str(files.path("gs://bucket/runs/a")) == "gs://bucket/runs/a"
    assert layout._kvstore(files.path("gs://bucket/runs/a")) == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "runs/a/",
    }
    for other in ("http://a/b", "s3://a/b", "gs:/a"):
        with pytest.raises(ValueError, match=f"^{other}: need a local path or gs://BUCKET/"):
            files.path(other)
    monkeypatch.setattr(files, "_has", lambda package: False)
    with pytest.raises(ImportError, match=r"^gs://bucket/a: .* pip install gcsfs"):
        files.path("gs://bucket/a")
