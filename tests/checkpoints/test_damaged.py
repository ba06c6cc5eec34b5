"""Whatever is wrong in any file of a checkpoint of any kind: one line, with where it is."""

import collections
import copy
import functools
import hashlib
import io
import json
import pathlib
import random
import shutil
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch")
import hf
import test_legacy
import test_olmo_core
from test_hf import quiet

from olmo_jax import files
from olmo_jax.checkpoints import (
    compare,
    conversion,
    layout,
)
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.config.data import FixedLength
from olmo_jax.config.run import Config
from olmo_jax.config.text import to_dict
from olmo_jax.data.fixed_length import FixedLengthSource
from olmo_jax.training import start
from olmo_jax.training.origin import Origin

SECONDS = 5  # that a damaged checkpoint may take, on a busy machine too
N_BYTES = 60  # damages of the bytes of each file
CASES, MANY = 20, 2000  # damages of each kind of checkpoint; by hand
LOST, TWICE, NUMBER = object(), object(), 10**400
ODD = [None, True, -1, 0, 0.5, 3, 1e300, NUMBER, "x", "../x", [], {}, [None], {"x": 1}, [[1]], LOST]
DEEP = "[" * 100_000

Damage = tuple[str, Callable[[], bytes]]  # the file and what is in it then


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A small checkpoint of each kind, by name."""
    base = tmp_path_factory.mktemp("sound")
    olmo3 = hf.random_model("olmo3 yarn grouped")[0]
    olmo3.save_pretrained(base / "hf shards", max_shard_size="60KB")
    hf.random_model("olmoe")[0].save_pretrained(base / "hf experts")
    (base / "hf bin").mkdir()
    shutil.copy(base / "hf shards" / "config.json", base / "hf bin")
    torch.save(olmo3.state_dict(), base / "hf bin" / "pytorch_model.bin")
    olmo2 = hf.random_model("olmo2 grouped")[0].state_dict()
    state = test_legacy.legacy_state(olmo2, is_tied=False)
    test_legacy.save(base / "legacy", state, test_legacy.CONFIGS["olmo2 grouped"])
    test_legacy.save_optimizer(base / "legacy", state, by_number=True)
    state = {test_olmo_core.core_key(key): value for key, value in olmo2.items()}
    both = {"model": state, "optim": {"state": test_olmo_core.adam(state)}}
    test_olmo_core.save(base / "core", both)
    (base / "core" / "train").mkdir()
    loader = {"tokens_processed": 96, "epoch": 1, "sequence_length": 32}
    trainer = {"global_step": 3, "global_train_tokens_seen": 96, "data_loader": loader}
    torch.save(trainer, base / "core" / "train" / "rank0.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "LOGIT_BYTES", 0)  # compiles nothing
        conversion.to_jax(str(base / "core"), str(base / "ours"), optimizer=True, say=quiet)
    return {path.name: path for path in sorted(base.iterdir())}


# --- damage ---------------------------------------------------------------------------------------


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The place of every value within a value."""
    yield at
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from places(inner, (*at, key))


def replaced(value: Any, at: tuple, new: Any) -> Any:
    """A value with another one at a place, or without the one that is there."""
    if not at:
        return {} if new is LOST else new
    value = copy.copy(value)
    if new is LOST and len(at) == 1:
        del value[at[0]]
    else:
        value[at[0]] = replaced(value[at[0]], at[1:], new)
    return value


def odd_texts(data: bytes) -> list[bytes]:
    """A text file that is none, or one that readers differ on."""
    colon = lambda more: data.replace(b": ", b": " + more + b', "zz": ', 1)  # noqa: E731
    return [
        b"",
        data[: len(data) // 2],
        b"\xef\xbb\xbf" + data,
        data.decode().encode("utf-16"),
        data.replace(b"e", b"\xff", 1),
        data.replace(b"e", b"\0", 1),
        DEEP.encode(),
        DEEP.replace("[", '{"a":').encode(),
        b"[1]",
        b"NaN",
        colon(b"NaN"),
        colon(b"[" * 500 + b"]" * 500),
        colon(b"9" * 5000),
        data.replace(b"{", b'{"a": 1, "a": 2, ', 1),
    ]


def odd_bytes(data: bytes, seed: int) -> bytes:
    """The bytes with some of them changed, or without their end."""
    rng, new = random.Random(seed), bytearray(data)
    if seed % 10 == 0:
        return data[: rng.randrange(len(data))]
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(new))
        new[at] = rng.choice([0, 255, rng.randrange(256), new[at] ^ 1, ord(".")])
    return bytes(new)


def with_pickle(data: bytes, seed: int) -> bytes:
    """A zip of torch with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            is_pickle = name.endswith("data.pkl")
            new.writestr(name, odd_bytes(content, seed) if is_pickle else content)
    return out.getvalue()


def of_text(data: bytes, load: Callable, dump: Callable) -> Iterator[Callable[[], bytes]]:
    """Damages of a file of nested values."""
    value = load(data)
    for at in places(value):
        for new in ODD:
            yield functools.partial(
                lambda at, new: dump(replaced(value, at, new)).encode(), at, new
            )
    for text in odd_texts(data):
        yield functools.partial(bytes, text)


def damages(folder: pathlib.Path) -> Iterator[Damage]:
    """All damages of all files of a checkpoint."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == "zarr.json" and path.parent.name not in ("params.lm_head", "step"):
            continue  # all leaves are alike
        file, data = path.relative_to(folder).as_posix(), path.read_bytes()
        bytes_of = [functools.partial(odd_bytes, data, seed) for seed in range(N_BYTES)]
        if path.suffix == ".json" or path.name in ("_METADATA", layout.MARKER):
            found = of_text(data, json.loads, json.dumps)
        elif path.suffix == ".yaml":
            found = of_text(data, yaml.safe_load, yaml.safe_dump)
        elif path.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            texts = [*of_text(data[8:end], json.loads, json.dumps), *bytes_of[:10]]
            join = lambda make, rest=data[end:]: _with_length(make()) + rest  # noqa: E731
            found = [functools.partial(join, make) for make in texts]
        elif path.suffix in (".pt", ".bin"):
            found = [functools.partial(with_pickle, data, seed) for seed in range(N_BYTES)]
            found += bytes_of[:20]
        elif path.name == ".metadata" or path.suffix == ".distcp":
            found = bytes_of
        else:  # a chunk, which has a checksum
            continue
        yield from ((file, make) for make in found)


def _with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


# --- what comes of it -----------------------------------------------------------------------------


def use(folder: pathlib.Path) -> None:
    """Read everything that there is, as conversions and the trainer do."""
    source = open_weights(str(folder), optimizer=folder.name in ("core", "legacy"))
    for name in source.leaves:
        source.view(name)
    if folder.name == "ours":
        data = FixedLength(seq_len=32, eos_id=2)
        config = Config(model=source.model, data=data, dir=str(folder / "none"))
        source = Origin(files.path(folder), ("step", "params"), True, "")
        start.first_step(source, to_dict(config), ())
        rows = types.SimpleNamespace(lengths=np.array([6400]), paths=["a"], dtype=np.dtype("u1"))
        start.position(source, FixedLengthSource(rows, data, 256))


def complaint(folder: pathlib.Path, file: str, data: bytes) -> str | None:
    """What is wrong with how a checkpoint with this in one of its files is met; None: nothing."""
    path, marker = folder / file, folder / layout.MARKER
    before = {p: p.read_bytes() for p in (path, marker) if p.exists()}
    path.write_bytes(data)
    if marker in before and path != marker and file in json.loads(before[marker])["sha256"]:
        value = json.loads(before[marker])  # as if the file had been written so
        value["sha256"][file] = hashlib.sha256(data).hexdigest()
        marker.write_text(json.dumps(value))
    begin = time.monotonic()
    try:
        use(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        is_named = str(folder) in text or text.startswith("config.")  # or the option at odds
        if "\n" in text or len(text) > 2000 or not is_named:
            return f"not one line with the folder: {text[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for p, content in before.items():
            p.write_bytes(content)
    seconds = time.monotonic() - begin
    return f"{seconds:.0f} seconds" if seconds > SECONDS else None


def complaints(folder: pathlib.Path, chosen: list[Damage]) -> list[str]:
    found = collections.Counter[str]()
    for file, make in chosen:
        try:
            data = make()
        except (ValueError, OverflowError):  # this value has no such text
            continue
        if line := complaint(folder, file, data):
            found[f"{folder.name}/{file}: {line}"] += 1
    return [f"{n} x {line}" for line, n in found.most_common(20)]


KINDS = ["core", "hf bin", "hf experts", "hf shards", "legacy", "ours"]


@pytest.mark.parametrize("kind", KINDS)
def test_some_damages_of_any_file_are_met_with_a_line(folders, kind):
    by_file = collections.defaultdict(list)
    for file, make in damages(folders[kind]):
        by_file[file].append((file, make))
    rng = random.Random(16)
    files = [rng.choice([*by_file]) for _ in range(CASES - len(by_file))] + [*by_file]
    chosen = [rng.choice(by_file[file]) for file in files[-CASES:]]
    assert complaints(folders[kind], chosen) == []


@pytest.mark.by_hand
@pytest.mark.parametrize("kind", KINDS)
def test_many_damages_of_any_file_are_met_with_a_line(folders, kind):
    found = list(damages(folders[kind]))
    chosen = random.Random(16).sample(found, min(MANY, len(found)))
    assert complaints(folders[kind], chosen) == []
