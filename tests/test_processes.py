"""Two processes save, restore, fail and stop together; one alone obeys SIGTERM and SIGINT."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
from small_state import abstract, bits, state

from olmo_jax import processes, snapshot, storage

ROOT = pathlib.Path(__file__).parents[1]

START = """
import os, sys, time
import jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from olmo_jax import processes, snapshot, storage
"""


def start_two(code: str, *args: object) -> list[subprocess.Popen]:
    """Two processes with two virtual devices each, joined, running `code`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
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
from small_state import abstract, bits, state
folder = storage.path(sys.argv[3])

def n_read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])

written = []
write = storage.Writer.write
def counting(self, name, start, block):
    written.append(f"{name}@{','.join(map(str, start))}")
    write(self, name, start, block)
storage.Writer.write = counting

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
    storage.Writer.write = failing
job = snapshot.save(folder / "step3", state(1, 4), {}, background=True)
try:
    job.wait()
except OSError as error:
    print("failed", error)
"""


def test_two_processes_save_restore_and_fail_together(tmp_path):
    first, second = ends(start_two(SAVE, tmp_path))
    lines = [dict(line.split(" ", 1) for line in out.splitlines()) for out in (first, second)]
    wrote = [line["wrote"].split() for line in lines]
    assert not set(wrote[0]) & set(wrote[1])  # every chunk has one writer
    assert len(wrote[0] + wrote[1]) == len(set(wrote[0] + wrote[1])) == 3 * (4 + 12 + 3) + 2
    replicated = [[w for w in names if "norm" in w or "@" not in w] for names in wrote]
    assert all(replicated)  # replicas take turns

    back = storage.restore(storage.path(tmp_path / "step1"), abstract(state(1, 8)))
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
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with processes.Preemption() as preemption:
            assert not preemption.requested()
            signal.raise_signal(number)
            assert preemption.requested()
            assert preemption.requested()
        assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_process_at_once():
    code = (
        "import signal, time\nfrom olmo_jax.processes import Preemption\n"
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
    assert processes.EXIT_PREEMPTED == 75


def test_a_save_of_numpy_arrays_needs_no_devices(tmp_path):
    tree = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    snapshot.save(storage.path(tmp_path / "w"), tree, {}, background=True).wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert bits(storage.restore(storage.path(tmp_path / "w"), shapes)) == bits(tree)
