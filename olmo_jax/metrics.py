"""What a run tells while it trains: JSONL, TensorBoard, W&B, console lines, a progress bar.

Names are OLMo-core's exactly (its "(%)" of masked labels and instances are fractions, as there).
A resumed run continues its records from the checkpoint's step: what a dead timeline wrote after
that step is removed, so that each step has one value.
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from olmo_jax import events, parsing, progress, records
from olmo_jax.config import Config, to_dict

PPL_LIMIT = 10.0  # OLMo-core reports no perplexity above this loss


class Writer:
    """Keeps the metrics of every step and shows some; only process 0 writes.

    Each step is one JSON line `{"step", "tokens", "time", metric: value, ...}`, with the system
    when `step` returns; evaluations, norms and durations of checkpoints are further lines of the
    same step. A value that is not finite is null there: JSON has no word for it.

    Args:
      cfg: the run.
      run_dir: folder of the records. For a URL, a path object with `/`, `exists`, `mkdir`,
        `read_bytes` and `write_bytes`: records are then kept locally and copied by `sync`.
      start_step: finished steps of the state that the run starts with ...
      start_tokens: ... and the tokens seen by it.
      is_resume: they are this run's own, so their records are to be there.
      total_steps: the last step of the run, for the ETA.
      n_devices: devices of all processes together.
      device_kind: as `jax.devices()[0].device_kind` says; an unknown one gets no MFU.
      process_index: of this process.

    Raises:
      ValueError: if W&B is asked for and cannot be used.
      OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: str | os.PathLike[str],
        *,
        start_step: int,
        start_tokens: int,
        is_resume: bool = False,
        total_steps: int,
        n_devices: int,
        device_kind: str,
        process_index: int = 0,
    ):
        self._interval, self._total_steps = cfg.log.interval, total_steps
        self._first_step, self._last_step, self._tokens = start_step + 1, start_step, start_tokens
        self._early: dict[int, dict[str, float]] = {}  # of steps that are not finished
        self._speed = progress.Speed(cfg, n_devices, device_kind)
        self._on = process_index == 0
        if not self._on:
            return
        self._bar = progress.Bar()
        self._folder = records.Folder(run_dir)
        local = self._folder.local
        with records.writing(local):
            self._jsonl = records.Jsonl(local / records.NAME, start_step)
            if is_resume and self._jsonl.missing:
                print(f"{self._jsonl.path}: no record of {records.spans(self._jsonl.missing)};"
                      " they are not made again", flush=True)  # fmt: skip
            self._sinks: list[Any] = []
            if cfg.log.wandb:
                self._sinks.append(_Wandb(cfg, local, start_step, self._jsonl.seen))
            if cfg.log.tensorboard:
                self._sinks.append(events.TensorBoard(local / "tensorboard", start_step))

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
            with records.writing(self._jsonl.path):
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
            with self.pause(0), records.writing(self._folder.local):
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
            with records.writing(self._folder.local):
                for sink in self._sinks:
                    sink.close()
                self._folder.push()
                self._folder.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        with records.writing(self._jsonl.path):
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


class _Wandb:
    """A W&B run that goes on when training is resumed.

    W&B drops steps below those that it has seen. A resumed run therefore first asks it to rewind
    to the checkpoint's step. Where the server cannot, nothing is dropped either: all that follows
    is a new segment, whose W&B steps continue after the seen ones; each row has the true `step`
    and the number of its `segment`.
    """

    def __init__(self, cfg: Config, folder: pathlib.Path, last_step: int, seen: int):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                "config.log.wandb: the package wandb is not installed; pip install wandb,"
                " or set it to False"
            ) from error
        self._path = folder / "wandb.json"
        self._state = {"id": uuid.uuid4().hex[:8], "offset": 0, "segment": 0, "last_row": -1}
        last_row, known = -1, self._path.exists() and self._read()  # last_row: that W&B has seen
        if known:
            last_row = max(seen + self._state["offset"], self._state["last_row"])
        self._save()
        expected = last_step + self._state["offset"]
        self._run = self._start(wandb, cfg, folder, expected, last_row > expected)
        self._next_row, self._began = last_row + 1, False  # lower ones would be dropped
        if isinstance(getattr(self._run, "step", None), int):  # W&B knows: lost, or rewound to
            self._next_row = max(self._run.step, expected + 1 if known else 0)
        self._waiting: dict[str, float] = {}
        shift = self._next_row - (expected + 1)
        if shift > 0:
            self._state["offset"] += shift
            self._state["segment"] += 1
            self._save()
            print(
                f"W&B cannot rewind run {self._state['id']} to step {last_step}: this is segment"
                f" {self._state['segment']} of it, with W&B's own step ours +"
                f" {self._state['offset']}; use `step` as the x axis"
            )

    def _read(self) -> bool:
        """Take on what the file says; one that is damaged is set aside."""
        try:
            found = parsing.json_object(self._path.read_bytes(), str(self._path))
            self._state = {k: type(v)(found.get(k, v)) for k, v in self._state.items()}
        except (ValueError, TypeError, AttributeError):
            aside = records.free(self._path.with_name("wandb-damaged.json"))
            os.replace(self._path, aside)
            print(f"{self._path} is damaged and kept as {aside.name}; W&B gets a new run",
                  flush=True)  # fmt: skip
            return False
        return True

    def _save(self) -> None:
        records.replace(self._path, [json.dumps(self._state).encode()])

    def _start(self, wandb: Any, cfg: Config, folder: pathlib.Path, row: int, rewind: bool) -> Any:
        common = {
            "project": cfg.log.wandb_project,
            "name": cfg.name,
            "dir": str(folder),
            "config": to_dict(cfg),
        }
        refused = getattr(wandb, "Error", RuntimeError), TypeError, ValueError
        if rewind:
            at = f"{self._state['id']}?_step={row}"
            with contextlib.suppress(*refused):  # then it is resumed as it is
                return wandb.init(resume_from=at, **common)
        try:
            return wandb.init(id=self._state["id"], resume="allow", **common)
        except refused as error:
            raise ValueError(f"config.log.wandb: W&B does not start: {error}") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        row = step + self._state["offset"]
        if row >= self._next_row:
            marks = {"step": step, "segment": self._state["segment"]}
            self._run.log({**self._waiting, **values, **marks}, step=row)
            self._next_row, self._began, self._waiting = row, True, {}
        elif self._began:  # a duration that comes late joins the newest row
            self._run.log(values, step=self._next_row)
        else:  # of the checkpoint's step, which W&B has closed: joins the next row
            self._waiting |= values

    def flush(self) -> None:
        pass  # W&B sends in the background

    def close(self) -> None:
        if self._waiting:
            self._run.log(self._waiting, step=self._next_row)
            self._state["last_row"] = self._next_row
            self._save()
        self._run.finish()
