"""Train a model: `python -m olmo_jax.train --config=configs/quickstart.py`."""

if __name__ == "__main__":  # before all else, which takes its time
    from olmo_jax import cli

    cli.begin(preempted=75)  # nothing to save yet: the same answer as later, start it again

import dataclasses
import difflib
import os
import re
import sys
import time
import traceback

from olmo_jax import cli, files
from olmo_jax.config.options import ConfigError
from olmo_jax.config.run import Config, load, planned_devices, validate
from olmo_jax.config.text import flatten, to_dict
from olmo_jax.files import brief

USAGE = """\
Train an OLMo model, or go on with a run that was stopped.

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
NUMBERS = ("n_devices", "n_processes", "process_id", "connect_timeout")
CLUSTER = ("coordinator", "n_processes", "process_id")
NO_ROOM = "{}; --dry_run says what the state takes, see compute.remat, compute.accumulate and mesh"
PREEMPTED = 75  # as processes.EXIT_PREEMPTED
SWITCHES = ("dry_run", "debug")


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        flags, config = configure(argv)
        code = _dry_run(config, flags) if "dry_run" in flags else _train(config, flags)
    except ConfigError as error:
        code = _fail(argv, 2, *error.problems)
    except (ValueError, OSError, ImportError) as error:  # a package for gs:// or W&B may be missing
        code = _fail(argv, 1, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        code = _fail(argv, 130, "interrupted; the same command goes on from the newest checkpoint")
    except Exception as error:
        if _is_one_of_several():
            traceback.print_exc()
            said = "this process ends; another one may have ended before: see its output"
            code = _fail([], 1, said)
        elif "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            code = _fail(argv, 1, NO_ROOM.format(brief(str(error).strip() or "out of memory")))
        else:
            raise
    if code not in (0, PREEMPTED) and _is_one_of_several():
        from olmo_jax.parallel import distributed

        distributed.leave(code)
    return code


def _is_one_of_several() -> bool:
    distributed = sys.modules.get("olmo_jax.parallel.distributed")  # without it nobody has joined
    return distributed is not None and distributed.is_one_of_several()


def _fail(argv: list[str], code: int, *lines: str) -> int:
    if "--debug" in argv:
        traceback.print_exc()
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code


def configure(argv: list[str]) -> tuple[dict[str, str], Config]:
    """Flags by name, and the config, of a command line.

    Raises:
      ConfigError: with all that is wrong in arguments, options and their relations.
    """
    flags, overrides, problems = _split(argv)
    config, unread, cause = None, set(), None
    try:
        config = load(flags["config"], overrides) if "config" in flags else None
    except ConfigError as error:
        problems += error.problems
        config, unread, cause = error.rest, error.options, error
    if config is not None:
        try:
            validate(config, _devices(config, flags), unread)
        except ConfigError as error:
            problems += error.problems
            cause = error
    if problems or config is None:
        raise ConfigError(problems) from cause
    return flags, config


def parse(argv: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Flags by name, and overrides of config options by dotted path.

    Raises:
      ConfigError: with every argument that makes no sense.
    """
    flags, overrides, problems = _split(argv)
    if problems:
        raise ConfigError(problems)
    return flags, overrides


def _split(argv: list[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    flags, overrides, problems, known = {}, {}, [], ("config", "coordinator", *NUMBERS)
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        said = brief(argument)
        if not argument.startswith("--"):
            problems.append(f"{said}: options begin with --, see --help")
        elif name in SWITCHES and value.lower() in ("", "true"):
            flags[name] = "true"
        elif name in SWITCHES:
            problems.append(f"{said}: leave it out, or write --{name}")
        elif name not in known and not name.startswith("config."):
            problems.append(f"{said}: there is no such flag{_meant(name)}; see --help")
        elif "=" not in argument:
            problems.append(f"{said}: needs a value, as in {said}=…; see --help")
        elif name in NUMBERS and not re.fullmatch(r"\d{1,9}", value, re.ASCII):
            problems.append(f"{said}: need a whole number below a billion")
        elif name in NUMBERS and not int(value) and name != "process_id":
            problems.append(f"{said}: need 1 or more")
        elif name in known:
            flags[name] = value
        else:
            overrides[name.removeprefix("config.")] = value
    if "config" not in flags:
        problems.append("--config=FILE is missing; see configs/, and --help")
    if "n_devices" in flags and "dry_run" not in flags:
        problems.append("--n_devices is for --dry_run; a run takes the devices that it finds")
    return flags, overrides, problems + _cluster_problems(flags)


def _meant(name: str) -> str:
    """A flag or an option that looks like `name`."""
    flags = ["config", "coordinator", *SWITCHES, *NUMBERS]
    options = flatten(to_dict(Config()))
    by_word = {option.split(".")[-1]: f"config.{option}" for option in reversed(options)}
    known = dict.fromkeys(flags) | {f"config.{o}": None for o in options} | by_word
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean --{known[close[0]] or close[0]}?" if close else ""


def _cluster_problems(flags: dict[str, str]) -> list[str]:
    missing = [name for name in CLUSTER if name not in flags]
    if len(missing) == len(CLUSTER):
        return []
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        return [f"{names} missing: several processes need all of --{', --'.join(CLUSTER)}"]
    problems = []
    if not re.fullmatch(r"[!-~]+:\d{1,5}", flags["coordinator"]):
        problems.append(f"--coordinator={brief(flags['coordinator'])}: need host:port")
    if int(flags["process_id"]) >= int(flags["n_processes"]):
        problems.append(
            f"--process_id={flags['process_id']} is not below --n_processes={flags['n_processes']}"
        )
    return problems


def _devices(config: Config, flags: dict[str, str]) -> int:
    """Devices of a run that is planned; those of a real one are counted when JAX is there."""
    named = int(flags.get("n_devices", 0)) if "dry_run" in flags else 0
    return named or planned_devices(config.mesh)


def _dry_run(config: Config, flags: dict[str, str]) -> int:
    from olmo_jax.config import describe
    from olmo_jax.config.parameters import nested, table
    from olmo_jax.training import optim

    rows = table(config.model)
    groups = optim.describe_groups(config.optim, nested(rows), rows).splitlines()
    moments = optim.moments(config.optim, rows)
    print(describe.describe(config, _devices(config, flags), groups, moments))
    return 0


def _train(config: Config, flags: dict[str, str]) -> int:
    if config.compute.deterministic:  # has to be set before JAX meets its devices
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
        )
    # JAX takes a second to import: errors above this line answer at once.
    from olmo_jax.parallel import distributed
    from olmo_jax.training import loop

    cli.raise_interrupts()  # several processes end together
    cluster = distributed.find_cluster(flags, os.environ)
    distributed.start(cluster, float(flags.get("connect_timeout", 300)))
    import jax

    from olmo_jax.evals import perplexity, summary
    from olmo_jax.parallel import processes
    from olmo_jax.parallel.processes import say

    began = time.perf_counter()
    # Before the devices too: who is being stopped may hold them. Signals are heard from the start:
    # inside JAX's own callbacks Python drops a KeyboardInterrupt.
    with processes.only_writer(config.run_dir), processes.Preemption() as preemption:
        validate(config, jax.device_count())
        config = _with_corpus(config)
        needs_summary = config.train.summary and not summary.is_written(config.run_dir)
        outcome = loop.train(config, preemption, perplexity.evaluators, needs_summary)
        if outcome.state is None:
            if config.train.summary and not needs_summary:
                say(f"its summary: {files.path(config.run_dir) / 'summary.md'}")
            return outcome.code
        if jax.process_index() == 0 and config.train.summary:
            seconds = time.perf_counter() - began
            run = summary.Run(
                config.name, config.run_dir, config.eval.paths, config.data.tokenizer,
                config.data.seq_len, config.optim.lr,
            )  # fmt: skip
            params, scores = outcome.state.params, outcome.scores
            summary.write(run, outcome.model, params, scores, seconds, outcome.saved)
    return outcome.code


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


if __name__ == "__main__":
    code = main(sys.argv[1:])
    cli.end_at_once()
    sys.exit(code)
