"""Speed and memory of saving and restoring 1 GiB, beside cp + fsync of the same bytes.

Run:   python tools/bench/checkpoint.py [--folder=DIR] [--repeats=5]
Prints medians: seconds, share of cp's speed, CPU-seconds, and the peak of anonymous memory above
that of the state itself (which a background save copies).
"""

import argparse
import os
import pathlib
import shutil
import statistics
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from olmo_jax import files
from olmo_jax.checkpoints import layout, snapshot, storage

GIB = 1 << 30


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    status = pathlib.Path("/proc/self/status").read_bytes().decode()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(work: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds, CPU-seconds, and GiB of anonymous memory at the peak above the start."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    return seconds, cpu, peak / GIB


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """What cp and fsync do."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="/tmp/olmo_jax_bench")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    folder = pathlib.Path(files.expand(args.folder))
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name: jnp.ones((16, 1024, 4096)) * i for i, name in enumerate("abcd")}
    state = jax.block_until_ready({"params": {"layers": layers}})  # 4 leaves of 16 layers of 16 MiB
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    source, target = folder / "source", folder / "target"
    source.write_bytes(os.urandom(GIB))
    step = files.path(folder / "step1")

    def background() -> None:
        nonlocal job
        job = snapshot.save(step, state, {}, background=True)

    job: snapshot.Save
    rows: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(args.repeats):
        for name, work in (
            ("cp + fsync", lambda: copy(source, target)),
            ("save", lambda: snapshot.save(step, state, {})),
            ("restore", lambda: jax.block_until_ready(storage.restore(step, abstract))),
            ("save, background: until the step goes on", background),
            ("save, background: until it is complete", lambda: job.wait()),
        ):
            if name.startswith("save") and "complete" not in name:
                layout.remove(step)
                os.sync()
            rows.setdefault(name, []).append(measure(work))
        target.unlink()
    shutil.rmtree(folder)
    cp = statistics.median(seconds for seconds, *_ in rows["cp + fsync"])
    for name, runs in rows.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        share = f"{cp / seconds:5.2f} x  {cpu:5.2f} CPU-s"
        print(f"{name:42} {seconds:6.2f} s  {share}  +{peak:.2f} GiB")


if __name__ == "__main__":
    main()
