"""Packages in folders beside the test environment: Ai2's own as judges, compilers for TPU and GPU.

They are installed without their dependencies, for those would be another torch: torch and what
comes with it are the test environment's, the rest is in `ai2.txt`.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import uuid
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent
REST = ("--requirement", str(HERE / "ai2.txt"))
PACKAGES = {
    "olmo-core-3": ("ai2-olmo-core==3.0.0",),
    "olmo-core-2": ("ai2-olmo-core==2.6.0",),
    "olmo": ("ai2-olmo==0.6.0", "ai2-olmo-core==0.1.0"),
}
# What transformers needs of other versions than the test environment has.
HUB = ("huggingface_hub<2", "httpx", "httpcore", "h11", "anyio", "sniffio", "certifi", "idna")
OLD_HUB = ("huggingface_hub<1", "requests", "urllib3", "charset_normalizer", "certifi", "idna")
PTXAS = "nvidia-cuda-nvcc==13.*"
UNUSED = ("olmo_data/hf_datasets", "olmo_data/oe_eval_tasks")  # 180 MB
TIMEOUT = 180  # seconds for pip


def install(name: str, cache: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a package and of the rest; made on first use.

    The test is skipped, with pip's reason, where pip cannot install them.
    """
    return [_folder(name, PACKAGES[name], cache), _folder("rest", REST, cache)]


def libtpu(cache: pathlib.Path) -> pathlib.Path:
    """The folder of the TPU compiler that fits this JAX; it needs no TPU, but looks for one.

    In the environment itself it would do so, and complain, at every start of JAX.
    """
    pin = next(p for p in importlib.metadata.requires("jax") or [] if p.startswith("libtpu"))
    version = pin.split(";")[0].strip()  # libtpu==0.0.42.*
    return _folder(version.replace("==", "-").removesuffix(".*"), (version,), cache)


def cuda(cache: pathlib.Path) -> pathlib.Path:
    """The folder of the GPU compiler that fits this JAX and of NVIDIA's ptxas; it needs no GPU."""
    version = importlib.metadata.version("jax")
    packages = (f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}", PTXAS)
    return _folder(f"cuda-{version}", packages, cache)


def transformers(version: str, cache: pathlib.Path) -> pathlib.Path:
    """The folder of an older transformers, 4.57 or later."""
    hub = OLD_HUB if version.startswith("4.") else HUB
    packages = (f"transformers=={version}", "tokenizers==0.22.2", "typer-slim", *hub)
    return _folder(f"transformers-{version}", packages, cache)


def _folder(name: str, what: tuple[str, ...], cache: pathlib.Path) -> pathlib.Path:
    folder = cache / f"{name}-python3.{sys.version_info.minor}"
    if folder.exists():
        return folder
    fresh = cache / f"{folder.name}-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-compile", "--target", str(fresh), *what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        reason, failed = f"it took more than {TIMEOUT} s", True
    if failed:
        shutil.rmtree(fresh, ignore_errors=True)
        pytest.skip(f"pip cannot install {what[-1]}: {reason}")
    for unused in UNUSED:
        shutil.rmtree(fresh / unused, ignore_errors=True)
    try:
        fresh.rename(folder)
    except OSError:  # another worker was faster
        shutil.rmtree(fresh)
    return folder


def run(script: pathlib.Path, folders: list[pathlib.Path], *args: str) -> Any:
    """What a program prints as JSON, run with the packages of these folders."""
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
