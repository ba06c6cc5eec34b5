"""The training loop: the parts of a run -> steps, records, evaluations, checkpoints.

Pretraining, mid-training and long-context training run this one loop; `start` brings its parts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax.config import costs
from olmo_jax.config.costs import GIB
from olmo_jax.config.training import EvalConfig, LogConfig, OptimConfig, TrainConfig
from olmo_jax.data.loader import Loader
from olmo_jax.data.source import Position
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import processes, sharding
from olmo_jax.parallel.processes import say
from olmo_jax.parallel.watchdog import Watchdog
from olmo_jax.records import writer
from olmo_jax.training import profiler, program, step
from olmo_jax.training.keeping import Keeper, Stopped
from olmo_jax.training.losses import Objective
from olmo_jax.training.pacing import Pacing
from olmo_jax.training.state import TrainState

T = TypeVar("T")


class Budget(NamedTuple):
    """How far an evaluation goes."""

    max_rows: int | None  # of each text; None: all
    on_batch: Callable[[], None]  # is called before each batch, and may end it by raising


Evaluator = Callable[[Any, Budget], dict[str, float]]  # params -> metrics, "eval/…" by name


def _device_memory() -> dict[str, float]:
    """Peak memory of this process's first device under OLMo-core's names; empty on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak, limit = stats.get("peak_bytes_in_use"), stats.get("bytes_limit")
    if not peak or not limit:
        return {}
    name = "gpu_memory/GPU active mem"
    return {f"{name} (GiB)": peak / GIB, f"{name} (%)": 100 * peak / limit}


def _or_rescue(batches: Iterable[T], rescue: Callable[[], str]) -> Iterator[T]:
    """The batches; an error of reading them also says what `rescue` returns."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {rescue()}") from error


def due_eval(options: EvalConfig, at: int) -> bool:
    """Whether an evaluation is due after a step, 0 being the start."""
    if at == 0:
        return options.at_start
    return options.interval is not None and at % options.interval == 0


# --- the run --------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A step that the devices have been given, and of which the host has read nothing yet."""

    at: int
    report: step.Report | None  # None: its batch was passed over
    lr: float
    tokens: int  # seen by the run at its end
    batch_tokens: int
    wait_s: Any  # for the data, of the slowest process


@dataclasses.dataclass
class Run:
    """What the loop works with; `start` makes it."""

    model: Transformer
    objective: Objective
    train: TrainConfig
    optim: OptimConfig
    eval: EvalConfig
    options: LogConfig
    xla_flags: tuple[str, ...]
    mesh: Mesh
    log: writer.Writer
    keeper: Keeper
    evaluators: Sequence[Evaluator]
    loader: Loader
    began: Position  # in the data, before the first step
    pacing: Pacing
    preemption: processes.Preemption
    watchdog: Watchdog
    trace: profiler.Profiler
    scores_start: bool  # before the first step, where a run was stopped between the two
    scores_end: bool  # after the last step all evaluators run, on all of their texts

    def steps(self, state: TrainState, first: int) -> TrainState:
        """Train from step `first` + 1 on; returns the state at the end.

        Raises:
          Stopped: after a signal.
          ValueError: if batches cannot be read any more; what was trained is saved.
        """
        at, model, every = first, self.model, self.options.norms_interval
        update = program.CompiledUpdate(
            step.make_update(self.objective, model, self.train, self.optim, self.mesh),
            self.log,
            self.xla_flags,
            lambda seq_len: costs.flops_per_token(model.config, seq_len) * seq_len,
        )
        norms = None
        if every:
            norms = step.make_norms(self.objective, model, self.train, self.mesh)
        slowest = sharding.make_max(self.mesh)
        if first == 0 and (kind := self.keeper.checkpointer.due(0)):
            self.keeper.save(state, 0, self.began, kind)
        if self.scores_start:
            self.evaluate_between(state, first, self.began)
        position = self.began
        seen = position.tokens
        pending: Done | None = None  # the step before, whose metrics the host has not read
        self.watchdog.beat(f"the data of step {at + 1}")

        def rescue() -> str:
            self.record(pending)
            return self.keeper.rescue(state, at, position) if at > first else self.keeper.saved()

        for read in _or_rescue(self.loader.steps(first, self.pacing.last), rescue):
            at, position = at + 1, read.position
            self.watchdog.beat(f"step {at}")
            if self.trace.begins_at(at):
                self.record(pending)
                pending = None
                with self.log.pause(at):
                    self.trace.start(self.log.folder("profile"), state)
            with profiler.step(at):
                batch_tokens, seen = position.tokens - seen, position.tokens
                arrays = sharding.to_global(read.batch, self.mesh, read.n_rows)
                if norms is not None and every and at % every == 0:
                    with self.log.pause(at):
                        self.log.write(at, jax.device_get(norms(state.params, arrays)))
                lr, clip = self.pacing.rates(at, seen, batch_tokens)
                if self.pacing.is_skipped(at):
                    state = dataclasses.replace(state, step=state.step + jnp.int32(1))
                    report = None
                else:
                    state, report = update(at, state, arrays, np.float32(lr), np.float32(clip))
                # The step before is read while the devices work on this one: they never wait.
                self.record(pending)
                wait = slowest(read.waited_s)
                pending = Done(at, report, lr, seen, batch_tokens, wait)

            kind, stop = self.keeper.checkpointer.due(at), self.preemption.requested()
            due_eval = self.due_eval(at)
            # What follows needs this step's loss: a checkpoint of one that is not finite is none.
            if kind or stop or due_eval or at == self.pacing.last or self.trace.ends_at(at):
                self.record(pending)
                pending = None
            if self.trace.ends_at(at):
                with self.log.pause(at):
                    self.trace.stop(state)
            is_last = at == self.pacing.last
            if kind or stop or is_last:
                self.keeper.keep(state, at, position, kind, is_last, stop)
            if due_eval and not (is_last and self.scores_end):
                self.evaluate_between(state, at, position)
            self.watchdog.beat(f"the data of step {at + 1}")
        return state

    def record(self, pending: Done | None) -> None:
        """Read a finished step's metrics and write them down.

        Raises:
          ValueError, FellBack: after `train.max_nonfinite_steps` steps in a row without a finite
            loss, or after a step whose tokens did not find room on their experts' devices.
        """
        if pending is None:
            return
        at, report = pending.at, jax.device_get(pending.report)
        values = {} if report is None else {k: float(v) for k, v in report.metrics().items()}
        if report is not None and not report.has_loss:  # no token, so no loss either: not 0
            values.pop("train/CE loss")
        if at % self.options.interval == 0:
            values |= _device_memory()
            for name, table in ({} if report is None else report.tables).items():
                self.log.table(at, name, table)
        self.log.step(
            at,
            values,
            lr=pending.lr,
            tokens=pending.tokens,
            batch_tokens=pending.batch_tokens,
            data_wait_s=float(pending.wait_s),
        )
        if report is None:
            return
        loss, norm = float(report.loss), float(report.grad_norm)
        self.keeper.judge(at, loss if report.has_loss else None, norm)
        limit = self.model.compute.expert_buffer
        if limit is not None and report.room is not None and report.room > np.float32(limit):
            raise ValueError(
                f"step {at}: the experts of one device are to take {report.room:.3f} times the"
                f" balanced load; config.compute.expert_buffer={limit} needs to be"
                f" {math.ceil(100 * report.room) / 100} or more. The step did not change the"
                f" parameters; {self.keeper.saved()}"
            )

    def evaluate_between(self, state: TrainState, at: int, position: Position) -> None:
        """Evaluate before training goes on; a signal leaves it for the run that follows.

        Raises:
          Stopped: after a signal.
          ValueError: if a file cannot be read any more.
        """
        try:
            self.evaluate(state, at, self.eval.max_rows)
        except Stopped:
            self.keeper.save(state, at, position, "ephemeral")
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; {self.keeper.rescue(state, at, position)}") from error

    def evaluate(self, state: TrainState, at: int, max_rows: int | None) -> dict[str, float]:
        """Let all evaluators score the parameters, and write the result down.

        Raises:
          Stopped: after a signal; nothing is written down.
        """
        if not self.evaluators:
            return {}
        n_batches = 0

        def on_batch() -> None:
            nonlocal n_batches
            n_batches += 1
            self.watchdog.beat(f"the evaluation after step {at}")
            if self.preemption.requested():
                raise Stopped(at)

        scores: dict[str, float] = {}
        with self.log.pause(at, "throughput/in-loop eval time (s)"):
            for evaluator in self.evaluators:
                scores |= evaluator(state.params, Budget(max_rows, on_batch))
        self.log.write(at, scores | {"throughput/in-loop eval batches": n_batches})
        self.log.sync()  # it follows the step's checkpoint, so it is not made again
        return scores

    def due_eval(self, at: int) -> bool:
        """Whether the evaluators are to score the parameters after a step."""
        return due_eval(self.eval, at)

    def finish(self, state: TrainState) -> tuple[dict[str, float], Any]:
        """Wait for the last checkpoint and evaluate; returns the scores, and its folder."""
        last = int(state.step)
        self.keeper.settle(last)
        saved = self.keeper.checkpointer.folder_of(last)
        say(f"checkpoint: {saved}")
        if self.trace.line:
            say(self.trace.line)
        scores = self.evaluate(state, last, None) if self.scores_end else {}
        self.log.sync()
        return scores, saved
