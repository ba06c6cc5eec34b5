"""Settings of all tests: eight virtual CPU devices, strict shapes, oracles by name.

`OLMO_JAX_TESTS_ON=cuda pytest -m gpu` runs on a GPU what needs one.
"""

import importlib.metadata
import os
import pathlib
import signal
import sys
import threading

if threading.current_thread() is threading.main_thread():
    # As in a terminal, also where whoever started the tests ignores or blocks it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGHUP,))
os.environ["JAX_PLATFORMS"] = os.environ.get("OLMO_JAX_TESTS_ON", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8"
        # Optimizing code that runs for milliseconds would take half of the suite's time.
        " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jax").startswith("0.10."):  # newer ones have no other way
        # And MLIR between HLO and LLVM half of what is left.
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where all workers of a test session keep the programs that training runs compile."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A file of tokens to train on."""
    import runs

    return runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")


@pytest.fixture
def place(tokens: pathlib.Path, compiled: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    """Options of a run in a folder of its own."""
    return [f"data.paths={tokens}", f"dir={tmp_path / 'run'}",
            f"compute.compilation_cache={compiled}"]  # fmt: skip


@pytest.fixture
def bare(place: list[str]) -> list[str]:
    """The same without files that are not looked at."""
    return ["checkpoint.step0=false", "log.tensorboard=false", *place]


@pytest.fixture(scope="session")
def ai2_packages(pytestconfig: pytest.Config) -> pathlib.Path:
    """The folder for `ai2.install`, kept between test sessions."""
    return pytestconfig.cache.mkdir("ai2")


@pytest.fixture(autouse=True)
def _tpu_compiler(request: pytest.FixtureRequest) -> None:
    """Tests marked `tpu` find libtpu, and skip where pip cannot install it."""
    if request.node.get_closest_marker("tpu"):
        request.getfixturevalue("libtpu")


@pytest.fixture(scope="session")
def libtpu(pytestconfig: pytest.Config) -> None:
    """Makes the TPU compiler importable here."""
    import ai2

    sys.path.append(str(ai2.libtpu(pytestconfig.cache.mkdir("libtpu"))))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference values beside the project; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with reference values is not here")
    return folder
