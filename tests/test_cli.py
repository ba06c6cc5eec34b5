"""Signals and readers that go away end a command as they should, or not at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import runs

RUN = ["-m", "olmo_jax.train", f"--config={runs.CONFIG}", "--config.data.paths=none.npy"]


# Whoever started the tests may ignore or block what these commands are sent.
HEARS = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(*arguments: str, command: Sequence[str] = (sys.executable,), **more) -> subprocess.Popen:
    """A command, Python if no other is named, with these arguments."""
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)} | more.pop("env", {})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*command, *arguments], env=environment, **pipes | more)


@pytest.mark.parametrize(
    ("command", "imported", "number", "code"),
    [
        (RUN, b" absl", signal.SIGINT, 130),
        (RUN, b" absl", signal.SIGHUP, 75),
        (RUN, b" jax._src.config", signal.SIGTERM, 75),
        (["tools/plot_run.py", "none"], b" numpy", signal.SIGHUP, 129),
    ],
)
def test_a_signal_within_the_first_imports_is_no_traceback(command, imported, number, code):
    arguments = ("-SEc", HEARS, "-X", "importtime", *command)
    with runs.processes(start(*arguments, cwd=runs.ROOT)) as (process,):
        assert any(imported in line for line in iter(process.stderr.readline, b""))
        process.send_signal(number)
        # Not `communicate`: it passes over what the line before this one has read ahead.
        errors, out = process.stderr.read(), process.stdout.read()
        process.wait(60)
    assert [line for line in errors.splitlines() if not line.startswith(b"import time:")] == []
    assert (process.returncode, out) == (code, b"")


UNREAD = """
import pathlib, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
from olmo_jax import cli
cli.begin()
signal.raise_signal(signal.SIGHUP)
import logging
sys.stdin.readline()  # until nobody reads
for _ in range(3):
    print("x" * 10_000)
    logging.warning("y" * 10_000)
pathlib.Path(sys.argv[1]).touch()
print("at the end")
"""


@pytest.mark.parametrize("closed", ["", ">&- 2>&-"])
def test_a_command_goes_on_without_a_reader_and_without_a_stream(closed, tmp_path):
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable]
    with start("-c", UNREAD, str(tmp_path / "done"), command=shell) as process:
        process.stdout.close()
        process.stderr.close()
        process.stdin.close()
        assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_the_output_is_an_error():
    text = "from olmo_jax import cli; cli.begin(); print('lost')"
    with open("/dev/full", "wb") as full:
        process = start("-c", text, stdout=full)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"No space left on device" in errors


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"? ? ?\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"? \xe9 ?\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"? ? ?\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "\u2588 \xe9 ?\n".encode()),
    ],
)
def test_characters_that_the_output_has_not_are_replaced(environment, shown):
    line = "print('\\u2588 \\xe9 \\udcff')"  # the last stands for a byte of a file's name
    text = f"import sys; from olmo_jax import cli; cli.begin(); {line}"
    process = start("-c", text, env=environment)
    assert process.communicate(timeout=60) == (shown, b"")
    assert process.returncode == 0


def test_the_help_of_every_command_is_ascii_where_the_output_is():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (RUN[:2], *([f"tools/{n}.py"] for n in ("convert", "plan_pod", "plot_run"))):
        process = start(*command, "--help", env=ascii_only, cwd=runs.ROOT)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
        assert out.isascii()
        assert ("convert" in command[0]) == (b"average A B ? OUT" in out)
