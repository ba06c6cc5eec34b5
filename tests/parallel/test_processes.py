"""Two processes save, restore, fail and stop together; one alone obeys SIGTERM and SIGINT."""

import contextlib
import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from small_state import abstract, bits, state

from olmo_jax import files
from olmo_jax.checkpoints import snapshot, storage
from olmo_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[2]

START = """
import os, sys, time
import jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from olmo_jax import files
from olmo_jax.checkpoints import snapshot, storage
from olmo_jax.parallel import processes
"""


def start_two(code: str, *args: object) -> list[subprocess.Popen]:
    """Two processes with two virtual devices each, joined, running `code`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": runs.PATHS,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": runs.xla_flags(2),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", START + code, str(i), port, *map(str, args)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ends(started: list[subprocess.Popen]) -> list[str]:
    """What each printed, after a good end."""
    outputs = [process.communicate(timeout=60) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [out for out, _ in outputs]


SAVE = """
import tensorstore as ts
import runs
from small_state import abstract, bits, state
folder = files.path(sys.argv[3])

def n_read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])

written = []
write = storage.ArrayWriter.write
def counting(self, name, start, block):
    written.append(f"{name}@{','.join(map(str, start))}")
    write(self, name, start, block)
storage.ArrayWriter.write = counting

tree = state(1, 4)  # sharded over both processes
snapshot.save(folder / "step1", tree, {}, background=True).wait()
print("wrote", *written)
before = n_read()
other = state(2, 2)  # every process needs all of it
back = storage.restore(folder / "step1", abstract(other))
for name, x in storage.names(back).items():
    for a, b in zip(x.addressable_shards, storage.names(other)[name].addressable_shards):
        assert (jax.device_get(a.data) == jax.device_get(b.data)).all(), name

big = jax.make_array_from_callback((64, 1024), tree["params"]["embed"].sharding,
                                   lambda index: __import__("numpy").ones((64, 256), "float32"))
snapshot.save(folder / "step2", {"big": big}, {})
before = n_read()
storage.restore(folder / "step2", abstract({"big": big}))
print("read", n_read() - before)

print("said", processes.from_process_0(lambda: ["a", 1] if index == 0 else None))

if index == 1:  # its disk is full
    def failing(*_):
        raise OSError("No space left on device")
    storage.ArrayWriter.write = failing
job = snapshot.save(folder / "step3", state(1, 4), {}, background=True)
try:
    job.wait()
except OSError as error:
    print("failed", error)
"""


def test_two_processes_save_restore_and_fail_together(tmp_path):
    first, second = ends(start_two(SAVE, tmp_path))
    words = ("wrote", "read", "said", "failed")  # beside them Gloo's threads print, into each other
    lines = [
        dict(line.split(" ", 1) for line in out.splitlines() if line.startswith(words))
        for out in (first, second)
    ]
    wrote = [line["wrote"].split() for line in lines]
    assert not set(wrote[0]) & set(wrote[1])  # every chunk has one writer
    assert len(wrote[0] + wrote[1]) == len(set(wrote[0] + wrote[1])) == 3 * (4 + 12 + 3) + 2
    replicated = [[w for w in names if "norm" in w or "@" not in w] for names in wrote]
    assert all(replicated)  # replicas take turns

    back = storage.restore(files.path(tmp_path / "step1"), abstract(state(1, 8)))
    assert bits(back) == bits(state())

    whole = 64 * 1024 * 4
    for line in lines:
        assert whole / 2 <= int(line["read"]) < whole / 2 + 10_000  # its own half, and the metadata
        assert line["said"] == "['a', 1]"
        cause = "process 1: No space left on device"
        assert line["failed"] == f"checkpoint {tmp_path / 'step3'} was not saved: {cause}"
    assert not (tmp_path / "step3").exists()


STOP = """
with processes.Preemption() as preemption:
    for step in range(1, 2000):
        time.sleep(0.01)
        if step == 5:
            print("ready", flush=True)
        if preemption.requested():
            print("stopped", step, preemption.requested())
            break
"""


def test_two_processes_agree_on_the_step_to_stop_after():
    started = start_two(STOP)
    assert started[1].stdout.readline() == "ready\n"
    started[1].send_signal(signal.SIGINT)  # only one is told; it sends itself SIGTERM
    first, second = ends(started)
    assert first.splitlines()[-1] == second.splitlines()[-1]
    word, step, again = second.split()[-3:]
    assert (word, again) == ("stopped", "True")
    assert 5 <= int(step) < 200  # within 2 s


def test_one_process_stops_after_the_step_it_is_in():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before = signal.getsignal(number)
        with processes.Preemption() as preemption:
            assert not preemption.requested()
            signal.raise_signal(number)
            assert preemption.requested()
            assert preemption.requested()
        assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with processes.Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_that_ended_the_reader_stops_all_the_same(monkeypatch):
    def gone(*_):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    with processes.Preemption() as preemption:
        monkeypatch.setattr(processes.os, "write", gone)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested()


def test_a_second_interrupt_ends_the_process_at_once():
    code = (
        "import signal, time\nfrom olmo_jax.parallel.processes import Preemption\n"
        "with Preemption():\n print('ready', flush=True)\n for _ in range(2): time.sleep(30)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(50):
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(timeout=0.1) == -signal.SIGINT
                break
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode == -signal.SIGINT


def test_process_0_alone_answers_itself():
    assert processes.from_process_0(lambda: {"a": (1,)}) == {"a": (1,)}


def test_a_save_of_numpy_arrays_needs_no_devices(tmp_path):
    tree = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    snapshot.save(files.path(tmp_path / "w"), tree, {}, background=True).wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert bits(storage.restore(files.path(tmp_path / "w"), shapes)) == bits(tree)


# --- one run in a folder --------------------------------------------------------------------------


def test_nothing_stays_of_a_folder_in_which_nothing_was_written(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("a/b/run", "mine"):
        with contextlib.suppress(ZeroDivisionError), processes.only_writer(tmp_path / name):
            assert [path.name for path in (tmp_path / name).iterdir()] == [".lock"]
            raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]  # it was there before
    with processes.only_writer(tmp_path / "run"):
        (tmp_path / "run/config.json").touch()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json"}


def test_who_waits_for_a_lock_that_is_removed_takes_the_new_one(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    first = processes.only_writer(folder)
    first.__enter__()
    third = []

    def end_first(_: float) -> None:
        if not third:  # it removes the file that the second one has open
            open_file = processes._Lock._open

            def removed_meanwhile(self):
                file = open_file(self)
                first.__exit__(None, None, None)
                assert not folder.exists()
                monkeypatch.setattr(processes._Lock, "_open", open_file)
                return file

            monkeypatch.setattr(processes._Lock, "_open", removed_meanwhile)
        third.append(True)

    monkeypatch.setattr(processes.time, "sleep", end_first)
    with processes.only_writer(folder):
        assert len(third) == 1
        monkeypatch.setattr(processes, "LOCK_WAIT_S", 0.0)
        monkeypatch.setattr(processes.time, "sleep", lambda _: None)
        with pytest.raises(OSError, match="in use by another run"), processes.only_writer(folder):
            pass
    assert capsys.readouterr().out.splitlines()[0] == (
        f"config.dir: {folder} is in use by another run (process {os.getpid()} on"
        f" {socket.gethostname()}); waiting up to 60 s for its end"
    )


def test_a_folder_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(processes.fcntl, "flock", without)
    for name, why in (("gs://a/b", ""), (f"{tmp_path}/run", " (No locks available)")):
        with processes.only_writer(name):
            line = f"config.dir: {name} has no lock{why}; see that no other run writes there\n"
            assert capsys.readouterr().out == line


LOCK = """
folder, refused = sys.argv[3], False
try:
    with processes.only_writer(folder):
        jax.devices()  # only now: another run may still hold them
        with open(f"{folder}/records", "w"):  # only process 0 has to be there
            raise ValueError(f"process {index} fails")
except (OSError, ValueError) as error:
    print(error, processes.count(), processes.index())
processes.LOCK_WAIT_S = 0.0
try:
    with processes.only_writer(folder):
        print("taken again")
except OSError as error:
    print(str(error).split(" (")[0])
"""


def test_several_processes_hear_of_a_lock_and_keep_it_until_they_end(tmp_path):
    outputs = ends(start_two(LOCK, tmp_path / "run"))
    for i, out in enumerate(outputs):  # a save may be under way behind the error
        refused = f"config.dir: {tmp_path}/run is in use by another run"
        assert out.splitlines()[-2:] == [f"process {i} fails 2 {i}", refused]
    with processes.only_writer(tmp_path / "run"):
        assert (tmp_path / "run/records").exists()
