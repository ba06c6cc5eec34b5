"""The training loop: config -> mesh, batches, state -> steps, records, evaluations, checkpoints.

Pretraining, mid-training and long-context training run this one loop.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax import files
from olmo_jax.checkpoints import checkpointer
from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.config.data import batch_stages
from olmo_jax.config.options import INT32, ConfigError
from olmo_jax.config.run import Config, validate
from olmo_jax.config.training import optimizer_problems
from olmo_jax.data.loader import Loader
from olmo_jax.data.order import Position
from olmo_jax.parallel import distributed, processes, sharding
from olmo_jax.parallel.processes import say
from olmo_jax.records import jsonl, writer
from olmo_jax.training import optim, profiler, program, schedules, start, step
from olmo_jax.training.state import TrainState, abstract_state, build_model

T = TypeVar("T")


def train(config: Config, make_evaluator: Callable[[Config, Mesh], Any], summary: Any) -> int:
    """Run a config to its end, from wherever it was left; returns the exit code.

    A run that falls back to an older checkpoint starts once more.

    Args:
      config: of the run.
      make_evaluator: of `eval.paths`; see `evals/perplexity.py`.
      summary: has `write` and `is_written`; see `evals/summary.py`.

    Raises:
      ConfigError, ValueError, OSError: with one line for the user; nothing is overwritten.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Before the devices too: who is being stopped may hold them.
        stack.enter_context(processes.only_writer(config.run_dir))
        # From the start: inside JAX's own callbacks Python drops a KeyboardInterrupt.
        preemption = stack.enter_context(processes.Preemption())
        while True:
            try:
                return _train(config, make_evaluator, summary, preemption, began)
            except FellBack as error:
                line = str(error)
            say(line)  # not in there: the error holds the old state


def _train(
    config: Config,
    make_evaluator: Callable[[Config, Mesh], Any],
    summary: Any,
    preemption: processes.Preemption,
    began: float,
) -> int:
    validate(config, jax.device_count())
    with contextlib.ExitStack() as stack:
        config = start.resolve(config)
        mesh = sharding.make_mesh(config.mesh)
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        kind = jax.devices()[0].device_kind
        say(f"devices: {jax.device_count()} {kind} ({shape or 'no axis used'})")
        start.check_attention(config, mesh)
        program.check_flags(config, mesh)
        config = start.with_loss_ranks(config, mesh)
        checkpointer = Checkpointer(config)
        stack.callback(_wait_for_save, checkpointer)
        source = start.source(config, checkpointer)
        first, position = start.starting_point(config, source)
        is_resume = source is not None and source.is_resume
        checkpointer.refuse_foreign(first if first or is_resume else -1)
        loader = Loader(
            config.data, config.model.vocab_size, lambda n: sharding.local_rows(mesh, n), position
        )
        start.compare_data(source, loader)
        plan = Plan(config, loader, first)
        evaluator = make_evaluator(config, mesh) if config.eval.paths else None
        say(optim.describe_groups(config.optim, abstract_state(config, mesh).params))
        is_done = first >= plan.last
        if is_done and not is_resume:
            end = f"config.train.duration={config.train.duration} ends at step {plan.last}"
            place = f"checkpoint.load_path with load_position=True starts after step {first}"
            raise ConfigError([f"{end}, but {place}"])
        if is_done:
            say(f"done already: step {first:,} of {plan.last:,}; a larger train.duration goes on,"
                " other changes have no effect")  # fmt: skip
            has_summary = config.train.summary and summary.is_written(config.run_dir)
            if has_summary:
                say(f"its summary: {files.path(config.run_dir) / 'summary.md'}")
            if has_summary == config.train.summary and start.is_complete(config, first):
                return 0
        loading = time.perf_counter()
        state = start.initial_state(config, mesh, source, first)
        loading = time.perf_counter() - loading

        trace = profiler.Profiler(config.profile.steps, first, plan.last)

        # From here on things are written.
        if source is None:
            say(f"new run in {config.run_dir}")
        if not is_resume:
            set_aside = processes.from_process_0(lambda: jsonl.set_aside(config.run_dir))
            if set_aside:
                say(f"no checkpoint in {config.run_dir}, but records: kept as {set_aside}")
        if not is_done:
            start.write_config(config)
        watchdog = stack.enter_context(distributed.Watchdog(config.train.step_timeout_s))
        log = writer.Writer(
            config,
            files.path(config.run_dir),
            start_step=first,
            start_tokens=loader.order.start.tokens,
            is_resume=is_resume,
            total_steps=plan.last,
            n_devices=jax.device_count(),
            device_kind=jax.devices()[0].device_kind,
            process_index=jax.process_index(),
        )
        stack.callback(log.close)
        if source is not None:
            log.write(first + 1, {"checkpoint/load_duration_s": loading})
        run = Run(
            config, mesh, log, checkpointer, evaluator, summary, loader, plan, preemption, watchdog,
            trace, start.kept(config, source),
        )  # fmt: skip
        if source is not None and source.is_resume:
            run.last_finite = source.meta().get("last_finite_step")
        try:
            if not is_done:
                say(f"training steps {first + 1:,} to {plan.last:,} on {loader.n_instances:,} rows")
                with trace:
                    state = run.steps(state, first)
            watchdog.beat("the end of the run")
            run.finish(state, time.perf_counter() - began)
        except Stopped as stopped:
            checkpointer.finish()
            log.close()  # which also clears the progress bar
            say(f"stopped: saved step {stopped.step}; the same command goes on from there")
            return processes.EXIT_PREEMPTED
    return 0


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal ended the run; the state after `step` is saved, or is being saved."""

    def __init__(self, step: int):
        self.step = step


class FellBack(Exception):  # noqa: N818 - likewise
    """No loss was finite since the start, and an older, confirmed checkpoint is now the newest."""


def _wait_for_save(checkpointer: Checkpointer) -> None:
    """After an error too a save under way is worth having; for several see `distributed.leave`."""
    if jax.process_count() == 1:
        with contextlib.suppress(OSError):
            checkpointer.finish()


def _device_memory() -> dict[str, float]:
    """Peak memory of this process's first device under OLMo-core's names; empty on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak, limit = stats.get("peak_bytes_in_use"), stats.get("bytes_limit")
    if not peak or not limit:
        return {}
    name = "gpu_memory/GPU active mem"
    return {f"{name} (GiB)": peak / 2**30, f"{name} (%)": 100 * peak / limit}


def _or_rescue(batches: Iterable[T], rescue: Callable[[], str]) -> Iterator[T]:
    """The batches; an error of reading them also says what `rescue` returns."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {rescue()}") from error


class Plan:
    """The numbers that follow from a step alone: where the run ends, and its learning rate."""

    def __init__(self, config: Config, loader: Loader, first: int):
        """Work out the end of the run.

        Raises:
          ConfigError: if the schedule does not fit the duration.
        """
        t, self._optim = config.train, config.optim
        last = loader.steps_for(t.duration, t.duration_unit, first)
        self.last = last
        if t.hard_stop is not None:
            self.last = min(last, loader.steps_for(t.hard_stop, t.hard_stop_unit, first))
        if last > INT32:
            end = f"config.train.duration={t.duration} {t.duration_unit} is {last} steps"
            raise ConfigError([f"{end}, more than {INT32}"])
        self._first_batch = batch_stages(config.data)[0][1]
        schedule = config.optim.schedule
        if schedule.t_max is not None:
            self._t_max = schedule.t_max
        elif schedule.unit == t.duration_unit:
            self._t_max = t.duration
        elif schedule.unit == "steps":
            self._t_max = last
        else:
            self._t_max = loader.order.position(last - first).tokens
        problems = optimizer_problems(config.optim, self._t_max)
        if problems:
            raise ConfigError(problems)
        self._skipped = t.skip_steps

    def rates(self, at: int, tokens: int, batch_tokens: int) -> tuple[float, float]:
        """Learning rate and clipping norm of step `at`, whose batch ends at `tokens` seen."""
        t = at if self._optim.schedule.unit == "steps" else tokens
        # OLMo-core's batch-size schedule scales the peak; where a schedule ends stays as it is.
        peak = self._optim.lr * schedules.batch_lr_scale(self._first_batch, batch_tokens)
        scaled = dataclasses.replace(self._optim, lr=peak)
        return schedules.learning_rate(scaled, t, self._t_max), schedules.clip_norm(scaled, t)

    def is_skipped(self, at: int) -> bool:
        """Whether the batch of step `at` is passed over (`train.skip_steps`)."""
        return any(start <= at < stop for start, stop in self._skipped)


# --- the run --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What the loop works with; made once, by `train`."""

    config: Config
    mesh: Mesh
    log: writer.Writer
    checkpointer: Checkpointer
    evaluator: Any
    summary: Any
    loader: Loader
    plan: Plan
    preemption: processes.Preemption
    watchdog: distributed.Watchdog
    trace: profiler.Profiler
    kept: start.Kept
    nonfinite: int = 0  # steps in a row
    last_finite: int | None = None  # the last step with a finite loss, of an earlier start too

    def steps(self, state: TrainState, first: int) -> TrainState:
        """Train from step `first` + 1 on; returns the state at the end.

        Raises:
          Stopped: after a signal.
          ValueError: if batches cannot be read any more; what was trained is saved.
        """
        c, at = self.config, first
        update = program.Program(c, self.mesh, self.log)
        norms = step.make_norms(c, self.mesh) if c.log.norms_interval else None
        slowest = sharding.make_max(self.mesh)
        if first == 0 and (kind := self.checkpointer.due(0)):
            self.save(state, 0, self.loader.order.start, kind)
        if self.due_eval(first) and start.lacks_eval(c, first):
            self.evaluate_between(state, first, self.loader.order.start)
        self.loader.n_steps = self.plan.last - first
        position = self.loader.order.start
        seen = position.tokens
        pending: Any = None  # the step before, whose metrics the host has not read
        self.watchdog.beat(f"the data of step {at + 1}")

        def rescue() -> str:
            self.record(pending)
            return self.rescue(state, at, position) if at > first else self.saved()

        for batch, position in _or_rescue(self.loader, rescue):
            at += 1
            self.watchdog.beat(f"step {at}")
            if self.trace.begins_at(at):
                self.record(pending)
                pending = None
                with self.log.pause(at):
                    self.trace.start(self.log.folder("profile"), state)
            with profiler.step(at):
                batch_tokens, seen = position.tokens - seen, position.tokens
                arrays = sharding.to_global(batch, self.mesh, batch_tokens // c.data.seq_len)
                if norms is not None and at % c.log.norms_interval == 0:  # type: ignore[operator]
                    with self.log.pause(at):
                        self.log.write(at, jax.device_get(norms(state.params, arrays)))
                lr, clip = self.plan.rates(at, seen, batch_tokens)
                if self.plan.is_skipped(at):
                    state = dataclasses.replace(state, step=state.step + jnp.int32(1))
                    device_metrics = {}
                else:
                    state, device_metrics = update(
                        at, state, arrays, np.float32(lr), np.float32(clip)
                    )
                self.record(pending)
                wait = slowest(self.loader.wait_s)
                pending = at, device_metrics, lr, seen, batch_tokens, wait

            kind, stop = self.checkpointer.due(at), self.preemption.requested()
            due_eval = self.due_eval(at)
            if kind or stop or due_eval or at == self.plan.last or self.trace.ends_at(at):
                self.record(pending)
                pending = None
            if self.trace.ends_at(at):
                with self.log.pause(at):
                    self.trace.stop(state)
            is_last = at == self.plan.last
            if kind or stop or is_last:
                self.keep(state, at, position, kind, stop)
            if due_eval and not (is_last and (c.eval.at_finish or c.train.summary)):
                self.evaluate_between(state, at, position)
            self.watchdog.beat(f"the data of step {at + 1}")
        return state

    def keep(
        self, state: TrainState, at: int, position: Position, kind: str | None, stop: bool
    ) -> None:
        """Save the state after a step that is the last, after a signal, or because it is due.

        Raises:
          Stopped: after a signal.
          ValueError, FellBack: if the run ends and the loss is not finite.
        """
        if at == self.plan.last:
            if self.nonfinite:
                self.give_up(f"step {at}: the run ends here; its loss is {self._without()}")
            self.save(state, at, position, "fixed" if kind == "fixed" else "permanent")
            return
        if not self.nonfinite:
            self.save(state, at, position, kind or "ephemeral")
        elif stop:
            say(f"step {at}: the loss is not finite, so its checkpoint takes no other's place")
            self.save(state, at, position, "ephemeral")
        elif kind and self.checkpointer.postpone(kind):
            say(f"step {at}: its checkpoint is postponed to the next step with a finite loss")
        if stop:
            raise Stopped(at)

    def record(self, pending: Any) -> None:
        """Read a finished step's metrics and write them down.

        Raises:
          ValueError, FellBack: after `train.max_nonfinite_steps` steps in a row without a finite
            loss, or after a step whose tokens did not find room on their experts' devices.
        """
        if pending is None:
            return
        at, device_metrics, lr, tokens, batch_tokens, wait = pending
        values = jax.device_get(device_metrics)
        load = values.pop("train/expert load", None)  # [n_layers, n_experts]
        values = {name: float(v) for name, v in values.items()}
        if values.get("train/masked labels (%)") == 1.0:  # no token, so no loss either: not 0
            values.pop("train/CE loss")
        if at % self.config.log.interval == 0:
            values |= _device_memory()
            if load is not None:
                self.log.table(at, "train/expert load", load)
        self.log.step(
            at, values, lr=lr, tokens=tokens, batch_tokens=batch_tokens, data_wait_s=float(wait)
        )
        self.judge(at, values.get("train/CE loss"), values.get("optim/total grad norm", 0.0))
        needed, limit = values.get("train/expert buffer", 0.0), self.config.compute.expert_buffer
        if limit is not None and needed > np.float32(limit):
            raise ValueError(
                f"step {at}: the experts of one device are to take {needed:.3f} times the balanced"
                f" load; config.compute.expert_buffer={limit} needs to be"
                f" {math.ceil(100 * needed) / 100} or more. The step did not change the parameters;"
                f" {self.saved()}"
            )

    def judge(self, at: int, loss: float | None, norm: float) -> None:
        """Count a step's loss as finite or not; None, if it had no tokens, is neither.

        Raises:
          ValueError, FellBack: after `train.max_nonfinite_steps` in a row.
        """
        if loss is None:
            return
        if math.isfinite(loss + norm):
            self.nonfinite = 0
            self.last_finite = self.checkpointer.finite_step = at
            return
        self.nonfinite += 1
        if self.nonfinite >= self.config.train.max_nonfinite_steps:
            self.give_up(f"step {at}: loss {loss}, grad norm {norm}; {self._without()}"
                         " (config.train.max_nonfinite_steps)")  # fmt: skip

    def _without(self) -> str:
        return f"not finite for {self.nonfinite} step{'s' * (self.nonfinite > 1)} in a row"

    def give_up(self, why: str) -> NoReturn:
        """End the run, or this try to go on from a checkpoint that was never confirmed.

        Raises:
          FellBack: if no step since the start had a finite loss, and a confirmed one is older.
          ValueError: otherwise.
        """
        started = self.checkpointer.latest()
        if self.checkpointer.finite_step is None and (aside := self.checkpointer.fall_back()):
            raise FellBack(
                f"{why}, and never since the start from step {started}: falling back to step"
                f" {self.checkpointer.latest()}, the newest that a finite loss has confirmed;"
                f" {', '.join(aside)} in {self.checkpointer.folder} is what was set aside"
            )
        known = "no step had a finite loss"
        if self.last_finite is not None:
            known = f"the last finite loss is that of step {self.last_finite}"
        saved = self.saved()
        if (confirmed := self.checkpointer.confirmed()) not in (None, self.checkpointer.latest()):
            saved += f", and step {confirmed}, the newest that a finite loss has confirmed"
        raise ValueError(f"{why}; {known}. None of them changed the parameters; {saved}")

    def saved(self) -> str:
        """Which step the next run starts from, in words for an error."""
        with contextlib.suppress(OSError):
            self.checkpointer.finish()
        newest = self.checkpointer.latest()
        return f"{'no checkpoint' if newest is None else f'step {newest}'} is saved"

    def save(self, state: TrainState, at: int, position: Position, kind: str) -> None:
        """Save the state after step `at`."""
        self.watchdog.beat(f"the checkpoint of step {at}")
        try:
            self.settle(at)
        except OSError:
            with contextlib.suppress(OSError):  # the disk may be well again: lose no step then
                self._save(state, at, position, kind)
                self.checkpointer.finish()
            raise
        self._save(state, at, position, kind)

    def _save(self, state: TrainState, at: int, position: Position, kind: str) -> None:
        self.log.sync()
        meta = checkpointer.meta(
            self.config, dataclasses.asdict(position), at, self.loader.fingerprint
        )
        meta |= self.kept.meta | {"step": at, "last_finite_step": self.last_finite}
        with self.log.pause(at, "checkpoint/save_duration_s"):
            self.checkpointer.save(at, state, meta, kind, self.kept.carried)

    def rescue(self, state: TrainState, at: int, position: Position) -> str:
        """Save what was trained before an error of this process; says which step is saved.

        Several processes cannot meet for it: the others wait in a step that will not end.
        """
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):  # the first error is what has to be said
                self.save(state, at, position, "ephemeral")
        return self.saved()

    def settle(self, at: int) -> None:
        """Wait for the save under way, and write down at step `at` how long it took."""
        seconds = self.checkpointer.finish()
        if seconds is not None and self.config.checkpoint.async_save:
            self.log.write(at, {"checkpoint/save_async_duration_s": seconds})

    def evaluate_between(self, state: TrainState, at: int, position: Position) -> None:
        """Evaluate before training goes on; a signal leaves it for the run that follows.

        Raises:
          Stopped: after a signal.
          ValueError: if a file cannot be read any more.
        """
        try:
            self.evaluate(state, at, self.config.eval.max_rows)
        except Stopped:
            self.save(state, at, position, "ephemeral")
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; {self.rescue(state, at, position)}") from error

    def evaluate(self, state: TrainState, at: int, max_rows: int | None) -> dict[str, float]:
        """Score the held-out files and write the result down.

        Raises:
          Stopped: after a signal; nothing is written down.
        """
        if self.evaluator is None:
            return {}

        n_batches = 0

        def on_batch() -> None:
            nonlocal n_batches
            n_batches += 1
            self.watchdog.beat(f"the evaluation after step {at}")
            if self.preemption.requested():
                raise Stopped(at)

        with self.log.pause(at, "throughput/in-loop eval time (s)"):
            scores = self.evaluator.metrics(state.params, max_rows, on_batch)
        self.log.write(at, scores | {"throughput/in-loop eval batches": n_batches})
        self.log.sync()  # it follows the step's checkpoint, so it is not made again
        return scores

    def due_eval(self, at: int) -> bool:
        """Whether the held-out files are to be scored after a step, 0 being the start."""
        e = self.config.eval
        return e.at_start if at == 0 else e.interval is not None and at % e.interval == 0

    def finish(self, state: TrainState, seconds: float) -> None:
        """Wait for the last checkpoint, evaluate, and say what came out."""
        c, last = self.config, int(state.step)
        self.settle(last)
        say(f"checkpoint: {self.checkpointer.folder_of(last)}")
        if self.trace.line:
            say(self.trace.line)
        scores = self.evaluate(state, last, None) if c.eval.at_finish or c.train.summary else {}
        self.log.sync()
        if c.train.summary:
            saved = self.checkpointer.folder_of(last)
            if jax.process_index() == 0:
                self.summary.write(c, build_model(c), state.params, scores, seconds, saved)
