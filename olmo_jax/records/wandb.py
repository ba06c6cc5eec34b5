"""Weights & Biases: the metrics of a run on a server."""

import contextlib
import importlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from olmo_jax import files
from olmo_jax.records import jsonl


class Wandb:
    """A W&B run that goes on when training is resumed.

    W&B drops steps below those that it has seen. A resumed run therefore first asks it to rewind
    to the checkpoint's step. Where the server cannot, nothing is dropped either: all that follows
    is a new segment, whose W&B steps continue after the seen ones; each row has the true `step`
    and the number of its `segment`.
    """

    def __init__(self, run: Mapping[str, Any], folder: pathlib.Path, last_step: int, seen: int):
        """Begin the run there, or go on with it.

        Args:
          run: its `project`, `name` and `config`.
          folder: of what W&B writes here.
          last_step: finished steps.
          seen: the last step of which something was recorded before.
        """
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
        self._run = self._start(wandb, run, folder, expected, last_row > expected)
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
            found = files.json_object(self._path.read_bytes(), str(self._path))
            self._state = {k: type(v)(found.get(k, v)) for k, v in self._state.items()}
        except (ValueError, TypeError, AttributeError):
            aside = jsonl.free(self._path.with_name("wandb-damaged.json"))
            os.replace(self._path, aside)
            print(f"{self._path} is damaged and kept as {aside.name}; W&B gets a new run",
                  flush=True)  # fmt: skip
            return False
        return True

    def _save(self) -> None:
        with files.whole(self._path) as file:
            file.write(json.dumps(self._state).encode())

    def _start(
        self, wandb: Any, run: Mapping[str, Any], folder: pathlib.Path, row: int, rewind: bool
    ) -> Any:
        common = {**run, "dir": str(folder)}
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
        """Send the metrics of a step, or more of them."""
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
        """Nothing: W&B sends in the background."""

    def close(self) -> None:
        """Send what waits and end the run."""
        if self._waiting:
            self._run.log(self._waiting, step=self._next_row)
            self._state["last_row"] = self._next_row
            self._save()
        self._run.finish()
