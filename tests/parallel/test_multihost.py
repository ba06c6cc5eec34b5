"""Several processes train as one: they meet, agree, stop together, and never wait for ever."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from unittest.mock import Mock

import jax
import pytest
import runs

from olmo_jax import files
from olmo_jax.checkpoints import layout
from olmo_jax.data.loader import Loader
from olmo_jax.parallel import distributed, watchdog
from olmo_jax.parallel.distributed import Cluster
from olmo_jax.records import jsonl

# As many KV heads as four tensor ways need, several documents in a row, and a step that is skipped.
RICH = "model.n_kv_heads=4 data.document_mask=eos train.skip_steps=((3,4),) train.duration=12"
ENDLESS = "train.duration=100000"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def until_somebody_listens(port: int, words: bytes = b"") -> None:
    """Say these words there."""
    for _ in range(600):
        try:
            with socket.create_connection(("localhost", port), timeout=5) as stranger:
                return stranger.sendall(words)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nobody listens at {port}")


@contextlib.contextmanager
def pair(
    *options: str, code: str = "", n_devices: int = 1, n_threads: int = 1
) -> Iterator[tuple[subprocess.Popen, ...]]:
    """Two processes that train together; with one thread each, collectives keep their order."""
    port = free_port()
    cluster = [f"--coordinator=localhost:{port}", "--n_processes=2", "--connect_timeout=120"]
    started = [
        runs.start(*runs.flags(*options), *cluster, f"--process_id={i}", code=code,
                   n_devices=n_devices, n_threads=n_threads)
        for i in range(2)
    ]  # fmt: skip
    with runs.processes(*started):
        yield tuple(started)


def wait_for(process: subprocess.Popen, words: str) -> str:
    """The first line of its output that has these words."""
    with limit(process):
        for line in process.stdout:
            if words in line:
                return line
    raise AssertionError(f"{words!r} never came; {process.stderr.read()[-3000:]}")


@contextlib.contextmanager
def limit(process: subprocess.Popen) -> Iterator[None]:
    timer = threading.Timer(180, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.fixture(scope="module")
def options(tmp_path_factory, compiled) -> list[str]:
    tokens = runs.write_tokens(tmp_path_factory.mktemp("data") / "tokens.npy")
    return [f"data.paths={tokens}", f"compute.compilation_cache={compiled}",
            "checkpoint.interval=100", "checkpoint.step0=false"]  # fmt: skip


# --- training -------------------------------------------------------------------------------------

ONE_MESH_AFTER_THE_OTHER = """
import dataclasses
from olmo_jax.training import start
from olmo_jax.config.model import MeshConfig
run = start.train
def stages(config, *parts):
    for stop, accumulate, mesh in {stages}:
        end = run(dataclasses.replace(
            config, mesh=MeshConfig(**mesh),
            train=dataclasses.replace(config.train, hard_stop=stop),
            compute=dataclasses.replace(config.compute, accumulate=accumulate),
        ), *parts)
        assert end.code == 0
    return end
start.train = stages
"""


# Last step, micro-batches, mesh. In the first context lies across processes of two devices each.
MIXED = [(12, 2, dict(fsdp=1, context=2, tensor=2))]
EACH = [(4, 2, dict(fsdp=4)), (8, 1, dict(fsdp=1, tensor=4)), (12, 1, dict(fsdp=1, context=4))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages", [MIXED, pytest.param(EACH, marks=pytest.mark.by_hand)], ids=["mixed", "each"]
)
def test_fsdp_tensor_and_context_across_processes_equal_one_process(  # P28
    tmp_path, options, stages
):
    alone, together = tmp_path / "alone", tmp_path / "together"
    rich = [*options, *RICH.split()]
    assert runs.run(*rich, f"dir={alone}").code == 0

    # XLA:CPU runs independent collectives of one program side by side, so two may reach Gloo in
    # another order in each process, which then wait for ever (seen in its stacks: all-reduces that
    # ThunkExecutor::SplitReadyQueue put on two threads). Accelerators order theirs. The run ends
    # itself when a step stalls, and the same command goes on.
    outputs, codes = ["", ""], set()
    for _ in range(5):
        with pair(*rich, f"dir={together}", "train.step_timeout_s=60",
                  code=ONE_MESH_AFTER_THE_OTHER.format(stages=stages), n_devices=2,
                  n_threads=16) as both:  # fmt: skip
            ended = [process.communicate(timeout=600) for process in both]
        outputs = [said + out for said, (out, _) in zip(outputs, ended, strict=True)]
        codes = {process.returncode for process in both}
        if 74 not in codes:
            break
    assert codes == {0}, ended[0][1][-3000:] + ended[1][1][-3000:]
    assert "new run in" in outputs[0]
    first = 1
    for last, _, mesh in stages:
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1)
        ring = f" in a ring of {mesh['context']}" if "context" in mesh else ""
        begins = "" if first == 1 else f"resuming after step {first - 1}"
        for words in (
            f"4 cpu ({shape})\nattention: blocked{ring}\n{begins}",
            f"training steps {first} to {last}",
        ):
            assert words in outputs[0]
        first = last + 1
    others = [line for line in outputs[1].splitlines() if "Gloo" not in line]
    assert not others  # one of them speaks

    expected, found = jsonl.read(alone), jsonl.read(together)
    assert list(found) == list(range(1, 13))
    for step, values in expected.items():
        assert ("train/CE loss" in found[step]) == (step != 3)
        for name in values.keys() & {"train/CE loss", "train/Z loss", "optim/total grad norm"}:
            assert found[step][name] == pytest.approx(values[name], rel=1e-5), (step, name)
        assert found[step]["throughput/total tokens"] == values["throughput/total tokens"]


@pytest.mark.slow
def test_a_signal_to_one_process_makes_all_save_and_end(tmp_path, options):
    folder = tmp_path / "run"
    with pair(*options, f"dir={folder}", ENDLESS) as processes:
        wait_for(processes[0], "step 8/")
        for process in processes:  # and nobody reads any more, as when a terminal is closed
            process.stdout.close()
            process.stderr.close()
        began = time.monotonic()
        processes[1].send_signal(signal.SIGHUP)
        assert [process.wait(90) for process in processes] == [75, 75]
        seconds = time.monotonic() - began
    assert seconds < 10  # 1 s where nothing else runs
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert layout.is_complete(files.path(checkpoint))
    saved = int(checkpoint.name.removeprefix("step"))
    assert max(jsonl.read(folder)) == saved
    result = runs.run(*options, f"dir={folder}", ENDLESS, f"train.hard_stop={saved + 1}")
    assert result.code == 0
    assert f"resuming after step {saved}" in result.out


WRECKING = """
from olmo_jax.training import pacing
rates = pacing.Pacing.rates
pacing.Pacing.rates = lambda self, at, *args: (1e30, 1.0) if at == 6 else rates(self, at, *args)
"""


@pytest.mark.by_hand
def test_all_processes_fall_back_to_the_same_checkpoint(tmp_path, options):
    place = [*options, f"dir={tmp_path}/run", "checkpoint.interval=6", "checkpoint.step0=true",
             "train.duration=12", "train.max_nonfinite_steps=3"]  # fmt: skip
    with pair(*place, code=WRECKING) as processes:
        errors = [process.communicate(timeout=180)[1] for process in processes]
        assert all(process.returncode not in (0, 75) for process in processes)
    assert "the last finite loss is that of step 6." in errors[0]
    checkpoints = tmp_path / "run/checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step0", "step6"}
    with pair(*place) as processes:
        outputs = [process.communicate(timeout=180) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert "never since the start from step 6: falling back to step 0," in outputs[0][0]
    names = {"step0", "step6.nonfinite", "step6", "step12"}
    assert {path.name for path in checkpoints.iterdir()} == names
    assert list(jsonl.read(tmp_path / "run")) == [*range(13)]


# The first steps compile, which takes its time on a machine that others use too.
PATIENT_AT_FIRST = """
from olmo_jax.parallel import watchdog
beat = watchdog.Watchdog.beat
def patient(self, what):
    beat(self, what)
    if what in ("step 1", "step 2"):
        self._beat += 300
watchdog.Watchdog.beat = patient
"""


@pytest.mark.slow
def test_a_stalled_process_ends_the_run_after_the_set_time(tmp_path, options):
    place = [*options, f"dir={tmp_path}/run", ENDLESS, "train.step_timeout_s=4"]
    with pair(*place, code=PATIENT_AT_FIRST) as processes:
        wait_for(processes[0], "step 5/")
        began = time.monotonic()
        processes[0].send_signal(signal.SIGSTOP)
        _, errors = processes[1].communicate(timeout=90)
        assert processes[1].returncode == 74
        assert 3 < time.monotonic() - began < 60
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert re.match(
            r"error: step \d+ has not finished after \d+ s \(config\.train\.step_timeout_s=4\) in"
            r" process 1 of 2; the run ends here and can be resumed", line
        )  # fmt: skip
        processes[0].send_signal(signal.SIGCONT)
        _, errors = processes[0].communicate(timeout=90)
        assert processes[0].returncode in (1, 74)  # it may see first that the other is gone
        assert re.search(r"error: (the data of )?step \d+ (failed in|has not finished)", errors)
        assert "Traceback" not in errors


FAILING = """
import jax
from olmo_jax.parallel import watchdog
beat = watchdog.Watchdog.beat
def failing(self, what):
    beat(self, what)
    if what == "step 6" and jax.process_index() == 1:
        raise OSError("config.data.paths: the disk is gone")
watchdog.Watchdog.beat = failing
"""


@pytest.mark.slow
def test_a_process_that_fails_ends_at_once_and_so_do_the_others(tmp_path, options):
    place = [*options, f"dir={tmp_path}/run", ENDLESS, "checkpoint.interval=4"]
    with pair(*place, code=FAILING) as processes:
        wait_for(processes[0], "step 4/")
        _, errors = processes[1].communicate(timeout=90)
        assert processes[1].returncode == 1
        assert "error: config.data.paths: the disk is gone\n" in errors
        assert "Traceback" not in errors
        _, errors = processes[0].communicate(timeout=90)
        assert processes[0].returncode not in (0, 75)
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(
            r"error: step 6 failed in process 0 of 2: UNKNOWN: Gloo .*; another process may have"
            r" ended before: see its output", line
        )  # fmt: skip
        assert "Traceback" not in errors
    assert layout.is_complete(files.path(tmp_path / "run/checkpoints/step4"))


def test_the_watchdog_ends_a_process_that_does_not_move(capsys, monkeypatch):
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(watchdog.os, "_exit", end)
    with watchdog.Watchdog(1.5) as dog:
        for i in range(8):
            dog.beat(f"step {i}")
            time.sleep(0.25)
        assert codes == []
        assert ended.wait(20)
    assert set(codes) == {74}
    assert "error: step 7 has not finished after" in capsys.readouterr().err


def test_the_watchdog_says_that_data_are_waited_for(tmp_path, options, monkeypatch):
    beat, read, codes, go_on = watchdog.Watchdog.beat, Loader.read, [], threading.Event()

    def impatient(self, what):
        self._timeout_s = 0.2 if what == "the data of step 5" else 600.0
        beat(self, what)

    def hanging(self, step):
        assert step != 5 or go_on.wait(60)
        return read(self, step)

    def end(code: int) -> None:
        codes.append(code)
        go_on.set()

    monkeypatch.setattr(watchdog.Watchdog, "beat", impatient)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(Loader, "read", hanging)
    result = runs.run(*options, f"dir={tmp_path}/run", "train.duration=6", "checkpoint.interval=4")
    assert (result.code, set(codes)) == (0, {74})
    assert re.match(
        r"the data of step 5 has not finished after \d+ s \(config\.train\.step_timeout_s=0\.2\) in"
        r" process 0 of 1; the run ends here and can be resumed", result.errors[0]
    )  # fmt: skip


@pytest.fixture
def no_devices(monkeypatch) -> None:
    """As in a process of its own, JAX has not met its devices yet."""
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)


# --- meeting --------------------------------------------------------------------------------------


def test_a_missing_process_is_named_and_ends_the_wait(no_devices, capfd, monkeypatch):  # P39
    assert distributed.WAIT_LINE_S + 1 <= 15
    monkeypatch.setattr(distributed, "WAIT_LINE_S", 0.5)
    port, failures = free_port(), {}

    def meet(number: int, at: int, seconds: float) -> None:
        until_somebody_listens(port)
        try:
            distributed.meet(Cluster(f"localhost:{at}", 4, number), seconds)
        except TimeoutError as error:
            failures[number, at] = str(error)

    alone = free_port()
    threads = [threading.Thread(target=meet, args=a) for a in ((2, port, 1.8), (1, alone, 1.5))]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    result = runs.run(f"--coordinator=localhost:{port}", "--n_processes=4", "--process_id=0",
                      "--connect_timeout=2", "data.paths=x")  # fmt: skip
    assert 1.5 < time.monotonic() - began < 30
    for thread in threads:
        thread.join()
    assert result.code == 1
    waiting = f"waiting at localhost:{port}: 2 of 4 processes are here, missing: process 1, 3"
    assert waiting in result.out
    assert result.errors == [
        f"only 2 of 4 processes came to localhost:{port}; missing: process 1, 3. Start the same"
        " command there with --process_id=1"
    ]
    assert "met process 0" in failures[2, port]
    assert "process 0 names them" in failures[2, port]
    assert f"process 1 waits for process 0 at localhost:{alone}" in result.out
    assert failures[1, alone].endswith("start the same command there with --process_id=0")


def test_a_lonely_process_ends_by_itself(tmp_path):  # P39
    port = free_port()
    lonely = runs.start("--config.data.paths=x", f"--coordinator=localhost:{port}",
                        "--n_processes=2", "--process_id=0", "--connect_timeout=1")  # fmt: skip
    with runs.processes(lonely):
        _, errors = lonely.communicate(timeout=90)
        assert lonely.returncode == 1
        assert errors == (
            f"error: only 1 of 2 processes came to localhost:{port}; missing: process 1. Start the"
            " same command there with --process_id=1\n"
        )


def test_all_meet_whatever_else_comes_to_the_port():
    port, met = free_port(), []

    def meet(number: int) -> None:
        distributed.meet(Cluster(f"localhost:{port}", 3, number), 20)
        met.append(number)

    threads = [threading.Thread(target=meet, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for words in (b"GET / HTTP/1.1", b"", b"\xff\xfe", b"1", b"7"):  # strangers, and one that died
        until_somebody_listens(port, words)
    assert met == []
    meet(2)
    for thread in threads:
        thread.join(20)
    assert sorted(met) == [0, 1, 2]


def test_a_taken_port_is_named(no_devices):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        result = runs.run(f"--coordinator=localhost:{port}", "--n_processes=2", "--process_id=0",
                          "data.paths=x")  # fmt: skip
    assert result.code == 1
    (line,) = result.errors
    assert line.startswith(f"--coordinator=localhost:{port}: cannot listen: ")


# --- who is in the run ----------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[003-006]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip


def test_flags_win_over_slurm_and_one_process_needs_neither():
    flags = {"coordinator": "a:1", "n_processes": 2, "process_id": 1}
    assert distributed.find_cluster(flags, SLURM) == Cluster("a:1", 2, 1)
    assert distributed.find_cluster({}, {}) is None


def test_slurm_tells_who_is_there():
    port = 61_440 + 123_456 % 4096
    assert distributed.find_cluster({}, SLURM) == Cluster(f"gpu003:{port}", 4, 2, is_found=True)
    assert 61_440 <= port < 65_536
    assert distributed.find_cluster({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch = {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID")}
    assert distributed.find_cluster({}, batch) is None  # sbatch without srun
    other = SLURM | {"JAX_COORDINATOR_PORT": "8476"}
    assert distributed.find_cluster({}, other).coordinator == "gpu003:8476"


@pytest.mark.parametrize(
    ("n_tasks", "n_in_step", "n_processes"),
    [
        ("4", "1", None),  # the shell of `salloc -n4`, and `srun --overlap -n1` in it
        ("4", "4", 4),  # `srun` in it
        ("1", "2", 2),  # `srun -n2` in `salloc -n1 --overcommit`, where the job's number stayed
        ("4", None, 4),  # a SLURM that does not name the step's number
        ("1", None, None),
    ],
)
def test_the_tasks_of_the_slurm_step_count_and_not_those_of_the_job(
    n_tasks, n_in_step, n_processes
):
    environ = SLURM | {"SLURM_NTASKS": n_tasks, "SLURM_PROCID": "0"}
    environ.pop("SLURM_STEP_NUM_TASKS")
    environ |= {} if n_in_step is None else {"SLURM_STEP_NUM_TASKS": n_in_step}
    cluster = distributed.find_cluster({}, environ)
    assert (cluster and cluster.n_processes) == n_processes


def test_a_shell_of_a_slurm_allocation_waits_for_nobody(tmp_path, monkeypatch):
    shell = {"SLURM_STEP_NODELIST": socket.gethostname(), "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in (SLURM | shell | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    options = "data.paths=/nowhere.npy", f"dir={tmp_path}/run", "--connect_timeout=1"
    (line,) = runs.run(*options).errors
    assert "/nowhere.npy" in line  # it looks for its data


@pytest.mark.parametrize(
    ("tasks", "visible", "local_device"),
    [
        ("1(x4)", "0,1,2,3", None),  # one process has all GPUs of its node
        ("8(x2)", "0,1,2,3,4,5,6,7", 5),  # eight see all eight
        ("8(x2)", "5", None),  # --gpus-per-task=1: each sees its own
        ("8", None, None),
        (None, "0,1", None),
    ],
)
def test_each_slurm_task_takes_its_own_gpus(tasks, visible, local_device):
    environ = SLURM | {"SLURM_LOCALID": "5"}
    environ.pop("SLURM_STEP_TASKS_PER_NODE")
    named = {"SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    environ |= {name: value for name, value in named.items() if value is not None}
    assert distributed.find_cluster({}, environ).local_device == local_device


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-007,9],x1", "gpu003"),
        ("gpu[12]", "gpu12"),
        ("r[1,3]n[2-4]", "r1n2"),
        ("rack-1-node-4,rack-1-node-5", "rack-1-node-4"),
        ("a-b[01-02].cluster,c3", "a-b01.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert distributed.first_host(nodes) == first


def test_jax_is_told_all_and_asks_nobody(no_devices, monkeypatch):
    calls, update = [], {}
    monkeypatch.setattr(distributed, "meet", lambda *a: calls.append(a))
    monkeypatch.setattr(distributed.jax.config, "update", update.__setitem__)
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    cluster = Cluster("gpu003:61440", 16, 5, 5)
    distributed.start(cluster, 90)
    assert calls[0] == (cluster, 90)
    (given, named) = calls[1]
    assert given == ("gpu003:61440", 16, 5, [5])
    assert named == {"cluster_detection_method": "deactivate", "initialization_timeout": 90}
    assert update == {
        "jax_cpu_collectives_implementation": "gloo",
        "jax_cpu_enable_async_dispatch": False,
    }
    calls.clear()
    distributed.start(Cluster("a:1", 1, 0), 90)  # alone
    distributed.start(None, 90)
    assert calls == []


# --- TPU hosts ------------------------------------------------------------------------------------

POD = ",".join(f"tpu:{i}:10.0.0.{2 + i}" for i in range(4))


@pytest.fixture
def tpu(monkeypatch):
    """A host with TPU chips, as far as JAX knows; `tpu(hosts, worker)` plays Google's metadata."""
    assert jax.device_count() == 8
    for module in (distributed.cloud_tpu_init, sys.modules[distributed.GceTpuCluster.__module__]):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # JAX sets it where it finds no chips
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")

    def describe(hosts: str, worker: int, slices: str = "") -> None:
        attributes = {
            "agent-worker-number": str(worker),
            "worker-network-endpoints": hosts,
            "tpu-env": f"ACCELERATOR_TYPE: 'v5p-32'\n{slices}",
        }

        def get(url, **_):
            return types.SimpleNamespace(status_code=200, text=attributes[url.split("/")[-1]])

        monkeypatch.setitem(sys.modules, "requests", types.SimpleNamespace(get=get))

    yield describe
    jax.config.update("jax_platforms", platforms)


@pytest.fixture
def calls(no_devices, monkeypatch) -> list:
    """What a process without devices yet does to join others."""
    made = []
    monkeypatch.setattr(distributed, "meet", lambda *a: made.append(("meet", *a)))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: made.append(a))
    return made


def test_a_notebook_on_a_tpu_host_trains_twice_on_the_chips_that_it_sees(bare, tpu):
    tpu(POD, 0)  # which has asked JAX for devices, as the notebook does; nobody joins after that
    for said in ("training steps 1 to 1", "done already: step 1 of 1"):
        result = runs.run(*bare, "train.hard_stop=1")
        assert (result.code, result.errors) == (0, [])
        assert said in result.out
    assert not jax.distributed.is_initialized()


def test_who_has_joined_joins_once(calls, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.start(Cluster("a:1", 2, 0), 90)
    assert calls == []
    assert not distributed.is_one_of_several()  # joined by itself: an error ends no notebook
    monkeypatch.setattr(distributed.jax_distributed.global_state, "num_processes", 2)
    assert distributed.is_one_of_several()


@pytest.mark.parametrize("port", [None, "8476"])
def test_the_hosts_of_a_pod_join_before_jax_looks_for_devices(tpu, calls, port, monkeypatch):
    tpu(POD, 2)
    if port:
        monkeypatch.setenv("JAX_COORDINATOR_PORT", port)
    distributed.start(None, 90)
    place = f"10.0.0.2:{port or 8482}"
    assert calls == [
        ("meet", Cluster(place, 4, 2, is_found=True), 90),
        (place, 4, 2, None),
    ]


def test_pods_of_several_slices_and_of_gke_are_found(tpu, monkeypatch):
    slices = {"NUM_SLICES": "2", "SLICE_ID": "1", "COORDINATOR_ADDRESS": "10.0.0.9:80"}
    tpu(POD, 3, "\n".join(f"MEGASCALE_{name}: '{value}'" for name, value in slices.items()))
    found = distributed.find_pod({}, 90)
    assert found == Cluster("10.0.0.9:8482", 8, 7, is_found=True)
    assert distributed.find_pod({"JAX_COORDINATOR_ADDRESS": "a:1"}, 90).coordinator == "a:1"

    tpu("", 0)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.1.1,10.0.1.2")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    assert distributed.find_pod(os.environ, 90) == Cluster("10.0.1.1:8482", 2, 1, is_found=True)


def test_one_tpu_host_joins_nobody(tpu, calls):
    for name in (
        "TPU_PROCESS_ADDRESSES",
        "TPU_WORKER_HOSTNAMES",
    ):  # Kaggle and Colab; nobody is asked
        assert distributed.find_pod({name: "local"}, 90) is None
    tpu("tpu:0:10.0.0.2", 0)
    distributed.start(None, 90)
    jax.config.update("jax_platforms", "cpu")
    tpu(POD, 0)
    distributed.start(None, 90)
    assert calls == []


def test_a_tpu_host_that_learns_nothing_says_how_to_go_on(tpu, calls, bare, monkeypatch):
    failing = types.SimpleNamespace(get=Mock(side_effect=OSError("no route")))
    monkeypatch.setitem(sys.modules, "requests", failing)
    result = runs.run(*bare)
    assert result.code == 1
    assert result.errors == [
        "this host has a TPU, but does not learn who else is in its pod: no route. To train on its"
        " chips alone set TPU_WORKER_HOSTNAMES=localhost; else name the hosts with --coordinator,"
        " --n_processes and --process_id"
    ]
    assert calls == []


@pytest.mark.parametrize("cluster", [Cluster("a:1", 2, 0), None], ids=["flags", "pod"])
def test_devices_that_jax_has_met_alone_are_refused_to_several(cluster, calls, monkeypatch):
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 1 if cluster else 4)
    with pytest.raises(ValueError, match=r"before anything else of JAX$"):
        distributed.start(cluster, 90)
    assert calls == []


def test_without_a_tpu_a_host_that_looks_like_one_trains_and_says_so(calls, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_looks_like_tpu_host", lambda: True)
    assert distributed.find_pod({}, 90) is None
    assert capsys.readouterr().out == ""  # JAX_PLATFORMS=cpu
    jax.config.update("jax_platforms", None)
    try:
        distributed.start(None, 90)
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert calls == []
    assert capsys.readouterr().out == (
        "no TPU is here, though libtpu is and /dev/vfio or /dev/accel0 too: the run takes the"
        " devices that JAX finds. JAX_PLATFORMS=cpu or cuda says that they are meant,"
        " JAX_PLATFORMS=tpu that a run without a TPU is to end\n"
    )


@pytest.mark.parametrize("process", [0, 1])
def test_a_closed_port_of_a_pod_is_named_with_its_remedy(process, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "WAIT_LINE_S", 0)  # a round takes half a second
    place = f"localhost:{free_port()}"
    advice = (
        f"; if a firewall closes port {place[10:]}, set JAX_COORDINATOR_PORT to an open one for all"
    )
    with pytest.raises(TimeoutError) as caught:
        distributed.meet(Cluster(place, 2, process, is_found=True), 0.6)
    said = {
        0: f"waiting at {place}: 1 of 2 processes are here, missing: process 1",
        1: f"process 1 waits for process 0 at {place}",
    }
    assert capsys.readouterr().out.splitlines()[0] == said[process] + advice
    ended = {
        0: f"only 1 of 2 processes came to {place}; missing: process 1. Start",
        1: f"process 1 found no process 0 at {place}; start",
    }
    assert str(caught.value) == f"{ended[process]} the same command there{advice}"


def test_platforms_without_a_device_are_one_line(bare, monkeypatch):
    for error, said in (
        (RuntimeError("no chips"), "no chips"),
        (AssertionError(), "no such device"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", Mock(side_effect=error))
            result = runs.run(*bare)
        assert result.code == 1
        assert result.errors[0].startswith(f"JAX_PLATFORMS=cpu: {said}"), result
