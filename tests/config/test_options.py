"""Kinds of options: what was typed, where paths lead, which numbers there are, and odd values."""

import dataclasses
import os
import pwd
import random
import signal
import subprocess
import sys
import time
import typing
import warnings
from typing import Any

import numpy as np
import pytest
import runs

from olmo_jax import config, files, plan, train
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.config import typed
from olmo_jax.config.run import validate
from olmo_jax.parallel import processes
from olmo_jax.records import plot
from olmo_jax.training import program

PLAIN = [f"--config={runs.CONFIG}", "--config.data.paths=x.npy"]


def configured(*words: str) -> config.Config:
    return train.configure([*PLAIN, *runs.flags(*words)])[1]


def refused(*words: str) -> list[str]:
    """The lines about a command."""
    result = runs.run("data.paths=x.npy", *words, "--dry_run")
    assert result.code == 2, result.out
    return result.errors


def value_of(settings: config.Config, option: str):
    for key in option.split("."):
        settings = getattr(settings, key)
    return settings


# --- what was typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("name", "1.10", "1.10"),
        ("name", "1e-4", "1e-4"),
        ("name", "true", "true"),
        ("name", "None", "None"),
        ("name", "007", "007"),
        ("dir", "2024_11", "2024_11"),
        ("dir", "None", None),
        ("data.tokenizer", "none", None),
        ("data.document_mask", "none", "none"),
        ("data.corpus", "none", None),
        ("data.paths", "30inplace.npy", ("30inplace.npy",)),
        ("data.paths", "0x10,1_0.npy, [ab][01].npy", ("0x10", "1_0.npy", "[ab][01].npy")),
        ("data.paths", "it's.npy,'a,b.npy'", ("it's.npy", "a,b.npy")),
        ("data.paths", "x[0,1].npy", ("x[0,1].npy",)),
        ("compute.xla_flags", "xla_a=true,xla_b=1", ("xla_a=true", "xla_b=1")),
        ("train.duration", "1e3", 1000),
        ("train.duration", "1_000", 1000),
        ("train.duration", "9007199254740993", 2**53 + 1),
        ("optim.lr", "1", 1.0),
        ("train.summary", "True", True),
        ("train.skip_steps", "[[1,2],[3,4]]", ((1, 2), (3, 4))),
        ("train.skip_steps", "((1,2),)", ((1, 2),)),
        ("train.skip_steps", "none", ()),
        ("profile.steps", "(10, 13)", (10, 13)),
        ("checkpoint.fixed_steps", "", ()),
        (
            "optim.schedule.stages",
            "[{'duration': 9, 'end': 1}, {'duration': 1e1}]",
            (config.StageConfig(9), config.StageConfig(10)),
        ),
    ],
)
def test_typed_text_is_read_as_what_the_option_is(option, text, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python's about 30inplace.npy
        settings = config.load(str(runs.CONFIG), {option: text})
    assert value_of(settings, option) == value
    assert type(value_of(settings, option)) is type(value)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.lr=true", "config.optim.lr: found 'true', need float"),
        ("optim.lr=none", "config.optim.lr: found 'none', need float"),
        ("optim.lr=nan", "config.optim.lr: found nan, need a finite number"),
        ("train.duration=1.5", "config.train.duration: found 1.5, need int"),
        ("train.summary=1", "config.train.summary: found '1', need bool"),
        ("train.skip_steps=9", "config.train.skip_steps[0]: found '9', need a list of tuple[int"),
        ("model=3", "config.model: expected a group of options, found '3'"),
        ("model.d_model={}", "config.model.d_model: found '{}', need int"),
        ("name=", "config.name='': need a plain name of at most 128 bytes, no path"),
        ("name=..", "config.name='..': need a plain name"),
        ("name=~", "config.name='~': need a plain name"),
        ("name=../other", "config.name='../other': need a plain name"),
        ("log.wandb_project=a/b", "config.log.wandb_project='a/b': need a plain name"),
        ("dir=", "config.dir='': need a path, or none"),
        ("checkpoint.load_path=", "config.checkpoint.load_path='': need a path, or none"),
        ("data.corpus_dir= ", "config.data.corpus_dir=' ': need a path"),
        ("compute.xla_flags=xla_dump_to=~/d", "config.compute.xla_flags: found 'xla_dump_to=~/d'"),
    ],
)
def test_text_that_is_no_such_thing_is_refused(word, line):
    (found,) = refused(word)
    assert found.startswith(line)


def test_a_config_file_may_name_a_run_by_a_whole_number_only(tmp_path):
    path = tmp_path / "mine.py"
    for value, line in ((2024, None), (1.10, "found 1.1, need str"), (True, "found True, need")):
        path.write_text(f"def get_config():\n    return {{'name': {value}}}\n")
        if line is None:
            assert config.load(str(path)).name == "2024"
        else:
            with pytest.raises(config.ConfigError, match=f"^config.name: {line}"):
                config.load(str(path))


# --- paths ----------------------------------------------------------------------------------------


def hints_of(group: Any = config.Config, path: str = "") -> dict[str, Any]:
    """The hints of all options by name."""
    found: dict[str, Any] = {}
    for name, hint in typed.hints(group).items():
        is_group = dataclasses.is_dataclass(hint)
        found |= hints_of(hint, f"{path}{name}.") if is_group else {path + name: hint}
    return found


def test_every_option_that_is_a_path_starts_at_home(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "mine.py").write_text(runs.CONFIG.read_text())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    names = [name for name, hint in hints_of().items() if "Location(" in str(hint)]
    assert {name.split(".")[-1] for name in names} == {
        "dir", "paths", "root", "corpus_dir", "tokenizer", "load_path",
    }  # fmt: skip
    words = [f"{name}=~/{name}" for name in names]
    settings = train.configure(["--config=~/mine.py", *runs.flags(*words)])[1]
    for name in names:
        value = value_of(settings, name)
        whole = str(home / name)
        assert value == ((whole,) if isinstance(value, tuple) else whole)
    lists = configured("data.paths=~/a.npy,b.npy").data.paths
    assert lists == (str(home / "a.npy"), "b.npy")

    with processes.only_writer(settings.run_dir):
        assert (home / "dir" / ".lock").exists()
    (home / "ours").mkdir()
    assert files.path("~/ours") == files.path(home / "ours")
    with pytest.raises(FileNotFoundError, match=f"^{home}/ours/metrics.jsonl: no such file"):
        plot.draw(["~/ours"], "~/picture.png")
    with pytest.raises(ValueError, match="is no checkpoint that is known"):
        open_weights("~/ours")
    assert list(here.iterdir()) == []


def test_without_a_home_folder_a_path_there_is_refused_and_the_cache_is_not_kept(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    monkeypatch.chdir(tmp_path)
    need = "there is no home folder of ~; write the whole path"
    assert refused("dir=~/r", "data.root=~") == [
        f"config.dir='~/r': {need}, or none",
        f"config.data.root='~': {need}",
    ]
    assert refused("--config=~/x.py") == [f"--config=~/x.py: {need}"]
    with pytest.raises(ValueError, match=f"^~/x: {need}"):
        files.path("~/x")
    program.keep_compiled(configured().compute.compilation_cache)
    assert capsys.readouterr().out.startswith("compute.compilation_cache: cannot write ~/.cache/")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert plan.main([f"--config={runs.CONFIG}", "--topology=v5p:4x4x8"]) == 2
    assert capsys.readouterr().err == f"error: --cache='~/.cache/olmo_jax/plans': {need}\n"
    assert list(tmp_path.iterdir()) == []


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "need"),
    [
        ("optim.eps=1e-300", "0 or a size from 1e-37 to 3e+38, for float32"),
        ("optim.lr=1e39", "0 or a size from 1e-37 to 3e+38, for float32"),
        ("optim.lr=1e-46", "0 or a size from 1e-37 to 3e+38, for float32"),
        ("optim.lr=-1e-3", "a number from 0.0 to 3e+38"),
        ("optim.beta1=0.99999999999", "a number from 0.0 to 0.9999999"),
        ("optim.beta2=1", "a number from 0.0 to 0.9999999"),
        ("optim.schedule.alpha_f=1e39", "0 or a size from 1e-37 to 3e+38, for float32"),
        ("optim.schedule.power=0.5", "a number from -100.0 to 0.0"),
        ("model.rope_theta=1e-46", "0 or a size from 1e-37 to 3e+38, for float32"),
        ("model.rope_theta=1e-30", "a number from 2.0 to 3e+38"),
        ("model.norm_eps=0", "a number from 1e-37 to 3e+38"),
        ("model.embed_init_std=-0.02", "a number from 0.0 to 3e+38, or none"),
        ("model.head_init_std=-0.02", "a number from 0.0 to 3e+38, or none"),
        ("model.post_norm_init=-1", "a number from 0.0 to 3e+38"),
        ("model.n_experts=-8", "a number from 0 to 2147483647"),
        ("model.n_layers=1e9", "a number from 1 to 100000"),
        ("data.filter_max_period=1e9", "a number from 1 to 1000000"),
        ("compute.compilation_cache=", "a path, or none"),
        ("model.window=1e30", "a number from 1 to 2147483647, or none"),
        ("data.seq_len=1", "a number from 2 to 2147483647"),
        ("data.corpus_vocab_size=1", "a number from 257 to 2147483647"),
        ("data.n_threads=1e6", "a number from 1 to 1024"),
        ("optim.skip_window=1e10", "a number from 1 to 1000000"),
        ("train.duration=1e30", "a number from 1 to 9223372036854775807"),
        ("train.seed=-1", "a number from 0 to 4294967295"),
        ("eval.seq_len=1", "a number from 2 to 2147483647, or none"),
        ("checkpoint.fixed_steps=3,-1", "a number from 0 to 2147483647"),
        ("log.device_peak_flops=-1", "a number from 1e-37 to 3e+38, or none"),
        ("optim.schedule.period_peaks=1,-2", "a number from 1e-37 to 3e+38"),
    ],
)
def test_numbers_that_the_option_cannot_be_are_refused_by_name(word, need):
    lines = refused(word)
    name = word.split("=")[0]
    assert lines[0].startswith(f"config.{name}")
    assert lines[0].endswith(f": need {need}")
    assert all(name in line for line in lines)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "data.instance_filter=true data.filter_max_period=65",
            "config.data.filter_max_period=65 is above seq_len=64",
        ),
        ("eval.batch_rows=1e9", "config.eval.batch_rows=1000000000 rows of seq_len=64 are more"),
        ("eval.seq_len=1e9", "config.eval.batch_rows=16 rows of seq_len=1000000000 are more"),
        ("train.duration=1e10", "config.train.duration=10000000000 steps is more than 2147483647"),
        (
            "train.hard_stop=9e18 train.hard_stop_unit=tokens",
            "config.train.hard_stop=9000000000000000000 tokens is more than 2147483647 steps",
        ),
        (
            "model.d_model=2e9 model.d_ff=2e9 model.n_layers=100",
            "config.model: d_model=2000000000, d_ff=2000000000, n_layers=100 and the other sizes",
        ),
        (
            "optim.lr=1e20 optim.schedule.alpha_f=1e20",
            "config.optim.schedule.name=cos_with_warmup: reaches a rate of 1e+40",
        ),
        (
            "mesh.fsdp=1e10",
            "config.mesh.fsdp=10000000000: need -1, or a number from 1 to 214748364",
        ),
    ],
)
def test_numbers_that_are_too_much_together_are_refused(words, line):
    (found,) = refused(*words.split())
    assert found.startswith(line)


def test_the_largest_momentum_is_less_than_1_in_fp32():
    largest = 0.9999999
    configured(f"optim.beta1={largest}", "optim.lr=0", "optim.schedule.alpha_f=0")
    assert np.float32(largest) < 1.0 == np.float32(0.99999999)


def test_a_config_that_python_made_is_checked_too():
    c = configured()
    for part, change in (("optim", {"eps": float("nan")}), ("model", {"n_layers": 0})):
        wrong = dataclasses.replace(c, **{part: dataclasses.replace(getattr(c, part), **change)})
        with pytest.raises(config.ConfigError, match=f"^config.{part}.{next(iter(change))}="):
            validate(wrong, 1)


# --- what nobody expects --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dir=http://x"], "config.dir='http://x': need a local path or gs://BUCKET/…, or none"),
        (["dir=gs:///x"], "config.dir='gs:///x': need a local path or gs://BUCKET/…, or none"),
        (["data.corpus_dir=gs://b/x"], "config.data.corpus_dir='gs://b/x': need a local path"),
        (["data.tokenizer=s3://b/x"], "config.data.tokenizer='s3://b/x': need a local path, or"),
        (["dir=" + "-" * 3000], f"config.dir='{'-' * 79} … {'-' * 19}': need a path of at most 4,"),
        (["name=" + "-" * 3000], f"config.name='{'-' * 79} … {'-' * 19}': need a plain name"),
        (["train.duration=" + "-" * 3000], f"config.train.duration: found '{'-' * 79} … "),
        (["train.duration=" + "9" * 5000], "config.train.duration: found inf, need int"),
        (["optim.schedule.stages={" + "-" * 3000], "config.optim.schedule.stages[0]: expected"),
        (["dir=a\0b"], r"config.dir='a\x00b': need a path without control characters, or none"),
        (["dir=a\nb"], r"config.dir='a\nb': need a path without control characters, or none"),
        (["model.d_model={'a': 1}"], """config.model.d_model: found "{'a': 1}", need int"""),
        (["a\nb=1"], r"config.a\nb: unknown option; known: name, dir"),
        (["--a\nb=1"], r"--a\nb=1: there is no such flag"),
        (["--" + "-" * 3000], f"{'-' * 80} … {'-' * 20}: there is no such flag"),
        (["--n_devices=" + "9" * 5000], "--n_devices: found inf, need int"),
        (["--n_devices=0"], "--n_devices=0: need a number from 1 to 2147483647"),
        (["--config=a\0b"], r"--config=a\x00b: no such file"),
        (["--config=" + "-" * 3000], f"--config={'-' * 80} … {'-' * 20}: no such file"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0][:24],
)
def test_a_value_that_nobody_expects_is_one_short_line(words, line):
    began = time.perf_counter()
    (found,) = refused(*words)
    assert found.startswith(line)
    assert len(found) < 500
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return {5: 1, 'name': 'a'}", "TypeError: a key of the options is no text"),
        ("c.model[5] = 1\n    return c", "TypeError: a key of the options is no text"),
        ("c[5] = 1\n    return c", "TypeError: a key of the options is no text"),
        ("sys.exit()", "line 4: SystemExit"),
        ("sys.exit(0)", "line 4: SystemExit: 0"),
        ("return get_config()", "line 4: RecursionError: maximum recursion depth exceeded"),
        ("raise BaseException('no\\nway')", "line 4: BaseException: no way"),
        ("c.model.d_model = {}\n    return c", "config.model.d_model: found {}, need int"),
        ("c.model = None\n    return c", "config.model: expected a group of options, found None"),
        ("c.name = object()\n    return c", "config.name: found <object object at"),
        ("c.optim.lr = 10**999\n    return c", "line 4: OverflowError: int too large to convert"),
        ("c.train.seed = 10**5000\n    return c", "config.train.seed=a int that cannot be shown"),
        ("c.data.paths = 'x.npy'\n    return c", "config.data.paths: found 'x.npy', need a list"),
        ("return [c]", "config: expected a group of options, found [checkpoint: allow_changes: []"),
    ],
)  # fmt: skip
def test_a_config_file_that_nobody_expects_is_one_line(tmp_path, body, line):
    path = tmp_path / "mine.py"
    head = "import sys\nfrom olmo_jax import config\ndef get_config(c=config.default()):\n    "
    path.write_text(f"{head}{body}\n")
    result = runs.run(f"--config={path}", "--dry_run")
    assert result.code == 2
    found = [error for error in result.errors if "data.paths: no token files" not in error]
    assert len(found) == 1, result.errors
    assert found[0].startswith(line if line.startswith("config") else f"--config={path}: {line}")
    assert len(found[0]) < 500


def test_a_reference_in_a_config_file_follows_an_override(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from olmo_jax import config\ndef get_config():\n    c = config.default()\n"
        "    c.model.n_kv_heads = c.model.get_ref('n_heads')\n    return c\n"
    )
    assert config.load(str(path), {"model.n_heads": "6"}).model.n_kv_heads == 6


# --- a fuzzer -------------------------------------------------------------------------------------

ODD = [
    "none", "", " ", "a", "a,b", "[]", "()", "{}", "{'a':1}", "{1,2}", "[{'duration':1}]", "[1,2",
    "((1,2),)", "[[[1]]]", "[None]", "30inplace.npy", "2024_11", "~", "~/x", "~nobody/x", "..", "/",
    "a/../b", "http://x", "gs://b/x", "gs:/", "-" * 3000, "(" * 3000, "[" * 3000, "{" * 3000,
    "\0", "\n", "é", "日本", "\udcff", "'", '"', "\\", "*", "embed*", "b'x'", "...", "lambda: 1",
    "xla_a=1", "optim.lr", "wsds", "nan", "-inf", "9" * 5000, "0x10", "1j", "true", "0.5,2",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3", "8", "64", "512", "1e5", "1e9", "10000000000", "2147483647", "1e18", "1e30",
    "1e39", "1e309", "-1", "-1e-3", "1e-46", "1e-300", "0.5", "1.10", "-0.0", "9" * 400, "1_000",
]  # fmt: skip


def odd_text(rng: random.Random, hint: Any) -> str:
    """Text for an option: of its kind more often than not, but odd."""
    args = [a for h in (hint, *typing.get_args(hint)) for a in typing.get_args(h)]
    words = [a for a in args if isinstance(a, str)] or ["true", "false"] * (hint is bool)
    if rng.random() < 0.3 or (not {int, float, bool} & {hint, *args} and not words):
        return rng.choice(ODD)
    n = rng.choice((1, 1, 2, 3)) if "tuple" in str(hint) else 1
    return ",".join(rng.choice(words or NUMBERS) for _ in range(n))


def odd_pairs(seed: int, n: int) -> list[list[str]]:
    """Arguments of `n` dry runs, each with two odd options; every option comes as often."""
    rng, hints = random.Random(seed), hints_of()
    first = [*hints] * -(-n // len(hints))
    pairs = [(name, rng.choice([*hints])) for name in first[:n]]
    return [[f"--config.{name}={odd_text(rng, hints[name])}" for name in pair] for pair in pairs]


def test_two_thousand_pairs_of_odd_options_are_accepted_or_refused_in_words():
    longest, codes = 0.0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in odd_pairs(seed=0, n=2000):
            began = time.process_time()
            result = runs.run(*PLAIN, *arguments, "--dry_run")
            longest = max(longest, time.process_time() - began)
            codes.add(result.code)
            assert result.code == (2 if result.errors else 0), arguments
            assert all(1 < len(line) < 1000 and line.isprintable() for line in result.errors)
    assert codes == {0, 2}
    assert longest < 5


@pytest.mark.by_hand  # 30 starts of Python; those above are the same in one process
def test_thirty_pairs_of_odd_options_end_as_commands(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "HOME": str(tmp_path)}
    words = [a for a in odd_pairs(seed=1, n=60) if not any("\0" in word for word in a)][:30]
    assert len(words) == 30
    command = [sys.executable, "-m", "olmo_jax.train", *PLAIN, "--dry_run"]
    for arguments in words:
        ended = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, timeout=60
        )
        lines = ended.stderr.decode().splitlines()
        assert ended.returncode == (2 if lines else 0), (arguments, ended.stderr)
        assert all(line.startswith("error: ") for line in lines), ended.stderr
    assert list(tmp_path.iterdir()) == []
