"""How a run starts: a config, what the machine, its last checkpoint or another run's add to it, and
the parts of the loop that it takes.
"""

import contextlib
import dataclasses
import functools
import json
import time
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import olmo_jax
from olmo_jax import cli, files
from olmo_jax.checkpoints.checkpointer import Checkpointer
from olmo_jax.config import changes
from olmo_jax.config.data import batch_stages
from olmo_jax.config.model import LANES
from olmo_jax.config.options import ConfigError
from olmo_jax.config.parameters import table
from olmo_jax.config.run import Config
from olmo_jax.config.schedule_problems import optimizer_problems
from olmo_jax.config.text import to_dict
from olmo_jax.config.training import LogConfig
from olmo_jax.data.loader import Loader
from olmo_jax.data.open import open_source
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.data.source import Position, Source
from olmo_jax.kernels import attention
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import processes, sharding
from olmo_jax.parallel.processes import say
from olmo_jax.parallel.watchdog import Watchdog
from olmo_jax.records import jsonl, speed, writer
from olmo_jax.records.tensorboard import TensorBoard
from olmo_jax.records.wandb import Wandb
from olmo_jax.training import loop, losses, optim, profiler, program
from olmo_jax.training.keeping import FellBack, Keeper, Stopped
from olmo_jax.training.origin import Origin, find_origin, initial_state, kept
from olmo_jax.training.pacing import Pacing
from olmo_jax.training.state import (
    TrainState,
    abstract_state,
)


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
    make_evaluators: Callable[[Config, Mesh], Sequence[loop.Evaluator]],
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
    make_evaluators: Callable[[Config, Mesh], Sequence[loop.Evaluator]],
    needs_end: bool,
) -> Outcome:
    with contextlib.ExitStack() as stack:
        # What may be refused comes first, cheap things before dear ones; nothing is written yet.
        config = resolve(config)
        mesh = sharding.make_mesh(config.mesh)
        shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
        kind = jax.devices()[0].device_kind
        say(f"devices: {jax.device_count()} {kind} ({shape or 'no axis used'})")
        config = with_attention(config, mesh)
        program.check_flags(config.compute.xla_flags, mesh)
        config = with_loss_ranks(config, mesh)
        checkpointer = Checkpointer(config.checkpoint, config.run_dir)
        stack.callback(_wait_for_save, checkpointer)
        # Before the data: the checkpoint knows the place in them, and what may not have changed.
        origin = find_origin(config.checkpoint, config.model, checkpointer)
        first = first_step(origin, to_dict(config), config.checkpoint.allow_changes)
        is_resume = origin is not None and origin.is_resume
        checkpointer.refuse_foreign(first if first or is_resume else -1)
        data = open_source(config.data, config.model.vocab_size)
        schedule = BatchSchedule(data, batch_stages(config.data), position(origin, data), first)
        # Only now, since a run of epochs ends where its data end.
        pacing = Pacing(config.train, config.optim, schedule)
        if problems := optimizer_problems(config.optim, pacing.schedule_end):
            raise ConfigError(problems)
        loader = Loader(
            schedule,
            lambda n: sharding.local_rows(mesh, n),
            config.data.n_threads,
            config.data.prefetch,
        )
        # They open their files here: one that is missing is no reason to lose an hour of training.
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
            lacks_end = config.eval.paths and config.eval.at_finish
            if not needs_end and not (lacks_end and lacks_eval(config.run_dir, first)):
                return Outcome(0)
        loading = time.perf_counter()
        state = initial_state(config.model, config.optim, config.train.seed, mesh, origin, first)
        loading = time.perf_counter() - loading

        trace = profiler.Profiler(config.profile.steps, first, pacing.last)

        # From here on things are written.
        if origin is None:
            say(f"new run in {config.run_dir}")
        if not is_resume:
            set_aside = processes.from_process_0(lambda: jsonl.set_aside(config.run_dir))
            if set_aside:
                say(f"no checkpoint in {config.run_dir}, but records: kept as {set_aside}")
        if not is_done:  # what ran stands there; a config that changed nothing is not what ran
            write_config(config)
        watchdog = stack.enter_context(Watchdog(config.train.step_timeout_s))
        log = _records(config, schedule, is_resume, pacing.last)
        stack.callback(log.close)
        if origin is not None:
            log.write(first + 1, {"checkpoint/load_duration_s": loading})
        extra = kept(origin, config.data.tokenizer)
        keeper = Keeper(
            checkpointer, log, watchdog,
            lambda position, at: extra.meta | checkpoint_meta(config, data, position, at),
            extra.carried, config.train.max_nonfinite_steps, config.checkpoint.async_save,
        )  # fmt: skip
        if origin is not None and is_resume:
            keeper.last_finite = origin.meta.get("last_finite_step")
        run = loop.Run(
            model=Transformer(config.model, config.compute),
            objective=losses.next_token(config.model, config.compute, config.train),
            train=config.train,
            optim=config.optim,
            eval=config.eval,
            options=config.log,
            xla_flags=config.compute.xla_flags,
            mesh=mesh,
            log=log,
            keeper=keeper,
            evaluators=evaluators,
            loader=loader,
            began=schedule.start,
            pacing=pacing,
            preemption=preemption,
            watchdog=watchdog,
            trace=trace,
            scores_start=loop.due_eval(config.eval, first) and lacks_eval(config.run_dir, first),
            scores_end=config.eval.at_finish or needs_end,
        )
        try:
            if not is_done:
                n_rows = f"{data.n_rows:,} rows"
                say(f"training steps {first + 1:,} to {pacing.last:,} on {n_rows}")
                with trace:
                    state = run.steps(state, first)
            watchdog.beat("the end of the run")
            # Others than the run's devices may compute with it.
            compute = dataclasses.replace(config.compute, attention="auto")
            model = Transformer(config.model, compute)
            return Outcome(0, state, *run.finish(state), model)
        except Stopped as stopped:
            checkpointer.finish()
            log.close()  # which also clears the progress bar
            say(f"stopped: saved step {stopped.step}; the same command goes on from there")
            return Outcome(cli.PREEMPTED)


def _records(config: Config, schedule: BatchSchedule, is_resume: bool, last: int) -> writer.Writer:
    kind = jax.devices()[0].device_kind
    peak = speed.peak_flops(config.log.device_peak_flops, config.compute.dtype, kind)
    return writer.Writer(
        files.path(config.run_dir),
        config.log.interval,
        speed.Speed(config.model, config.data.seq_len, peak, jax.device_count()),
        _sinks(config.log, config.name, to_dict(config)),
        start_step=schedule.first,
        start_tokens=schedule.start.tokens,
        is_resume=is_resume,
        total_steps=last,
        process_index=jax.process_index(),
    )


def _sinks(options: LogConfig, name: str, config: Mapping[str, Any]) -> list[writer.MakeSink]:
    """The servers and files beside `metrics.jsonl` that are told what a run tells."""
    sinks: list[writer.MakeSink] = []
    if options.wandb:
        about = {"project": options.wandb_project, "name": name, "config": config}
        sinks.append(functools.partial(Wandb, about))
    if options.tensorboard:
        sinks.append(lambda folder, step, _: TensorBoard(folder / "tensorboard", step))
    return sinks


def checkpoint_meta(config: Config, data: Source, position: Position, at: int) -> dict[str, Any]:
    """What a checkpoint of this run says beside its arrays.

    Args:
      config: the run's.
      data: its source.
      position: in the data.
      at: the step, at which the records end: who resumes cuts them there.
    """
    return {
        "model": to_dict(config.model),
        "config": to_dict(config),
        "position": dataclasses.asdict(position),
        "metrics_position": at,
        "fingerprint": data.fingerprint,
        "versions": {"olmo_jax": olmo_jax.__version__, "jax": jax.__version__},
    }


def _wait_for_save(checkpointer: Checkpointer) -> None:
    """After an error too a save under way is worth having; for several see `distributed.leave`."""
    if jax.process_count() == 1:
        with contextlib.suppress(OSError):
            checkpointer.finish()


# --- what the machine adds ------------------------------------------------------------------------


def resolve(config: Config) -> Config:
    """The config with what depends on this machine filled in: fp32 on a CPU."""
    if config.compute.compilation_cache is not None:
        program.keep_compiled(config.compute.compilation_cache)
    if jax.default_backend() == "cpu" and config.compute.dtype != "float32":
        say("compute.dtype: float32 on a CPU, where bfloat16 is far slower")
        config = config.changed("compute", dtype="float32")
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not files.path(tokenizer).exists():
        raise FileNotFoundError(f"config.data.tokenizer: no such file: {tokenizer}")
    return config


def with_attention(config: Config, mesh: Mesh) -> Config:
    """The config with what attention computes with on these devices in the place of "auto".

    Raises:
      ConfigError: if they cannot compute it so.
    """
    impl, ways = config.compute.attention, mesh.shape["context"]
    has_documents = config.data.document_mask != "none"
    of_kernel = config.compute.dtype, config.model.head_dim, has_documents
    target = mesh.devices.flat[0], ways > 1
    if impl == "auto":
        impl = attention.choose(*target, *of_kernel)
        say(f"attention: {impl}" + (f" in a ring of {ways}" if ways > 1 else ""))
    elif impl != "reference" and (found := attention.obstacle(impl, *target, *of_kernel)):
        raise ConfigError([f"config.compute.attention={impl}: {found}"])
    seq_lens = {"data": config.data.seq_len, "eval": config.eval.seq_len}
    problems = [
        f"config.{part}.seq_len={seq} over 2 x mesh.context={2 * ways} is chunks of"
        f" {seq // (2 * ways)}, on a TPU they are multiples of {LANES}; use a multiple of"
        f" {2 * ways * LANES}, a smaller mesh.context or compute.attention=blocked"
        for part, seq in seq_lens.items()
        if impl == "pallas" and ways > 1 and seq is not None and seq % (2 * ways * LANES)
    ]
    if problems:
        raise ConfigError(problems)
    return config.changed("compute", attention=impl)


def first_step(origin: Origin | None, config: Mapping[str, Any], allow: Collection[str]) -> int:
    """Finished steps; says where they come from and what changed.

    Args:
      origin: where the run starts from.
      config: the run's, as dicts.
      allow: `checkpoint.allow_changes`.
    Raises:
      ValueError: if something changed that may not.
    """
    if origin is None:
        return 0
    say(origin.line)
    found = changes.between(origin.meta["config"], config)
    changes.refuse(found, allow, origin.parts)
    if "step" not in origin.parts:
        return 0
    shown = [c for c in found if c.key not in changes.RECORDS]
    for change in shown if origin.is_resume else ():
        say(f"changed since the checkpoint: {change}")
    return origin.step()


def position(origin: Origin | None, data: Source) -> Position:
    """Where the run stands in its data; says if they are not those of before."""
    if origin is None or "step" not in origin.parts:
        return data.start()
    if origin.meta.get("fingerprint") not in (None, data.fingerprint):
        say(
            "changed since the checkpoint: names, sizes or ids of the token files; the data comes"
            " in another order from here on"
        )
    return origin.position(data)


def with_loss_ranks(config: Config, mesh: Mesh) -> Config:
    """The config with the number of ranks that the loss depends on, for checkpoints to hold."""
    t = config.train
    if t.loss_normalization != "per_rank_tokens" or t.loss_ranks is not None:
        return config
    ranks = sharding.data_parallel_ways(mesh)
    say(f"train.loss_ranks: {ranks}, the data-parallel ways of this mesh; set it to keep the loss"
        " the same on another")  # fmt: skip
    return config.changed("train", loss_ranks=ranks)


def write_config(config: Config) -> None:
    """Write `config.json`, whole or not at all.

    Raises:
      OSError: if the folder cannot be written.
      ValueError: if the file is there and somebody else's (OSError in processes but 0).
    """
    folder = files.path(config.run_dir)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_a_runs_config(folder / "config.json"):
            raise ValueError(
                f"config.dir: {folder / 'config.json'} is not the config of a run of olmo_jax and"
                " is not overwritten; set another config.dir"
            )
        with files.whole(folder / "config.json") as file:
            file.write(json.dumps(to_dict(config), indent=2).encode())

    try:
        processes.from_process_0(write)
    except OSError as error:
        raise OSError(f"config.dir: cannot write {folder}: {error}") from error


def _is_a_runs_config(path: files.Path) -> bool:
    """Whether it is one, or nothing: a folder of Hugging Face has a file of that name too."""
    if not path.exists():
        return True
    try:
        found = files.json_object(path.read_bytes(), str(path))
    except ValueError:
        return False
    return found.keys() >= {"model", "optim", "checkpoint"}


def lacks_eval(run_dir: str, step: int) -> bool:
    """Whether a run was stopped between the checkpoint of a step and its evaluation."""

    def read() -> bool:
        folder = files.path(run_dir)
        names = jsonl.read(folder).get(step, {}) if (folder / jsonl.NAME).exists() else {}
        is_recorded = step == 0 or any(name.startswith("train/") for name in names)
        return is_recorded and not any(name.startswith("eval/") for name in names)

    return processes.from_process_0(read)
