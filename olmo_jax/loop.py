"""The training loop: config -> mesh, batches, state -> steps, records, evaluations, checkpoints.

Pretraining, mid-training and long-context training run this one loop.
"""

import contextlib
import dataclasses
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax import (
    checkpoint,
    distributed,
    metrics,
    optim,
    processes,
    schedules,
    sharding,
    step,
    storage,
    summary,
)
from olmo_jax.checkpoint import Checkpointer, Source
from olmo_jax.config import Config, ConfigError, to_dict
from olmo_jax.data import corpus
from olmo_jax.data.loader import Loader
from olmo_jax.data.order import Position
from olmo_jax.evals.perplexity import Evaluator
from olmo_jax.step import TrainState
from olmo_jax.validate import batch_stages, validate


def train(config: Config) -> int:
    """Run a config to its end, from wherever it was left; returns the exit code.

    Raises:
      ConfigError, ValueError, OSError: with one line for the user; nothing is overwritten.
    """
    began = time.perf_counter()
    validate(config, jax.device_count())
    with contextlib.ExitStack() as stack:
        # From the start: inside JAX's own callbacks Python drops a KeyboardInterrupt.
        preemption = stack.enter_context(processes.Preemption())
        config = resolve(config)
        mesh = sharding.make_mesh(config.mesh)
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        kind = jax.devices()[0].device_kind
        say(f"devices: {jax.device_count()} {kind} ({shape or 'no axis used'})")

        checkpointer = Checkpointer(config)
        stack.callback(_wait_for_save, checkpointer)
        source = checkpoint.source(config, checkpointer)
        first, position = _starting_point(config, source)
        loader = Loader(
            config.data, config.model.vocab_size, lambda n: sharding.local_rows(mesh, n), position
        )
        _compare_data(source, loader)
        plan = Plan(config, loader, first)
        evaluator = Evaluator(config, mesh) if config.eval.paths else None
        say(optim.describe_groups(config.optim, step.abstract_state(config, mesh).params))
        is_done = first >= plan.last
        if is_done:
            say(f"done already: step {first:,} of {plan.last:,}; a larger train.duration goes on")
            if not config.train.summary or summary.is_written(config.run_dir):
                return 0
        state = _initial_state(config, mesh, source, first)

        # From here on things are written.
        if not is_done:
            _write_config(config)
        watchdog = stack.enter_context(distributed.Watchdog(config.train.step_timeout_s))
        log = metrics.Writer(
            config,
            storage.path(config.run_dir),
            start_step=first,
            start_tokens=loader.order.start.tokens,
            total_steps=plan.last,
            n_devices=jax.device_count(),
            device_kind=jax.devices()[0].device_kind,
            process_index=jax.process_index(),
        )
        stack.callback(log.close)
        if evaluator is not None:  # it may take longer than a step
            evaluator.on_batch = lambda: watchdog.beat("an evaluation")
        run = Run(config, mesh, log, checkpointer, evaluator, loader, plan)
        if not is_done:
            say(f"training steps {first + 1:,} to {plan.last:,} on {loader.n_instances:,} rows")
            state, stopped = run.steps(state, first, preemption, watchdog)
            if stopped:
                log.close()  # which also clears the progress bar
                say(f"stopped: saved step {stopped}; the same command goes on from there")
                return processes.EXIT_PREEMPTED
        watchdog.beat("the end of the run")
        run.finish(state, time.perf_counter() - began)
    return 0


def _wait_for_save(checkpointer: Checkpointer) -> None:
    """After an error too a save under way is worth having; for several see `distributed.leave`."""
    if jax.process_count() == 1:
        with contextlib.suppress(OSError):
            checkpointer.finish()


def resolve(config: Config) -> Config:
    """The config with what depends on this machine filled in: the corpus, and fp32 on a CPU."""
    if config.compute.compilation_cache is not None:
        _keep_compiled(config.compute.compilation_cache)
    if jax.default_backend() == "cpu" and config.compute.dtype != "float32":
        say("compute.dtype: float32 on a CPU, where bfloat16 is far slower")
        config = _replace(config, "compute", dtype="float32")
    data = config.data
    if data.tokenizer is not None and not storage.path(data.tokenizer).exists():
        raise FileNotFoundError(f"config.data.tokenizer: no such file: {data.tokenizer}")
    if data.corpus is None:
        return config
    made = corpus.prepare(data.corpus_dir, data.corpus_vocab_size, data.dtype, log=say)
    if made.vocab_size > config.model.vocab_size:
        found = f"config.data.corpus_vocab_size={made.vocab_size}"
        raise ConfigError([f"{found} is above model.vocab_size={config.model.vocab_size}"])
    config = _replace(
        config,
        "data",
        paths=(made.train_path,),
        root="",
        dtype=made.dtype,
        tokenizer=made.tokenizer_path,
        eos_id=made.eos_id,
    )
    return _replace(config, "eval", paths=config.eval.paths or (made.heldout_path,))


def _keep_compiled(name: str) -> None:
    folder = storage.path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # slower starts are no reason to end a run
        say(f"compute.compilation_cache: cannot write {folder}: {error.strerror or error}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _replace(config: Config, part: str, **changes: Any) -> Config:
    changed = dataclasses.replace(getattr(config, part), **changes)
    return dataclasses.replace(config, **{part: changed})


def say(line: str) -> None:
    """Tell the user something, once per run and not once per process."""
    if jax.process_index() == 0:
        print(line, flush=True)


# --- where the run starts -------------------------------------------------------------------------


def _starting_point(config: Config, source: Source | None) -> tuple[int, Position | None]:
    """Finished steps and position in the data; says where they come from and what changed."""
    if source is None:
        say(f"new run in {config.run_dir}")
        return 0, None
    say(source.line)
    meta = source.meta()
    changes = checkpoint.config_changes(meta["config"], to_dict(config))
    checkpoint.refuse_changes(changes, config.checkpoint.allow_changes)
    if "step" not in source.parts:
        return 0, None
    shown = [c for c in changes if not c.key.startswith(("log.", "compute.compilation"))]
    for change in shown if source.is_resume else ():
        say(f"changed since the checkpoint: {change}")
    position = Position(**meta["position"])
    old_len = meta["config"]["data"]["seq_len"]
    return int(meta["step"]), position.rescaled(old_len, config.data.seq_len)


def _compare_data(source: Source | None, loader: Loader) -> None:
    """Say that the data, in which the run has a place already, are not those of before."""
    before = source.meta()["fingerprint"] if source and "step" in source.parts else None
    if before not in (None, loader.fingerprint):
        say(
            "changed since the checkpoint: names, sizes or ids of the token files; the data comes"
            " in another order from here on"
        )


def _initial_state(config: Config, mesh: Mesh, source: Source | None, first: int) -> TrainState:
    """The state after `first` steps: fresh, or with the parts that the source gives."""
    if source is None:
        return step.init_state(config, mesh)
    loaded = source.load(step.abstract_state(config, mesh))
    if "opt_state" not in loaded:  # never hold fresh and loaded parameters at once
        loaded["opt_state"] = step.init_opt_state(config, mesh, loaded["params"])
    if "step" not in loaded:
        loaded["step"] = step.replicated(mesh, np.int32(first))
    return TrainState(**loaded)


def _write_config(config: Config) -> None:
    folder = storage.path(config.run_dir)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2))

    try:
        processes.from_process_0(write)
    except OSError as error:
        raise OSError(f"config.dir: cannot write {folder}: {error}") from error


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
        problems = schedules.problems(config.optim, self._t_max)
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
    log: metrics.Writer
    checkpointer: Checkpointer
    evaluator: Evaluator | None
    loader: Loader
    plan: Plan
    nonfinite: int = 0  # steps in a row

    def steps(
        self,
        state: TrainState,
        first: int,
        preemption: processes.Preemption,
        watchdog: distributed.Watchdog,
    ) -> tuple[TrainState, int | None]:
        """Train from step `first` + 1 on; returns the state, and the step of a preemption."""
        c, at = self.config, first
        update = step.make_train_step(c, self.mesh)
        norms = step.make_norms(c, self.mesh) if c.log.norms_interval else None
        if first == 0:
            position = self.loader.order.start
            if kind := self.checkpointer.due(0):
                self.save(state, 0, position, kind)
            if c.eval.at_start:
                self.evaluate(state, 0, c.eval.max_rows)
        elif self.due_eval(first) and self.lacks_eval(first):
            self.evaluate(state, first, c.eval.max_rows)
        self.loader.n_steps = self.plan.last - first
        seen = self.loader.order.start.tokens
        pending: Any = None  # the step before, whose metrics the host has not read
        for batch, position in self.loader:
            at += 1
            watchdog.beat(f"step {at}")
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
                state, device_metrics = update(state, arrays, np.float32(lr), np.float32(clip))
            self.record(pending)
            pending = at, device_metrics, lr, seen, batch_tokens, self.loader.wait_s

            kind, stop = self.checkpointer.due(at), preemption.requested(at)
            due_eval = self.due_eval(at)
            if kind or stop or due_eval or at == self.plan.last:
                self.record(pending)
                pending = None
            is_last = at == self.plan.last
            if kind or stop or is_last:
                watchdog.beat(f"the checkpoint of step {at}")
                usual = "permanent" if is_last else "ephemeral"
                kind = usual if is_last and kind != "fixed" else kind or usual
                self.save(state, at, position, kind)
            if stop and not is_last:
                self.checkpointer.finish()
                return state, at
            if due_eval and not (is_last and (c.eval.at_finish or c.train.summary)):
                watchdog.beat(f"the evaluation after step {at}")
                self.evaluate(state, at, c.eval.max_rows)
        return state, None

    def record(self, pending: Any) -> None:
        """Read a finished step's metrics and write them down.

        Raises:
          ValueError: after `train.max_nonfinite_steps` steps in a row without a finite loss.
        """
        if pending is None:
            return
        at, device_metrics, lr, tokens, batch_tokens, wait = pending
        values = {name: float(v) for name, v in jax.device_get(device_metrics).items()}
        self.log.step(at, values, lr=lr, tokens=tokens, batch_tokens=batch_tokens, data_wait_s=wait)
        loss = values.get("train/CE loss", 0.0)
        norm = values.get("optim/total grad norm", 0.0)
        self.nonfinite = 0 if math.isfinite(loss + norm) else self.nonfinite + 1
        if self.nonfinite >= self.config.train.max_nonfinite_steps:
            with contextlib.suppress(OSError):
                self.checkpointer.finish()
            newest = self.checkpointer.latest()
            raise ValueError(
                f"step {at}: loss {loss}, grad norm {norm}; not finite for {self.nonfinite} steps"
                " in a row (config.train.max_nonfinite_steps). None of them changed the"
                f" parameters; {'no checkpoint' if newest is None else f'step {newest}'} is saved"
            )

    def save(self, state: TrainState, at: int, position: Position, kind: str) -> None:
        """Save the state after step `at`."""
        c = self.config
        self.log.sync()
        meta = checkpoint.meta(c, dataclasses.asdict(position), at, self.loader.fingerprint)
        files = {}
        if c.data.tokenizer is not None:
            files[f"tokenizer{storage.path(c.data.tokenizer).suffix}"] = c.data.tokenizer
        with self.log.pause(at, "checkpoint/save_duration_s"):
            self.checkpointer.save(at, state, meta | {"step": at}, kind, files)

    def evaluate(self, state: TrainState, at: int, max_rows: int | None) -> dict[str, float]:
        """Score the held-out files and write the result down."""
        if self.evaluator is None:
            return {}
        with self.log.pause(at, "throughput/in-loop eval time (s)"):
            scores = self.evaluator.metrics(state.params, max_rows)
        self.log.write(at, scores)
        self.log.sync()  # it follows the step's checkpoint, so it is not made again
        return scores

    def due_eval(self, at: int) -> bool:
        """Whether the held-out files are to be scored after a step."""
        every = self.config.eval.interval
        return every is not None and at % every == 0

    def lacks_eval(self, at: int) -> bool:
        """Whether the run was stopped between a step's checkpoint and its evaluation."""
        names = processes.from_process_0(lambda: sorted(self.log.recorded(at)))
        return bool(names) and not any(name.startswith("eval/lm/") for name in names)

    def finish(self, state: TrainState, seconds: float) -> None:
        """Wait for the last checkpoint, evaluate, and say what came out."""
        c, last = self.config, int(state.step)
        self.checkpointer.finish()
        say(f"checkpoint: {self.checkpointer.folder_of(last)}")
        scores = self.evaluate(state, last, None) if c.eval.at_finish or c.train.summary else {}
        self.log.sync()
        if c.train.summary:
            saved = self.checkpointer.folder_of(last)
            if jax.process_index() == 0:
                summary.write(c, step.build_model(c), state.params, scores, seconds, saved)
