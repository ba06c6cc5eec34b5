"""The training loop: parts of a run -> steps, records, evaluations, checkpoints.

Pretraining, mid-training and long-context training run this one loop.
"""

import contextlib
import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax import cli, files
from olmo_jax.checkpoints import checkpointer
from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.config import costs
from olmo_jax.config.costs import GIB
from olmo_jax.config.data import batch_stages
from olmo_jax.config.options import ConfigError
from olmo_jax.config.parameters import table
from olmo_jax.config.run import Config
from olmo_jax.data.loader import Loader
from olmo_jax.data.open import open_source
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import Position, Source
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import distributed, processes, sharding
from olmo_jax.parallel.processes import say
from olmo_jax.records import jsonl, writer
from olmo_jax.training import losses, optim, profiler, program, start, step
from olmo_jax.training.keeping import FellBack, Keeper, Stopped
from olmo_jax.training.origin import find_origin
from olmo_jax.training.pacing import Pacing
from olmo_jax.training.state import TrainState, abstract_state

T = TypeVar("T")


class Budget(NamedTuple):
    """How far an evaluation goes."""

    max_rows: int | None  # of each text; None: all
    on_batch: Callable[[], None]  # is called before each batch, and may end it by raising


Evaluator = Callable[[Any, Budget], dict[str, float]]  # params -> metrics, "eval/…" by name


class Outcome(NamedTuple):
    """How a run ended."""

    code: int  # for the command's exit
    state: TrainState | None = None  # after the last step; None: there was nothing to do, or a stop
    scores: Mapping[str, float] = types.MappingProxyType({})  # of all evaluators, at the end
    saved: Any = None  # the folder of the last checkpoint
    model: Transformer | None = None  # as it was computed


def train(
    config: Config,
    preemption: processes.Preemption,
    make_evaluators: Callable[[Config, Mesh], Sequence[Evaluator]],
    needs_end: bool = False,
) -> Outcome:
    """Run a config to its end, from wherever it was left.

    A run that falls back to an older checkpoint starts once more.

    Args:
      config: of the run, validated.
      preemption: hears signals, which end the run after a save.
      make_evaluators: what scores the model between steps and at the end.
      needs_end: the last state and all its scores are needed, though they may be on disk already.

    Raises:
      ConfigError, ValueError, OSError: with one line for the user; nothing is overwritten.
    """
    while True:
        try:
            return _train(config, preemption, make_evaluators, needs_end)
        except FellBack as error:
            line = str(error)
        say(line)  # not in there: the error holds the old state


def _train(
    config: Config,
    preemption: processes.Preemption,
    make_evaluators: Callable[[Config, Mesh], Sequence[Evaluator]],
    needs_end: bool,
) -> Outcome:
    with contextlib.ExitStack() as stack:
        config = start.resolve(config)
        mesh = sharding.make_mesh(config.mesh)
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        kind = jax.devices()[0].device_kind
        say(f"devices: {jax.device_count()} {kind} ({shape or 'no axis used'})")
        start.check_attention(config, mesh)
        program.check_flags(config.compute.xla_flags, mesh)
        config = start.with_loss_ranks(config, mesh)
        checkpointer = Checkpointer(config)
        stack.callback(_wait_for_save, checkpointer)
        origin = find_origin(config.checkpoint, config.model, checkpointer)
        first = start.first_step(config, origin)
        is_resume = origin is not None and origin.is_resume
        checkpointer.refuse_foreign(first if first or is_resume else -1)
        data = open_source(config.data, config.model.vocab_size)
        position = start.position(origin, data)
        schedule = BatchSchedule(data, batch_stages(config.data), position, first)
        pacing = Pacing(config.train, config.optim, config.data, schedule)
        loader = Loader(
            schedule,
            lambda n: sharding.local_rows(mesh, n),
            config.data.n_threads,
            config.data.prefetch,
        )
        evaluators = make_evaluators(config, mesh)
        rows = table(config.model)
        say(
            optim.describe_groups(
                config.optim, abstract_state(config.model, config.optim, mesh).params, rows
            )
        )
        is_done = first >= pacing.last
        if is_done and not is_resume:
            end = f"config.train.duration={config.train.duration} ends at step {pacing.last}"
            place = f"checkpoint.load_path with load_position=True starts after step {first}"
            raise ConfigError([f"{end}, but {place}"])
        if is_done:
            say(f"done already: step {first:,} of {pacing.last:,}; a larger train.duration goes on,"
                " other changes have no effect")  # fmt: skip
            if not needs_end and start.is_complete(config, first):
                return Outcome(0)
        loading = time.perf_counter()
        state = start.initial_state(config, mesh, origin, first)
        loading = time.perf_counter() - loading

        trace = profiler.Profiler(config.profile.steps, first, pacing.last)

        # From here on things are written.
        if origin is None:
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
            start_tokens=schedule.start.tokens,
            is_resume=is_resume,
            total_steps=pacing.last,
            n_devices=jax.device_count(),
            device_kind=jax.devices()[0].device_kind,
            process_index=jax.process_index(),
        )
        stack.callback(log.close)
        if origin is not None:
            log.write(first + 1, {"checkpoint/load_duration_s": loading})
        kept = start.kept(config, origin)
        keeper = Keeper(
            checkpointer, log, watchdog,
            lambda position, at: kept.meta | checkpoint_meta(config, data, position, at),
            kept.carried, config.train.max_nonfinite_steps, config.checkpoint.async_save,
        )  # fmt: skip
        if origin is not None and is_resume:
            keeper.last_finite = origin.meta.get("last_finite_step")
        run = Run(
            config, mesh, log, keeper, evaluators, loader, schedule.start, pacing, preemption,
            watchdog, trace, config.eval.at_finish or needs_end,
        )  # fmt: skip
        try:
            if not is_done:
                n_rows = f"{data.n_rows:,} rows"
                say(f"training steps {first + 1:,} to {pacing.last:,} on {n_rows}")
                with trace:
                    state = run.steps(state, first)
            watchdog.beat("the end of the run")
            model = Transformer(config.model, config.compute)
            return Outcome(0, state, *run.finish(state), model)
        except Stopped as stopped:
            checkpointer.finish()
            log.close()  # which also clears the progress bar
            say(f"stopped: saved step {stopped.step}; the same command goes on from there")
            return Outcome(cli.PREEMPTED)


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
    return {f"{name} (GiB)": peak / GIB, f"{name} (%)": 100 * peak / limit}


def _or_rescue(batches: Iterable[T], rescue: Callable[[], str]) -> Iterator[T]:
    """The batches; an error of reading them also says what `rescue` returns."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {rescue()}") from error


def checkpoint_meta(config: Config, data: Source, position: Position, at: int) -> dict[str, Any]:
    """What a checkpoint of this run says beside its arrays, after step `at`."""
    return checkpointer.meta(config, dataclasses.asdict(position), at, data.fingerprint)


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
    """What the loop works with; made once, by `train`."""

    config: Config
    mesh: Mesh
    log: writer.Writer
    keeper: Keeper
    evaluators: Sequence[Evaluator]
    loader: Loader
    began: Position  # in the data, before the first step
    pacing: Pacing
    preemption: processes.Preemption
    watchdog: distributed.Watchdog
    trace: profiler.Profiler
    scores_end: bool  # after the last step all evaluators run, on all of their texts

    def steps(self, state: TrainState, first: int) -> TrainState:
        """Train from step `first` + 1 on; returns the state at the end.

        Raises:
          Stopped: after a signal.
          ValueError: if batches cannot be read any more; what was trained is saved.
        """
        c, at = self.config, first
        model = Transformer(c.model, c.compute)
        objective = losses.next_token(c.model, c.compute, c.train)
        update = program.CompiledUpdate(
            step.make_update(objective, model, c.train, c.optim, self.mesh),
            self.log,
            c.compute.xla_flags,
            lambda seq_len: costs.flops_per_token(c.model, seq_len) * seq_len,
        )
        norms = None
        if c.log.norms_interval:
            norms = step.make_norms(objective, model, c.train, self.mesh)
        slowest = sharding.make_max(self.mesh)
        if first == 0 and (kind := self.keeper.checkpointer.due(0)):
            self.keeper.save(state, 0, self.began, kind)
        if self.due_eval(first) and start.lacks_eval(c, first):
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
                if norms is not None and at % c.log.norms_interval == 0:  # type: ignore[operator]
                    with self.log.pause(at):
                        self.log.write(at, jax.device_get(norms(state.params, arrays)))
                lr, clip = self.pacing.rates(at, seen, batch_tokens)
                if self.pacing.is_skipped(at):
                    state = dataclasses.replace(state, step=state.step + jnp.int32(1))
                    report = None
                else:
                    state, report = update(at, state, arrays, np.float32(lr), np.float32(clip))
                self.record(pending)
                wait = slowest(read.waited_s)
                pending = Done(at, report, lr, seen, batch_tokens, wait)

            kind, stop = self.keeper.checkpointer.due(at), self.preemption.requested()
            due_eval = self.due_eval(at)
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
        if at % self.config.log.interval == 0:
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
        limit = self.config.compute.expert_buffer
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
            self.evaluate(state, at, self.config.eval.max_rows)
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
        """Whether the held-out files are to be scored after a step, 0 being the start."""
        e = self.config.eval
        return e.at_start if at == 0 else e.interval is not None and at % e.interval == 0

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
