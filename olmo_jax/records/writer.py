"""What a run tells while it trains: JSONL, TensorBoard, W&B, console lines, a progress bar.

Names are OLMo-core's exactly (its "(%)" of masked labels and instances are fractions, as there).
A resumed run continues its records from the checkpoint's step: what a dead timeline wrote after
that step is removed, so that each step has one value.
"""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from olmo_jax.records import jsonl
from olmo_jax.records.speed import Bar, Speed

MakeSink = Callable[[pathlib.Path, int, int], Any]
PPL_LIMIT = 10.0  # OLMo-core reports no perplexity above this loss


class Writer:
    """Keeps the metrics of every step and shows some; only process 0 writes.

    Each step is one JSON line `{"step", "tokens", "time", metric: value, ...}`, with the system
    when `step` returns; evaluations, norms and durations of checkpoints are further lines of the
    same step. A value that is not finite is null there: JSON has no word for it.

    Args:
      run_dir: folder of the records. For a URL, a path object with `/`, `exists`, `mkdir`,
        `read_bytes` and `write_bytes`: records are then kept locally and copied by `sync`.
      interval: steps between printed lines.
      speed: tells how fast it goes.
      sinks: make what is told too, of the records' folder here, the step they go on from and the
        last one of which something was told before.
      start_step: finished steps of the state that the run starts with ...
      start_tokens: ... and the tokens seen by it.
      is_resume: they are this run's own, so their records are to be there.
      total_steps: the last step of the run, for the ETA.
      process_index: of this process.

    Raises:
      ValueError: if W&B is asked for and cannot be used.
      OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        interval: int,
        speed: Speed,
        sinks: Sequence[MakeSink] = (),
        *,
        start_step: int,
        start_tokens: int,
        is_resume: bool = False,
        total_steps: int,
        process_index: int = 0,
    ):
        self._interval, self._total_steps = interval, total_steps
        self._first_step, self._last_step, self._tokens = start_step + 1, start_step, start_tokens
        self._early: dict[int, dict[str, float]] = {}  # of steps that are not finished
        self._speed = speed
        self._on = process_index == 0
        if not self._on:
            return
        self._bar = Bar()
        self._folder = jsonl.RecordFolder(run_dir)
        local = self._folder.local
        with jsonl.writing(local):
            self._jsonl = jsonl.Jsonl(local / jsonl.NAME, start_step)
            if is_resume and self._jsonl.missing:
                print(f"{self._jsonl.path}: no record of {jsonl.spans(self._jsonl.missing)};"
                      " they are not made again", flush=True)  # fmt: skip
            self._sinks = [make(local, start_step, self._jsonl.seen) for make in sinks]

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        lr: float,
        tokens: int,
        batch_tokens: int,
        data_wait_s: float,
    ) -> None:
        """Record a finished step, whose time is that since the last call.

        Call it when the metrics have arrived: one step late, so that the device never waits, but
        before an evaluation or a checkpoint that follows the step begins.

        Args:
          step: number of the step, from 1.
          metrics: scalars by name, from the device: `train/CE loss`, `optim/total grad norm` ...
          lr: learning rate of the step.
          tokens: seen in total after the step.
          batch_tokens: tokens of the step's global batch.
          data_wait_s: seconds that the loop waited for the batch, in the slowest process.
        """
        values = _scalars(metrics)
        loss = values.get("train/CE loss", math.inf)
        if loss < PPL_LIMIT:
            values["train/PPL"] = math.exp(loss)
        values |= {"train/global batch size": batch_tokens, "optim/LR (group 0)": float(lr)}
        values |= self._speed.step(tokens, batch_tokens, data_wait_s)
        self._tokens, self._last_step = tokens, step
        if not self._on:
            return
        self._record(step, self._early.pop(step, {}) | values)
        eta = self._speed.eta(self._total_steps - step)
        if step % self._interval == 0 or step in (self._first_step, self._total_steps):
            result = f"loss {loss:.4f}" if "train/CE loss" in values else "batch skipped"
            words = [f"step {step:,}/{self._total_steps:,}", result, f"lr {lr:.3g}"]
            if "optim/total grad norm" in values:
                words.append(f"grad norm {values['optim/total grad norm']:.3g}")
            self._print(*words, *self._speed.interval(), *eta)
        self._bar.draw(step, self._total_steps, " | ".join([f"loss {loss:.3f}", *eta]))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record more about a step: `eval/lm/{label}/CE loss` (`PPL`, `BPB`), norms, durations.

        Arrays `[n_layers]` become one metric per layer, `{name}/{layer}`. Losses are printed. What
        comes before the step is finished is recorded with it.
        """
        values = _scalars(metrics)
        if not self._on or not values:
            return
        if step > self._last_step:
            self._early.setdefault(step, {}).update(values)
            return
        self._record(step, values)
        for name in values:
            if name.startswith("eval/lm/") and name.endswith("/CE loss"):
                stem = name.removesuffix("CE loss")
                words = [f"step {step:,}", f"eval {stem.split('/')[2]}", f"loss {values[name]:.4f}"]
                for key in ("PPL", "BPB"):
                    if stem + key in values:
                        words.append(f"{key} {values[stem + key]:.4g}")
                self._print(*words)

    def table(self, step: int, name: str, values: np.ndarray) -> None:
        """Record `values [rows, columns]` of a step, in metrics.jsonl only."""
        if self._on:
            with jsonl.writing(self._jsonl.path):
                rows = np.round(np.asarray(values, float), 4).tolist()
                self._jsonl.log(step, self._tokens, {name: rows})

    @contextlib.contextmanager
    def pause(self, step: int, name: str | None = None) -> Iterator[None]:
        """Keep what is done inside (an evaluation, a checkpoint) out of the next step's time.

        Averages named "(actual avg)" and the ETA include it. If `name` is given, so many seconds
        are recorded under it: `checkpoint/save_duration_s`, `throughput/in-loop eval time (s)` ...
        """
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._speed.paused_s += seconds
        if name is not None:
            self.write(step, {name: seconds})

    def folder(self, name: str) -> pathlib.Path | None:
        """Where process 0 may put files that go along with the records; None in the others."""
        return self._folder.local / name if self._on else None

    def sync(self) -> None:
        """Bring the records to disk, and to the run's URL. Call it before each checkpoint."""
        if self._on:
            with self.pause(0), jsonl.writing(self._folder.local):
                for sink in (self._jsonl, *self._sinks):
                    sink.flush()
                self._folder.push()

    def close(self) -> None:
        """Finish the records; nothing can be written after."""
        if self._on:
            self._on = False
            self._bar.clear()
            for step, values in self._early.items():
                self._record(step, values)
            with jsonl.writing(self._folder.local):
                for sink in self._sinks:
                    sink.close()
                self._folder.push()
                self._folder.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        with jsonl.writing(self._jsonl.path):
            self._jsonl.log(step, self._tokens, values)
            for sink in self._sinks:
                sink.log(step, values)

    def _print(self, *words: str) -> None:
        self._bar.clear()
        print(" | ".join(words), flush=True)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    values = {}
    for name, value in metrics.items():
        if np.ndim(value):
            values |= {f"{name}/{i}": float(v) for i, v in enumerate(value)}
        else:
            values[name] = float(value)
    return values
