"""Ai2's own packages as judges: in folders beside the test environment, run as other programs.

Each package goes into a folder of its own without its dependencies, but for the few that its
models, optimizers and checkpoints import: torch and the rest are those of the test environment.
"""

import json
import os
import pathlib
import subprocess
import sys
import uuid
from typing import Any

import pytest

PACKAGES = {
    "olmo_core 3.0.0": ("ai2-olmo-core==3.0.0",),
    "olmo_core 2.6.0": ("ai2-olmo-core==2.6.0",),
    "olmo 0.6.0": ("ai2-olmo==0.6.0",),
}


def install(name: str, cache: pathlib.Path) -> pathlib.Path:
    """The folder that a package is in; made on first use, the test is skipped where that fails."""
    folder = cache / name.replace(" ", "-")
    if folder.exists():
        return folder
    fresh = cache / f"{folder.name}-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--target", str(fresh), *PACKAGES[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip is not here").splitlines()[-1]
        pytest.skip(f"pip cannot install {PACKAGES[name][0]}: {reason}")
    try:
        fresh.rename(folder)  # another worker may have been faster
    except OSError:
        assert folder.exists()
    return folder


def run(script: pathlib.Path, packages: pathlib.Path, *args: str) -> Any:
    """What a program prints as JSON, run with the packages of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *args], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
