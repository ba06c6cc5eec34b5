"""Train an OLMo model, or go on with a run that was stopped.

  python -m olmo_jax.train --config=FILE [--config.PART.OPTION=VALUE ...]

  --config=FILE             a Python file with get_config(); see configs/
  --config.optim.lr=1e-4    change one option; `none` switches an optional one off,
                            a list is written a,b,c
  --dry_run                 print the whole config, parameters, FLOPs, mesh and memory, and stop
  --n_devices=N             for --dry_run: devices of the run that is planned
  --coordinator=HOST:PORT   several processes without TPU pod or SLURM: where process 0 listens,
  --n_processes=N           how many there are,
  --process_id=I            and which one this is
  --connect_timeout=S       seconds to wait for the other processes (300)
  --debug                   show where in the code an error arose

Exit codes: 0 done, 1 failed, 2 wrong config, 74 a step stalled, 75 preempted: start it again,
130 interrupted at once.
"""

if __name__ == "__main__":  # before all else, which takes its time
    from olmo_jax import cli

    cli.run("train")

import dataclasses
import os
import re
import sys
import time
import traceback
from typing import Any

from olmo_jax import cli, files
from olmo_jax.config.model import MeshConfig
from olmo_jax.config.options import ConfigError, Count, Natural
from olmo_jax.config.run import Config, load, planned_devices, validate
from olmo_jax.files import brief

CLUSTER = ("coordinator", "n_processes", "process_id")
INTERRUPTED = "interrupted; the same command goes on from the newest checkpoint"
NO_ROOM = "{}; --dry_run says what the state takes, see compute.remat, compute.accumulate and mesh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """What a command says beside the options of its config."""

    config: str
    dry_run: bool = False
    n_devices: Count | None = None
    coordinator: str | None = None
    n_processes: Count | None = None
    process_id: Natural | None = None
    connect_timeout: Count = 300


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    try:
        code = cli.attempt(argv, __doc__, _main, INTERRUPTED)
    except Exception as error:
        if _is_one_of_several():
            traceback.print_exc()
            said = "this process ends; another one may have ended before: see its output"
            code = cli.fail([], cli.FAILED, said)
        elif "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            said = NO_ROOM.format(brief(str(error).strip() or "out of memory"))
            code = cli.fail(argv, cli.FAILED, said)
        else:
            raise
    if code not in (cli.DONE, cli.PREEMPTED) and _is_one_of_several():
        from olmo_jax.parallel import distributed

        distributed.leave(code)
    return code


def _main(argv: list[str]) -> int:
    flags, config = configure(argv)
    return _dry_run(config, flags) if flags.dry_run else _train(config, flags)


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("olmo_jax.parallel.distributed")  # without it nobody has joined
    return distributed is not None and distributed.is_one_of_several()


def configure(argv: list[str]) -> tuple[TrainFlags, Config]:
    """TrainFlags and config of a command line.

    Raises:
      ConfigError: with all that is wrong in arguments, options and their relations.
    """
    line = cli.read(argv, TrainFlags)
    problems = line.problems + _flag_problems(line.given)
    config, unread, cause = None, set(), None
    try:
        config = load(line.given["config"], line.overrides) if "config" in line.given else None
    except ConfigError as error:
        problems += error.problems
        config, unread, cause = error.rest, error.options, error
    if config is not None:
        try:
            validate(config, _devices(config.mesh, line.given.get("n_devices")), unread)
        except ConfigError as error:
            problems += error.problems
            cause = error
    if problems or config is None:
        raise ConfigError(problems) from cause
    return TrainFlags(**line.given), config


def _flag_problems(given: dict[str, Any]) -> list[str]:
    """What is wrong with flags that go together, of those that are right by themselves."""
    problems = []
    if given.get("n_devices") and not given.get("dry_run"):
        problems.append("--n_devices is for --dry_run; a run takes the devices that it finds")
    missing = [name for name in CLUSTER if given.get(name, "wrong") is None]
    if len(missing) == len(CLUSTER) or set(CLUSTER) - given.keys():
        return problems
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        need = f"several processes need all of --{', --'.join(CLUSTER)}"
        return [*problems, f"{names} missing: {need}"]
    where, n, index = (given[name] for name in CLUSTER)
    if not re.fullmatch(r"[!-~]+:\d{1,5}", where):
        problems.append(f"--coordinator={brief(where)}: need host:port")
    if index >= n:
        problems.append(f"--process_id={index} is not below --n_processes={n}")
    return problems


def _devices(mesh: MeshConfig, n_devices: int | None) -> int:
    """Devices of a run that is planned; those of a real one are counted when JAX is there."""
    return n_devices or planned_devices(mesh)


def _dry_run(config: Config, flags: TrainFlags) -> int:
    from olmo_jax.config import describe
    from olmo_jax.config.parameters import nested, table
    from olmo_jax.training import optim

    rows = table(config.model)
    groups = optim.describe_groups(config.optim, nested(rows), rows).splitlines()
    moments = optim.moments(config.optim, rows)
    print(describe.describe(config, _devices(config.mesh, flags.n_devices), groups, moments))
    return 0


def _train(config: Config, flags: TrainFlags) -> int:
    if config.compute.deterministic:  # has to be set before JAX meets its devices
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
        )
    # JAX takes a second to import: errors above this line answer at once.
    from olmo_jax.parallel import distributed
    from olmo_jax.training import start

    cli.raise_interrupts()  # several processes end together
    cluster = distributed.find_cluster(vars(flags), os.environ)
    distributed.start(cluster, flags.connect_timeout)
    import jax

    from olmo_jax.evals import summary
    from olmo_jax.parallel import processes
    from olmo_jax.parallel.processes import say

    began = time.perf_counter()
    # Before the devices too: who is being stopped may hold them. Signals are heard from the start:
    # inside JAX's own callbacks Python drops a KeyboardInterrupt.
    with processes.only_writer(config.run_dir), processes.Preemption() as preemption:
        validate(config, jax.device_count())
        config = _with_corpus(config)
        needs_summary = config.train.summary and not summary.is_written(config.run_dir)
        outcome = start.train(config, preemption, _evaluators, needs_summary)
        if outcome.state is None:
            if config.train.summary and not needs_summary:
                say(f"its summary: {files.path(config.run_dir) / 'summary.md'}")
            return outcome.code
        if jax.process_index() == 0 and config.train.summary:
            seconds = time.perf_counter() - began
            run = summary.Told(
                config.name, config.run_dir, config.eval.paths, config.data.tokenizer,
                config.data.seq_len, config.optim.lr,
            )  # fmt: skip
            params, scores = outcome.state.params, outcome.scores
            summary.write(run, outcome.model, params, scores, seconds, outcome.saved)
    return outcome.code


def _evaluators(config: Config, mesh: Any) -> list[Any]:
    """What scores a run: its held-out files, if it has some."""
    from olmo_jax.evals.perplexity import HeldOut

    parts = config.eval, config.data, config.model, config.compute
    return [HeldOut(*parts, mesh)] if config.eval.paths else []


def _with_corpus(config: Config) -> Config:
    """The config with the files of the corpus that it asks for, which are made here."""
    if config.data.corpus is None:
        return config
    from olmo_jax.curation import stdlib
    from olmo_jax.parallel.processes import say

    data = config.data
    made = stdlib.prepare(data.corpus_dir, data.corpus_vocab_size, data.dtype, log=say)
    if made.vocab_size > config.model.vocab_size:
        size = f"config.data.corpus_vocab_size={made.vocab_size}"
        raise ConfigError([f"{size} is above model.vocab_size={config.model.vocab_size}"])
    data = dataclasses.replace(
        data,
        paths=(made.train_path,),
        root="",
        dtype=made.dtype,
        tokenizer=made.tokenizer_path,
        eos_id=made.eos_id,
    )
    heldout = dataclasses.replace(config.eval, paths=config.eval.paths or (made.heldout_path,))
    return dataclasses.replace(config, data=data, eval=heldout)
