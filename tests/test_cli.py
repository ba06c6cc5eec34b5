"""Commands: signals and readers that go away, what verbs share, and flags."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from typing import Literal

import pytest
import runs

from olmo_jax import cli
from olmo_jax.config.options import ConfigError, Count, File
from olmo_jax.parallel import watchdog

RUN = ["-m", "olmo_jax.train", f"--config={runs.CONFIG}", "--config.data.paths=none.npy"]
# What pip makes of `[project.scripts]`.
INSTALLED = "import sys\nfrom olmo_jax.cli import main\nsys.exit(main())"

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
        (["-m", "olmo_jax.plot", "none"], b" numpy", signal.SIGHUP, 129),
        (["-c", INSTALLED, "train", *RUN[2:]], b" absl", signal.SIGTERM, 75),
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
from olmo_jax.parallel import watchdog
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


# --- verbs ----------------------------------------------------------------------------------------


def test_the_installed_command_is_the_function_that_lists_the_verbs(capsys, monkeypatch):
    project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"olmo-jax": f"{cli.__name__}:{cli.main.__name__}"}
    for words, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["olmo-jax", *words])
        assert cli.main() == code
        assert re.findall(r"^  olmo-jax (\w+) +\w", capsys.readouterr().out, re.M) == [*cli.VERBS]
    monkeypatch.setattr(sys, "argv", ["olmo-jax", "tarin"])
    assert cli.main() == 2
    line = "error: tarin: there is no such verb; did you mean train?; see --help\n"
    assert capsys.readouterr().err == line


def test_a_verb_is_a_file_with_a_main_and_beside_them_are_only_cli_and_files():
    floor = {path.stem for path in (runs.ROOT / "olmo_jax").glob("*.py")}
    assert floor == {*cli.VERBS, "cli", "files", "__init__"}


@pytest.mark.parametrize("command", [["-m", "olmo_jax.plot"], ["-c", INSTALLED, "plot"]])
def test_both_ways_to_start_a_verb_end_alike(command, tmp_path):
    process = start(*command, "a b", f"--out={tmp_path / 'x.png'}", cwd=tmp_path)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    need = "no such file; need the folder of a run, which has it"
    assert errors.decode() == f"error: a b/metrics.jsonl: {need}\n"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_names_each_flag_and_exit_code_and_is_ascii_where_the_output_is(verb):
    process = start("-m", f"olmo_jax.{verb}", "--help", env=ASCII, cwd=runs.ROOT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    text = out.decode("ascii")
    assert ("average A B ? OUT" in text) == (verb == "convert")
    module = importlib.import_module(f"olmo_jax.{verb}")
    groups = [group for group in vars(module).values() if getattr(group, "__module__", "") ==
              module.__name__ and dataclasses.is_dataclass(group)]  # fmt: skip
    flags = {field.name for group in groups for field in dataclasses.fields(group) if field.kw_only}
    assert set(re.findall(r"--(\w+)", text)) == flags | {"debug"}
    codes = {int(code) for code in re.findall(r"\d+", text.split("Exit codes:")[1])}
    preempted = {watchdog.STALLED, cli.PREEMPTED} if verb == "train" else {129, 143}
    assert codes == {cli.DONE, cli.FAILED, cli.WRONG, cli.INTERRUPTED} | preempted


# --- flags ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    many: tuple[str, ...]
    last: str
    _: dataclasses.KW_ONLY
    count: Count | None = None
    kind: Literal["long", "short"] = "long"
    quick: bool = False
    place: File = "~/x"


def test_words_and_flags_have_the_kinds_of_their_group(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    line = cli.read(["a", "--count=3", "b", "--quick", "--kind=short", "c", "--debug"], Group)
    assert line.problems == []
    assert line.given == {"many": ("a", "b"), "last": "c", "count": 3, "kind": "short",
                          "quick": True, "place": "/home/me/x"}  # fmt: skip
    assert cli.parse(["a", "b", "--place=~/y"], Group) == Group(("a",), "b", place="/home/me/y")
    assert cli.read(["a", "--count=none"], Group).problems == [
        "LAST is missing; see --help", "--count: found 'none', need int"
    ]  # fmt: skip


def test_what_is_wrong_with_a_line_is_told_at_once():
    wrong = {
        "--cuont=3": "--cuont=3: there is no such flag; did you mean --count?; see --help",
        "--config.model.d_model=3": "--config.model.d_model=3: there is no such flag; see --help",
        "--kind=odd": "--kind: found 'odd', need one of long, short",
        "--count": "--count: needs a value, as in --count=\u2026; see --help",
        "--quick=true": "--quick=true: it takes no value; leave it out, or write --quick",
    }
    with pytest.raises(ConfigError) as raised:
        cli.parse(["a", "b", *wrong], Group)
    assert sorted(raised.value.problems) == sorted(wrong.values())
