"""Memory and speed of conversion in both directions, beside copy + fsync of the same bytes.

Run:   python tools/bench/convert.py [--layers=8] [--devices=1,16] [--folder=DIR]
The model has the shape of OLMo 2 7B with fewer layers (32: all of it, 60 GB of disk). Its bf16
folder is made up here; each conversion runs in a process of its own. Prints GB/s of what is
written, the share of the speed of two copies, CPU-seconds, and the peak of anonymous memory. The
first copy reads from the disk, as conversions leave nothing in memory; the second what that left.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np

from olmo_jax import files, presets
from olmo_jax.checkpoints import names
from olmo_jax.checkpoints.formats import hf, hf_config, safetensors
from olmo_jax.config.model import ModelConfig
from olmo_jax.config.parameters import axis_sizes

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = 64 << 20


def make(folder: pathlib.Path, n_layers: int) -> None:
    """A Hugging Face folder of random bf16 numbers near one, a file for each layer."""
    model = ModelConfig(**presets.MODELS["olmo2_7B"] | {"n_layers": n_layers})
    folder.mkdir()
    lengths = axis_sizes(model)
    bits = np.random.default_rng(0).integers(0x3F00, 0x4000, BLOCK // 2, np.uint16)
    numbers = bits.view(jnp.bfloat16)
    weight_map = {}
    for layer in range(-1, n_layers):
        rows = [row for row in names.rows(model, "Hugging Face") if row.is_layered == (layer >= 0)]
        file = f"model-{layer + 2:05}-of-{n_layers + 1:05}.safetensors"
        shapes = {
            row.key_of(layer): (numbers.dtype, names.shape(row.torch_axes, lengths)) for row in rows
        }

        def values(key: str, shapes=shapes):
            left = int(np.prod(shapes[key][1]))
            while left:
                n = min(left, numbers.size)
                yield numbers[:n]
                left -= n

        safetensors.write(folder / file, shapes, values)
        weight_map |= dict.fromkeys(shapes, file)
    config = hf_config.write(model, {"pad_token_id": 100277, "eos_token_id": 100257}, "bfloat16")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / hf.CONFIG).write_bytes(json.dumps(config).encode())
    (folder / hf.INDEX).write_bytes(json.dumps(index).encode())


def size_of(folder: pathlib.Path) -> int:
    """Bytes in all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy(source: pathlib.Path, target: pathlib.Path) -> tuple[float, float]:
    """Seconds and CPU-seconds that cp and fsync of every file take; the copies do not stay."""
    seconds, cpu = 0.0, time.process_time()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            start = time.perf_counter()
            shutil.copyfile(path, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())
            seconds += time.perf_counter() - start
            target.unlink()
    return seconds, time.process_time() - cpu


def convert(n_devices: int, *arguments: str) -> tuple[float, float, float]:
    """Seconds, CPU-seconds, and the peak of anonymous memory in GB of a conversion."""
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    process = subprocess.Popen(
        [sys.executable, "-m", "olmo_jax.convert", *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_bytes().decode()
                peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            except (OSError, IndexError):
                return
            time.sleep(0.01)

    start = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"convert {' '.join(arguments)} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--devices", default="1,16")
    parser.add_argument("--folder", default="/tmp/olmo_jax_bench_convert")
    args = parser.parse_args()
    base = pathlib.Path(files.expand(args.folder))
    base.mkdir(parents=True)
    source, ours, back, copied = (base / name for name in ("hf", "ours", "back", "copied"))
    try:
        make(source, args.layers)
        os.sync()
        print(f"source: {size_of(source) / 1e9:.1f} GB of bf16, {args.layers} layers")
        for n_devices in map(int, args.devices.split(",")):
            for verb, start, end in (("to_jax", source, ours), ("to_hf", ours, back)):
                seconds, cpu, peak = convert(n_devices, verb, str(start), str(end))
                os.sync()
                written, copies = size_of(end) / 1e9, [copy(end, copied) for _ in range(2)]
                shares = ", ".join(
                    f"{cp / seconds:4.2f} x copy ({written / cp:.2f} GB/s, {cp_cpu:.1f} CPU-s)"
                    for cp, cp_cpu in copies
                )
                print(
                    f"{verb:6} {n_devices:2} devices  {written / seconds:5.2f} GB/s  {cpu:6.1f}"
                    f" CPU-s  {shares}  peak {peak:.2f} GB",
                    flush=True,
                )
            shutil.rmtree(ours)
            shutil.rmtree(back)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
