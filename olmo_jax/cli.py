"""What all commands have in common: signals, output, flags, errors as lines, and exit codes.

First in a command, and of the standard library alone at its top: all else takes a second to import.
"""

import dataclasses
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TextIO

VERBS = {
    "train": "train a model, or go on with a run that was stopped",
    "convert": "convert, compare, average and upcycle checkpoints",
    "plan": "plan a run on TPUs or GPUs that are not here",
    "plot": "draw the curves of runs into one picture",
}

# Exit codes. One that a signal ends without more has 128 + its number, as shells count.
DONE, FAILED, WRONG = 0, 1, 2
PREEMPTED = 75  # EX_TEMPFAIL, "try again later": the SLURM script answers with a requeue
INTERRUPTED = 128 + signal.SIGINT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_codes = {number: 128 + number for number in SIGNALS}  # as shells count
_has_begun = False


def main() -> int:
    """The command `olmo-jax VERB ...`, which is `python -m olmo_jax.VERB ...`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in VERBS:
        run(sys.argv.pop(1))
    begin()
    if verb and verb not in ("-h", "--help"):
        said = meant(verb, {name: name for name in VERBS})
        return fail([], WRONG, f"{verb}: there is no such verb{said}; see --help")
    print("OLMo in JAX. Verbs, each with its own --help:\n")
    print("\n".join(f"  olmo-jax {name:8} {line}" for name, line in VERBS.items()))
    return DONE if verb else WRONG


def run(verb: str) -> NoReturn:
    """Be the command of a verb, with the arguments of this process, which ends here."""
    begin(PREEMPTED if verb == "train" else None)  # start it again: nothing to save yet
    code = importlib.import_module(f"olmo_jax.{verb}").main(sys.argv[1:])
    end_at_once()
    sys.exit(code)


# --- signals and output ---------------------------------------------------------------------------


def begin(preempted: int | None = None) -> None:
    """Prepare this process for a command; nothing is to be lost yet when a signal ends it.

    Where the output is caught, as in a notebook, the process is not the command's: it stays as it
    is, here and in all that follows.

    Args:
      preempted: exit code after SIGTERM and SIGHUP; None: 143 and 129.
    """
    global _has_begun
    if sys.stdout is not sys.__stdout__:
        return
    _has_begun = True
    if preempted is not None:
        _codes.update({signal.SIGTERM: preempted, signal.SIGHUP: preempted})
    end_at_once()
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def is_command() -> bool:
    """Whether this process is that of a command, and has begun."""
    return _has_begun


def end_at_once() -> None:
    """From here on a signal ends the process: there is nothing to lose yet, or any more."""
    _handle(_end)


def unwind() -> None:
    """From here on a signal unwinds the stack, so that nothing half-written stays."""
    _handle(lambda number, _: sys.exit(_codes[number]))
    _handle(signal.default_int_handler, signal.SIGINT)


def leave(code: int) -> None:
    """End the process now, where it is the command's: threads may wait for a silent server."""
    end_at_once()
    if _has_begun:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def raise_interrupts() -> None:
    """From here on SIGINT raises KeyboardInterrupt."""
    _handle(signal.default_int_handler, signal.SIGINT)


def _handle(handler: Any, *numbers: signal.Signals) -> None:
    for number in numbers or SIGNALS:
        if _has_begun and signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
            signal.signal(number, handler)


def _end(number: int, _: Any) -> None:
    os._exit(_codes[signal.Signals(number)])


class _Output(io.FileIO):
    """A stream that drops what nobody is there to read: `| head`, a `tee` or a terminal gone."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, ConnectionError) and error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def _lasting(stream: TextIO | None) -> TextIO:
    """The stream, with a sign for each character that its encoding has not."""
    if stream is None:  # closed by who started this
        return open(os.devnull, "w", encoding="utf-8")
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="replace", line_buffering=True
    )


# --- errors as lines ------------------------------------------------------------------------------


def attempt(
    argv: list[str],
    usage: str | None,
    work: Callable[[list[str]], int],
    interrupted: str = "interrupted",
) -> int:
    """Do what a command line asks for; what users can mend is told in lines.

    Args:
      argv: the arguments; without any, and where they ask for help, `usage` is printed.
      usage: the help.
      work: does it, and returns the exit code.
      interrupted: the line after Ctrl-C.
    Returns: the exit code.
    """
    if not argv or {"-h", "--help"} & {*argv}:
        print((usage or "").strip())
        return DONE if argv else WRONG
    try:
        return work(argv)
    except KeyboardInterrupt:
        return fail(argv, INTERRUPTED, interrupted)
    except (ValueError, OSError, ImportError) as error:  # an optional package may be missing
        lines = getattr(error, "problems", None)  # of a ConfigError
        if lines:
            return fail(argv, WRONG, *lines)
        return fail(argv, FAILED, str(error) or type(error).__name__)


def fail(argv: list[str], code: int, *lines: str) -> int:
    """Say what is wrong, with the traceback if the command line asks for it; return the code."""
    if "--debug" in argv:
        traceback.print_exc()
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return code


def meant(name: str, known: Mapping[str, str]) -> str:
    """The end of a line about an unknown name: how the one is written that looks like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else ""


# --- flags ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What a command line says."""

    given: dict[str, Any]  # values by the names of words and flags, but for those that are wrong
    overrides: dict[str, str]  # options of the config by dotted path, as typed
    problems: list[str]  # a line for each thing that is wrong


def parse(argv: list[str], group: Any) -> Any:
    """The words and flags of a command line without a config, as a `group`; see `read`.

    Raises:
      ConfigError: with all that is wrong.
    """
    from olmo_jax.config.options import ConfigError

    line = read(argv, group)
    if line.problems:
        raise ConfigError(line.problems)
    return group(**line.given)


def read(argv: list[str], group: Any) -> Line:
    """Read a command line: words, `--flag=value`, and switches, which have no value.

    Args:
      argv: the arguments. Every command has the switch `--debug`; one with a flag `config` takes
        options, `--config.part.option=value`.
      group: a dataclass of what there is, each of a kind of `config.options`. Positional fields are
        words, of which a tuple takes what the others leave; a bool is a switch.
    """
    from olmo_jax.config import typed
    from olmo_jax.config.options import ConfigError

    hints = typed.hints(group)
    words, texts, line = _sort(argv, group, hints)
    texts = _words(words, group, hints, line.problems) | texts
    for field in dataclasses.fields(group):
        name, shown = field.name, f"--{field.name}" if field.kw_only else field.name.upper()
        if (text := texts.get(name, field.default)) is dataclasses.MISSING:
            line.problems.append(f"{shown} is missing; see --help")
            continue
        hint = hints[name]
        if field.default is None and text is not None:  # none is to leave it out
            hint = typing.get_args(hint)[0]
        try:
            line.given[name] = typed.value(hint, text, shown)
        except ConfigError as error:
            line.problems.extend(error.problems)
    return line


def _sort(
    argv: list[str], group: Any, hints: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any], Line]:
    """Words, flags as typed, and the line with options and what is wrong."""
    from olmo_jax.files import brief

    flags = [field.name for field in dataclasses.fields(group) if field.kw_only] + ["debug"]
    switches = [name for name in flags if hints.get(name, bool) is bool]
    has_options = "config" in flags
    words: list[str] = []
    texts: dict[str, Any] = {}
    line = Line({}, {}, [])
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        is_option, said = has_options and name.startswith("config."), brief(argument)
        if not argument.startswith("--"):
            words.append(argument)
        elif name not in flags and not is_option:
            close = meant(name.replace("-", "_"), _known(flags, has_options))
            line.problems.append(f"{said}: there is no such flag{close}; see --help")
        elif name in switches and equals:
            line.problems.append(f"{said}: it takes no value; leave it out, or write --{name}")
        elif name not in switches and not equals:
            line.problems.append(f"{said}: needs a value, as in {said}=\u2026; see --help")
        elif is_option:
            line.overrides[name.removeprefix("config.")] = text
        elif name != "debug":  # which `fail` looks for
            texts[name] = text if equals else "true"
    return words, texts, line


def _words(
    words: list[str], group: Any, hints: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """The words by the names of the fields that take them."""
    names = [field.name for field in dataclasses.fields(group) if not field.kw_only]
    texts: dict[str, Any] = {}
    while names:
        name = names.pop(0)
        is_list = typing.get_origin(hints[name]) is tuple
        n = max(len(words) - len(names), 1) if is_list else 1
        taken, words = words[:n], words[n:]
        if taken:
            texts[name] = tuple(taken) if is_list else taken[0]
    problems += [f"{word}: not expected; flags begin with --, see --help" for word in words]
    return texts


def _known(flags: list[str], has_options: bool) -> dict[str, str]:
    """How flags and options are written, by their names; options by their last words too."""
    known = {name: f"--{name}" for name in flags}
    if not has_options:
        return known
    from olmo_jax.config.run import Config
    from olmo_jax.config.text import flatten, to_dict

    options = flatten(to_dict(Config()))
    last_words = {name.split(".")[-1]: f"--config.{name}" for name in reversed(options)}
    return last_words | {f"config.{name}": f"--config.{name}" for name in options} | known
