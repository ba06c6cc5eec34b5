"""The default corpus, present wherever Python is: the source text of its standard library.

`prepare` turns it into what any run needs: token files, a tokenizer, a held-out text. The result
is kept in a folder named after a hash of everything that it depends on, so that other inputs get
another folder and no run ever reads tokens of an older recipe.
"""

import hashlib
import json
import os
import pathlib
import platform
import shutil
import sysconfig
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from olmo_jax import files
from olmo_jax.data import token_files
from olmo_jax.data.documents import write_documents
from olmo_jax.data.tokenizer import Tokenizer

RECIPE = 1  # raise it when the code below makes other files of the same inputs
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
HELDOUT_ONE_IN = 20
SHUFFLE_SEED = 0
OUTPUTS = (
    "train.npy", "train.csv.gz", "heldout.npy", "heldout.csv.gz", "heldout.txt", "tokenizer.json",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Where the parts of a prepared corpus are."""

    folder: str
    train_path: str  # token file: shuffled documents, each with its EOS
    heldout_path: str  # token file: documents in the order of their names, each with its EOS
    heldout_text_path: str  # the same documents as text, one after the other
    tokenizer_path: str
    vocab_size: int  # ids of the tokenizer; below what was asked for if the text is small
    eos_id: int
    dtype: str  # of the token files


def prepare(
    directory: str | os.PathLike[str],
    vocab_size: int = 4096,
    dtype: str | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = print,
) -> Corpus:
    """Make the corpus of the running Python under `directory`, or reuse it if it is there.

    Args:
      directory: where prepared corpora are kept (`config.data.corpus_dir`). Several processes
        may call at the same time.
      vocab_size: of the byte-level BPE that is trained on the training files.
      dtype: of the token files; None: the smallest for `vocab_size`.
      root: read the sources here instead of in the standard library.
      log: gets one line: reused, or built and why.

    Raises:
      FileNotFoundError: if there are no sources, as in a Python whose library is a zip file.
      ValueError: if a file split is empty or `dtype` cannot hold the ids.
      OSError: if `directory` cannot be written.
    """
    began = time.perf_counter()
    root = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
    sources = read_sources(root)
    dtype = token_files.token_dtype(dtype, vocab_size).name
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise ValueError(f"config.data.dtype={dtype} cannot hold {vocab_size} ids")
    inputs = {
        "recipe": RECIPE,
        "python": platform.python_version(),
        "vocab_size": vocab_size,
        "dtype": dtype,
        "sources": _hash(*(part for item in sources.items() for part in item)),
    }
    folder = pathlib.Path(directory) / f"stdlib-{_hash(json.dumps(inputs))[:12]}"
    reason = _defect(folder)
    if reason is None:
        log(f"corpus: {folder} is up to date and reused")
        return _corpus(folder)
    if not folder.exists():
        reason = _difference(folder.parent, inputs)
    try:
        facts = _build_and_publish(folder, sources, inputs)
    except OSError as error:
        raise OSError(f"config.data.corpus_dir: cannot write {folder}: {error}") from error
    log(f"corpus: {folder} built in {time.perf_counter() - began:.1f} s ({reason}): {facts}")
    return _corpus(folder)


def read_sources(root: pathlib.Path) -> dict[str, str]:
    """The Python files under `root` as `{relative path: text}`, sorted by path.

    Without tests and installed packages; files that are empty or not UTF-8 are left out.

    Raises:
      FileNotFoundError: if there is none.
    """
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    sources = {}
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            text = path.read_bytes().decode() if path.is_file() else ""
        except UnicodeDecodeError:
            continue
        if text:
            sources[name] = text
    if not sources:
        raise FileNotFoundError(
            f"config.data.corpus=stdlib: no Python sources under {root};"
            " name token files in config.data.paths instead"
        )
    return sources


def is_heldout(name: str) -> bool:
    """Whether the file with this relative path is kept out of training; one in twenty is."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def _build_and_publish(folder: pathlib.Path, sources: dict[str, str], inputs: Any) -> str:
    """Build beside `folder`, then move there in one step, so that nobody sees half a corpus."""
    parts = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    parts.mkdir(parents=True)
    try:
        facts = _build(parts, sources, inputs)
        _publish(parts, folder)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return facts


def _build(folder: pathlib.Path, sources: dict[str, str], inputs: dict[str, Any]) -> str:
    """Write OUTPUTS and the manifest into `folder`; returns its facts in words."""
    train = [name for name in sources if not is_heldout(name)]
    heldout = [name for name in sources if is_heldout(name)]
    if not train or not heldout:
        raise ValueError(
            f"config.data.corpus: {len(train)} files for training and {len(heldout)} held out;"
            " need some of both"
        )
    order = np.random.Generator(np.random.PCG64(SHUFFLE_SEED)).permutation(len(train))
    train = [train[i] for i in order]

    tokenizer = Tokenizer.train_bpe([sources[name] for name in train], inputs["vocab_size"])
    tokenizer.save(folder / "tokenizer.json")
    facts = []
    for split, names in (("train", train), ("heldout", heldout)):
        texts = [sources[name] for name in names]
        documents = ([*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts))
        path = folder / f"{split}.npy"
        n_tokens = write_documents(path, documents, inputs["dtype"], names)
        n_bytes = sum(len(text.encode()) for text in texts)
        facts.append(f"{split} {len(names)} files, {n_bytes:,} bytes, {n_tokens:,} tokens")
    text = "".join(sources[name] for name in heldout)
    (folder / "heldout.txt").write_bytes(text.encode())

    manifest = {
        "inputs": inputs,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "outputs": {name: _hash((folder / name).read_bytes()) for name in OUTPUTS},
    }
    (folder / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())
    return "; ".join(facts)


def _publish(parts: pathlib.Path, folder: pathlib.Path) -> None:
    """Move `parts` to `folder`, unless another process has put a sound corpus there."""
    try:
        parts.rename(folder)
    except OSError:
        defect = _defect(folder)
        if not folder.exists():
            raise
        if defect is not None:
            folder.rename(parts.with_name(f"{parts.name}-old"))
            parts.rename(folder)
            shutil.rmtree(parts.with_name(f"{parts.name}-old"))


def _defect(folder: pathlib.Path) -> str | None:
    """Why the corpus in `folder` cannot be used; None if it can."""
    try:
        manifest = _manifest(folder)
        for name in OUTPUTS:
            if _hash((folder / name).read_bytes()) != manifest["outputs"][name]:
                return f"{name} there is not what was written"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"no {pathlib.Path(error.filename).name} there"
    except (ValueError, KeyError):
        return "damaged manifest"
    return None


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest = files.json_object(path.read_bytes(), str(path))
    match manifest:
        case {"vocab_size": int(), "inputs": {"dtype": str()}, "outputs": dict(), "eos_id": int()}:
            return manifest
    raise ValueError(f"{path} is damaged")


def _difference(directory: pathlib.Path, inputs: dict[str, Any]) -> str:
    """What sets `inputs` apart from those of the newest corpus in `directory`."""
    manifests = sorted(directory.glob("stdlib-*/manifest.json"), key=os.path.getmtime)
    try:
        before = _manifest(manifests[-1].parent)["inputs"]
    except (IndexError, ValueError):
        return "new"
    changed = [key for key in inputs if inputs[key] != before.get(key)]
    return f"not {manifests[-1].parent.name}: other {', '.join(changed)}"


def _corpus(folder: pathlib.Path) -> Corpus:
    manifest = _manifest(folder)
    return Corpus(
        folder=str(folder),
        train_path=str(folder / "train.npy"),
        heldout_path=str(folder / "heldout.npy"),
        heldout_text_path=str(folder / "heldout.txt"),
        tokenizer_path=str(folder / "tokenizer.json"),
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        dtype=manifest["inputs"]["dtype"],
    )


def _hash(*parts: str | bytes) -> str:
    """Hex sha256 of the parts, in a way that keeps their borders."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
