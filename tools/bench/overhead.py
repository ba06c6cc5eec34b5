"""What the framework costs: a whole run of olmo_jax.train beside the same model in plain JAX.

Run:   python tools/bench/overhead.py [--repeats=5] [--steps=40] [--core=0] [--other='COMMAND']
An OLMo 2 of 8.4M parameters, 2,048 tokens per step, fp32. Both sides are fresh processes on the
same core, in turns: CPU-seconds per step, from the start of the process to the end of the first
step (without and with a filled compilation cache), and peak memory. COMMAND, split at spaces with
{tokens} and {steps} filled in, takes the place of `plain.py`; it prints a line that begins with
"step 1/" and one with "step N/". This file is also the config of our side.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np

VOCAB, SEQ, ROWS = 8192, 256, 8
HERE = pathlib.Path(__file__).resolve()


def get_config():
    from olmo_jax import config, presets

    c = config.default()
    c.model.update(presets.OLMO2)
    c.model.update({"vocab_size": VOCAB, "d_model": 256, "n_layers": 4, "n_heads": 4})
    c.model.update({"n_kv_heads": 4, "head_dim": 64, "d_ff": 1024, "max_seq_len": SEQ})
    c.compute.dtype = "float32"
    c.compute.remat = "none"
    c.data.dtype = "uint16"
    c.data.seq_len = SEQ
    c.data.global_batch_size = ROWS * SEQ
    c.optim.name = "adamw"
    c.optim.lr = 1e-3
    c.optim.schedule.warmup = 10
    c.optim.schedule.t_max = 50
    c.mesh.fsdp = 1
    c.checkpoint.step0 = False
    return c


def cpu_seconds(pid: int) -> float:
    """CPU-seconds of a running process."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_bytes().decode().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(command: list[str], core: int, steps: int, cache: str) -> dict[str, float]:
    """Run to the end; figures at the lines of the first and the last step."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # on both sides; see Makefile
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": str(HERE.parents[2]),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    assert process.stdout is not None
    at = {}
    for line in process.stdout:
        if line.startswith("step "):
            at[line.split("/")[0]] = cpu_seconds(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0:4]} failed, see above")
    per_step = (at[f"step {steps}"] - at["step 1"]) / max(steps - 1, 1)
    return {"first": at["step 1"], "step": per_step, "rss": usage.ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument(
        "--other", default=f"{sys.executable} {HERE.parent}/plain.py {{tokens}} {{steps}}"
    )
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="olmo_jax_bench"))
    tokens = folder / "tokens.npy"
    zipf = np.random.default_rng(0).zipf(1.2, 300_000) % VOCAB
    zipf.astype(np.uint16).tofile(tokens)  # headerless, as OLMo's are
    ours = f"{sys.executable} -m olmo_jax.train --config={HERE} --config.data.paths={tokens}"
    ours += f" --config.dir={folder}/run --config.compute.compilation_cache={folder}/cache_ours"
    ours += " --config.train.duration={steps}"
    sides = {"ours": ours, "plain": args.other}
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.repeats):
        for cache, steps in (("cold", args.steps), ("warm", 2)):
            for side, command in sides.items():
                shutil.rmtree(folder / "run", ignore_errors=True)
                if cache == "cold":
                    shutil.rmtree(folder / f"cache_{side}", ignore_errors=True)
                words = command.format(tokens=tokens, steps=steps).split()
                found = run(words, args.core, steps, f"{folder}/cache_{side}")
                found[f"first, {cache}"] = found.pop("first")
                for name in found if cache == "cold" else ("first, warm",):
                    figures.setdefault((name, side), []).append(found[name])
        print("  ".join(f"{n} {s} {v[-1]:.3f}" for (n, s), v in figures.items()), flush=True)
    shutil.rmtree(folder)
    units = {"step": "CPU-s per step", "rss": "GiB at the peak"}
    for name in ("step", "first, cold", "first, warm", "rss"):
        a, b = figures[name, "ours"], figures[name, "plain"]
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        unit = units.get(name, f"CPU-s to the end of the {name.replace(',', ' step,')} cache")
        print(f"{statistics.median(a):7.3f} {statistics.median(b):7.3f}  {ratio:5.2f}x  {unit}")


if __name__ == "__main__":
    main()
