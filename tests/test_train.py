"""The command line: help, dry runs, and one clear line for everything that is wrong."""

import errno
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache
from test_storage import full_disk, ordinary_user  # noqa: F401

from olmo_jax import files, train
from olmo_jax.checkpoints import layout, storage
from olmo_jax.records import jsonl
from olmo_jax.training import start
from olmo_jax.training.keeping import Keeper

CONFIGS = sorted((runs.ROOT / "configs").glob("*.py"))


@pytest.fixture
def open_folder(tokens) -> Iterator[pathlib.Path]:
    """A folder that other users may look into, with the tokens; pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o777)
        shutil.copy(tokens, folder)
        before = jax.config.jax_compilation_cache_dir  # it is closed to others too
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield folder
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def done(tokens, compiled, tmp_path_factory) -> pathlib.Path:
    """A run of 5 steps with checkpoints 0 and 5."""
    folder = tmp_path_factory.mktemp("done") / "run"
    options = f"data.paths={tokens} dir={folder} compute.compilation_cache={compiled}".split()
    assert runs.run(*options, "train.duration=5").code == 0
    return folder


# --- help -----------------------------------------------------------------------------------------


def test_help_is_given_to_who_asks_and_to_who_says_nothing(capsys):
    for arguments, code in ((["--help"], 0), (["-h"], 0), (["--config=x", "--help"], 0), ([], 2)):
        assert train.main(arguments) == code
        text = capsys.readouterr().out
        assert "--config.optim.lr" in text
        assert re.search(r"Exit codes: 0 .* 1 .* 2 .* 74 .* 75 ", text)


def test_help_and_errors_answer_before_jax_is_imported():
    code = "import sys\nfrom olmo_jax import train\ncode = train.main(sys.argv[1:])\n"
    code += "sys.exit(99 if 'jax' in sys.modules else code)"
    unknown = "error: --x=1: there is no such flag; see --help\n"
    for arguments, expected, said in (
        (["--help"], 0, ""),
        (["--config=x.py", "--x=1"], 2, unknown),
    ):
        command = [sys.executable, "-c", code, *arguments]
        ended = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == expected, ended.stderr
        assert ended.stderr.startswith(said)


# --- what is wrong with a command line ------------------------------------------------------------


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    wrong = {
        "--cofnig=x": "--cofnig=x: there is no such flag; did you mean --config?",
        "--dry-run": "--dry-run: there is no such flag; did you mean --dry_run?",
        "--lr=1": "--lr=1: there is no such flag; did you mean --config.optim.lr?",
        "--config.data.paths": "--config.data.paths: needs a value",
        "--config.checkpoint.allow_changes=model.rope_thta": "no option model.rope_thta",
        "--config.checkpoint.fixed_steps=-5,": "checkpoint.fixed_steps[0]=-5: need a number from 0",
        "--debug=maybe": "--debug=maybe: it takes no value",
        "--n_devices=many": "--n_devices: found 'many', need int",
        "--process_id=1": "--coordinator and --n_processes missing",
        "--config.optim.learning_rate=1": "learning_rate: unknown option; known: name, options, lr",
        "--config.data.prefech=1": "config.data.prefech: unknown option; did you mean prefetch?",
        "--config.model.d_model=wide": "config.model.d_model: found 'wide', need int",
        "--config.train.duration=1.5": "config.train.duration: found 1.5, need int",
        "--config.optim.schedule.name=cosine": "schedule.name: found 'cosine', need one of",
        "--config.compute.accumulate=0": "config.compute.accumulate=0: need a number from 1 to",
        "--config.model.n_kv_heads=3": "config.model.n_heads=4 is no multiple of n_kv_heads=3",
        "--config.data.global_batch_size=500": "config.data.global_batch_size=500",
        "--config.mesh.data=-1": "config.mesh: only one axis can be -1, found data, fsdp",
        "--config.optim.no_decay=embedding": "no_decay: 'embedding' matches no parameter",
        "--config.train.skip_steps=((5,5),)": "config.train.skip_steps: [5, 5) is empty",
    }  # fmt: skip
    result = runs.run(f"dir={tmp_path / 'run'}", *wrong)
    assert result.code == 2
    for fragment in wrong.values():
        found = [line for line in result.errors if fragment in line]
        assert len(found) == 1, (fragment, result.errors)
    assert len(result.errors) == len(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.d_model=60", r"config\.model\.d_model=60 is not divisible by mesh\.fsdp=8; use 1"),
        ("model.head_dim=15", "config.model.head_dim=15: rotary embedding needs an even one"),
        ("model.layer_types=full,sliding,full", "layer_types: 3 entries .* n_layers=2"),
        ("model.layer_types=full,sliding", "config.model.window=None: sliding layers need"),
        ("data.seq_len=128", "config.data.seq_len=128 is above model.max_seq_len=64"),
        ("data.global_batch_size=500", "global_batch_size=500 tokens is no multiple of seq_len=64"),
        ("data.global_batch_size=640", "=640 tokens is 10 rows .* x expert = 8"),
        ("compute.accumulate=2", "8 rows .* = 8 times compute.accumulate=2"),
        ("mesh.fsdp=4", r"config\.mesh: fsdp 4 needs 4 devices, found 8"),
        ("mesh.context=16", r"config\.mesh: context 16 needs a multiple of 16 devices, found 8"),
        ("mesh.tensor=4", r"n_kv_heads=2 is not divisible by mesh\.tensor=4; use 1 or 2"),
        ("mesh.tensor=8", r"n_heads=4 is not divisible by mesh\.tensor=8; .*\n.*kv_heads=2 .*=8"),
        ("mesh.tensor=2 model.vocab_size=511", "padded_vocab_size=512"),
        ("data.eos_id=512", "config.data.eos_id=512 is outside model.vocab_size=512"),
        ("data.eos_id=none data.document_mask=eos", "document_mask='eos' needs it"),
        ("data.paths=()", "config.data.paths: no token files"),
        ("optim.schedule.warmup=21", "schedule.warmup=21: longer than the schedule, 20 steps"),
    ],
)  # P29
def test_a_dry_run_and_the_run_give_the_same_verdict(place, tmp_path, options, message):
    mesh = [] if "mesh." in options else ["mesh.fsdp=8"]
    verdicts = [runs.run(*place, *mesh, *options.split(), *dry)
                for dry in ((), ("--dry_run", "--n_devices=8"))]  # fmt: skip
    assert [v.code for v in verdicts] == [2, 2]
    assert verdicts[0].err == verdicts[1].err
    assert re.search(message, "\n".join(verdicts[0].errors))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("impl", "needed"), [("pallas", "a TPU or a Hopper GPU"), ("cudnn", "an NVIDIA GPU")]
)
def test_an_attention_that_is_not_for_this_device_is_refused_at_start(impl, needed, bare, tmp_path):
    result = runs.run(*bare, f"compute.attention={impl}")
    (line,) = result.errors
    assert result.code == 2
    assert line.startswith(f"config.compute.attention={impl}: {needed} is needed, this is cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "the file defines no get_config()"),
        ("def get_config(", r"line 1: SyntaxError: '\(' was never closed"),
        ("import nothing_like_it", "line 1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    pass", "config: expected a group of options, found None"),
        (
            "from olmo_jax import config\ndef get_config():\n    c = config.default()\n"
            "    c.modle.d_model = 3\n    return c\n",
            """line 4: AttributeError: .*Did you mean "model" """.strip(),
        ),
        (
            "from olmo_jax import config\ndef get_config():\n    c = config.default()\n"
            "    c.model.n_head = 3\n    return c\n",
            "config.model.n_head: unknown option; did you mean n_heads?",
        ),
    ],
)
def test_a_config_file_that_is_wrong_is_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    result = runs.run(f"--config={path}", "data.paths=x.npy")
    assert result.code == 2
    assert re.search(message, result.errors[0])
    if "Error" in message or text is None:
        assert result.errors[0].startswith(f"--config={path}: ")
        assert len(result.errors) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--coordinator=a:1", "--n_processes and --process_id missing"),
        ("--coordinator=a --n_processes=2 --process_id=1", "--coordinator=a: need host:port"),
        ("--coordinator=a:1 --n_processes=2 --process_id=2", "=2 is not below --n_processes=2"),
        (
            "--coordinator=a:1 --n_processes=2 --process_id=-1",
            "=-1: need a number from 0 to 2147483647",
        ),
        ("--connect_timeout=soon", "--connect_timeout: found 'soon', need int"),
        ("--config.name", "--config.name: needs a value, as in --config.name=…"),
    ],
)
def test_flags_that_make_no_sense_are_named(arguments, message):
    result = runs.run(*arguments.split())
    assert result.code == 2
    assert any(message in line for line in result.errors)


def test_debug_shows_where_an_error_arose(place):
    result = runs.run(*place, "mesh.tensor=8", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "in validate" in result.err


# --- dry runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_dry_run(path, tmp_path):
    asked = re.search(r"(\d+) (?:chips|devices?)\b", path.read_text())
    n_devices = asked[1] if asked else "1"
    result = runs.run(f"--config={path}", "--dry_run", f"--n_devices={n_devices}",
                      f"dir={tmp_path / 'run'}")  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert f"mesh              {n_devices} devices: data" in result.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_32b_tells_its_figures_from_shapes_alone():
    config = runs.ROOT / "configs" / "olmo2_32b.py"
    out = runs.run(f"--config={config}", "--dry_run", "--n_devices=256").out

    d, heads, kv_heads, h, ff, layers, vocab, seq = 5120, 40, 8, 128, 27648, 64, 100_352, 4096
    attention = 2 * d * heads * h + 2 * d * kv_heads * h + heads * h + kv_heads * h
    core = layers * (attention + 3 * d * ff + 2 * d) + d
    assert f"parameters        {core + 2 * vocab * d:,} ({core + vocab * d:,} non-emb" in out
    assert core + 2 * vocab * d == 32_234_279_936
    matmuls = layers * (attention + 3 * d * ff) + vocab * d + d  # the final norm is the head's
    flops = 6 * matmuls + layers * 12 * heads * h * (seq + 1) / 2
    assert f"FLOPs per token   {flops:.6e} at 4,096 tokens" in out
    assert "mesh              256 devices: data 1 x fsdp 256 x expert 1 x context 1 x tens" in out
    assert "8,388,608 tokens = 2,048 rows of 4,096, 1 micro-batch(es) of 8 row(s)" in out
    norms = (layers * (heads * h + kv_heads * h + 2 * d) + d) * 4  # whole on every device
    own = ((core + 2 * vocab * d) * 4 - norms) / 256 + norms
    params, moments = f"parameters {own / 2**30:.2f}", f"moments {2 * own / 2**30:.2f}"
    gradients = f"gradients {own / 2**30:.2f}"
    assert f"{4 * own / 2**30:.2f} GiB: {params}, {moments}, {gradients}; activations" in out
    assert f"checkpoint        {(core + 2 * vocab * d) * 12 / 2**30:.2f} GiB each" in out
    assert f"no weight decay, {vocab * d:,} parameters: embed\n" in out
    assert "config.optim.freeze_adam_step = True" in out


def test_a_dry_run_counts_the_devices_of_its_mesh_where_none_are_named():
    out = runs.run("--dry_run", "mesh.tensor=2", "mesh.context=2").out
    assert "4 devices: data 1 x fsdp 1 x expert 1 x context 2 x tensor 2" in out


# --- bad input ------------------------------------------------------------------------------------


def bad_file(folder: pathlib.Path, kind: str) -> pathlib.Path:
    path = folder / f"{kind}.npy"
    ids = np.arange(9000) % 500 + 1
    if kind == "empty":
        path.touch()
    elif kind == "torn":
        path.write_bytes(ids.astype("<u2").tobytes()[:-1])
    elif kind == "wide":
        ids.astype("<u4").tofile(path)
    elif kind == "foreign":
        (ids + 100).astype("<u2").tofile(path)
    elif kind == "short":
        ids[: 7 * 64].astype("<u2").tofile(path)
    elif kind == "header":
        with path.open("wb") as file:
            np.save(file, ids.astype("<u2"))
    elif kind == "plain":
        ids.astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("missing", "", "config.data.paths: no such token file: {path}"),
        ("empty", "", "config.data.paths: {path} is empty"),
        ("torn", "", "config.data.paths: {path} has 17999 bytes, no multiple of the 2 of uint16"),
        ("header", "", "config.data.paths: {path} has a NumPy header"),
        ("wide", "", "in {path} every second id is 0; need another config.data.dtype?"),
        ("plain", "data.dtype=uint32", "{path} has id 131073 at token 0, need ids below .*=512"),
        ("foreign", "", "{path} has id 512 at token 411, need ids below .*vocab_size=512"),
        ("short", "", "config.data.global_batch_size=512 tokens needs 8 rows .*, found 7"),
        ("plain", "data.document_mask=eos", "config.data.eos_id=0 never occurs in the 9000 tokens"),
        ("plain", "data.document_mask=boundaries", "plain.csv.gz"),
        ("plain", "eval.paths={folder}/none.npy", "config.eval.paths: no such token file"),
        ("plain", "data.tokenizer={folder}/t.json", "config.data.tokenizer.*t.json"),
        (
            "plain",
            "checkpoint.load_path={folder}/none",
            "checkpoint.load_path: .*none does not exi",
        ),
        ("plain", "checkpoint.load_path={folder}", "load_path: no complete checkpoint in {folder}"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    place, tmp_path, kind, options, message
):
    path = bad_file(tmp_path, kind)
    before = runs.contents(tmp_path)
    names = {"path": path, "folder": tmp_path}
    result = runs.run(*place, f"data.paths={path}", *options.format(**names).split())
    assert result.code == 1
    assert len(result.errors) == 1, result.errors
    assert re.search(message.format(**names), result.errors[0])
    assert runs.contents(tmp_path) == before


def test_ids_that_the_look_at_start_misses_are_told_in_training_and_nothing_is_lost(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr("olmo_jax.data.checks.check", lambda *_, **__: None)
    path = runs.write_tokens(tmp_path / "late.npy", 4000)
    ids = np.fromfile(path, "<u2")
    ids[3300] = 60_000
    ids.tofile(path)
    result = runs.run(*place, f"data.paths={path}", "train.duration=100")
    assert result.code == 1
    (line,) = result.errors
    assert f"{path} has id 60000 at token 3300, need ids below config.model.vocab_size=512" in line
    last = max(jsonl.read(tmp_path / "run"))
    assert f"; step {last} is saved" in line
    assert layout.is_complete(files.path(tmp_path / f"run/checkpoints/step{last}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.d_model=32", "config.model.d_model=32, but the checkpoint was trained with 64"),
        ("model.n_layers=4", "config.model.n_layers=4, but .* 2"),
        ("model.tie_embeddings=true", "config.model.tie_embeddings=True, but .* False"),
        (
            "optim.name=skip_step_adamw",
            "config.optim.name='skip_step_adamw', but .*load_optimizer=False",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(place, done, tmp_path, options, message):
    result = runs.run(*place, f"checkpoint.load_path={done}", *options.split())
    assert result.code == 1
    assert re.search(message, result.errors[0])
    assert not (tmp_path / "run").exists()
    # as the run's own checkpoint too
    before = runs.contents(done)
    result = runs.run(*place, f"dir={done}", *options.split(), "train.duration=20")
    assert result.code == 1
    assert re.search(message.split(".*load_opt")[0], result.errors[0])
    assert runs.contents(done) == before


def test_a_flipped_byte_is_refused_by_name_and_nothing_is_overwritten(place, done, tmp_path):
    subprocess.run(["cp", "-r", done, tmp_path / "run"], check=True)
    newest = tmp_path / "run/checkpoints/step5"
    chunk = max((newest / "params.layers.mlp.w_up").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    before = runs.contents(tmp_path)
    result = runs.run(*place, "train.duration=20")
    assert result.code == 1
    (line,) = result.errors
    assert f"{newest}: leaf params/layers/mlp/w_up is damaged" in line
    assert runs.contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["under a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(open_folder, kind):
    parent = open_folder / "parent"
    if kind == "read-only":
        parent.mkdir(mode=0o555)
    else:
        parent.touch()
    with ordinary_user():
        result = runs.run(f"data.paths={open_folder}/tokens.npy", f"dir={parent}/run",
                          "compute.compilation_cache=none")  # fmt: skip
    assert result.code == 1
    (line,) = result.errors
    assert re.match(rf"config.dir: cannot write {parent}/run: ", line)


def test_a_compilation_cache_that_cannot_be_written_ends_no_run(place, tmp_path):
    (tmp_path / "file").touch()
    cache = f"compute.compilation_cache={tmp_path}/file/cache"
    result = runs.run(*place, cache, "train.duration=2", "checkpoint.step0=false")
    assert (result.code, result.err) == (0, "")
    assert f"compute.compilation_cache: cannot write {tmp_path}/file/cache" in result.out


@pytest.mark.parametrize("masked", [[3], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_rows_without_loss_harm_no_device(place, tmp_path, masked):  # P02
    rows = np.random.default_rng(0).integers(1, 512, (8, 64))
    rows[masked] = 7  # one row a device; the filter takes a token that stands 32 times in a row
    rows.astype("<u2").tofile(tmp_path / "rows.npy")
    result = runs.run(*place, f"data.paths={tmp_path}/rows.npy", "data.instance_filter=true",
                      "train.duration=3")  # fmt: skip
    assert result.code == 0
    found = jsonl.read(tmp_path / "run")
    for step in (1, 2, 3):
        assert found[step]["train/masked instances (%)"] == len(masked) / 8
        assert np.isfinite(found[step]["optim/total grad norm"])
    losses = [found[step].get("train/CE loss") for step in (1, 2, 3)]
    folders = [tmp_path / f"run/checkpoints/step{n}" for n in (0, 3)]
    before, after = (runs.arrays(folder, ("params", "opt_state")) for folder in folders)
    if len(masked) == 8:
        assert losses == [None, None, None]
        assert "step 1/3 | batch skipped" in result.out
        assert before == after
    else:
        assert losses[0] == pytest.approx(np.log(512), abs=0.1)
        assert losses == sorted(losses, reverse=True)
        assert before.keys() == after.keys()
        assert before != after


# --- saves that fail ------------------------------------------------------------------------------


def fail_writes_after(monkeypatch, step: int, number: int) -> None:
    write = storage.ArrayWriter.write

    def failing(self, *args):
        if int(self.folder.name.removeprefix("step")) > step:
            raise OSError(number, os.strerror(number))
        write(self, *args)

    monkeypatch.setattr(storage.ArrayWriter, "write", failing)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_at_the_next_save(place, tmp_path, monkeypatch):  # P15
    fail_writes_after(monkeypatch, 5, errno.ENOSPC)
    options = ["checkpoint.interval=5", "train.duration=60"]
    result = runs.run(*place, *options)
    assert result.code == 1
    (line,) = result.errors
    assert "checkpoints/step10 was not saved" in line
    assert "No space left on device" in line
    folder = tmp_path / "run"
    assert max(jsonl.read(folder)) <= 15
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step0", "step5"]
    monkeypatch.undo()
    again = runs.run(*place, *options, "train.hard_stop=6")
    assert again.code == 0
    assert "resuming after step 5" in again.out
    assert sorted(jsonl.read(folder)) == [*range(7)]


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_ends_the_run_at_the_next_save(
    open_folder, monkeypatch
):  # P15
    folder, finish = open_folder / "run", start.Checkpointer.finish

    def closing(self):
        finish(self)
        if self.latest() == 5:
            os.chmod(folder / "checkpoints", 0o555)

    monkeypatch.setattr(start.Checkpointer, "finish", closing)
    place = [f"data.paths={open_folder}/tokens.npy", f"dir={folder}",
             "compute.compilation_cache=none"]  # fmt: skip
    with ordinary_user():
        result = runs.run(*place, "checkpoint.interval=5", "train.duration=60")
        os.chmod(folder / "checkpoints", 0o755)
    assert result.code == 1
    (line,) = result.errors
    assert "checkpoints/step10 was not saved" in line
    assert "Permission denied" in line
    assert max(jsonl.read(folder)) <= 15
    assert "done already: step 5 of 5" in runs.run(*place, "train.duration=5").out


def test_a_disk_that_is_full_at_the_second_save_loses_nothing(
    place,
    full_disk,  # noqa: F811
):  # P13
    def remount(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", full_disk], check=True)

    remount("5m")  # room for one checkpoint, and most of a second
    options = [*place, f"dir={full_disk}/run", "checkpoint.interval=4", "train.duration=8",
               "checkpoint.keep=1", "checkpoint.step0=false"]  # fmt: skip
    checkpoints = full_disk / "run" / "checkpoints"
    for begin in ("new run", "resuming after step 4"):
        result = runs.run(*options)
        assert result.code == 1
        assert begin in result.out
        (line,) = result.errors
        assert "No space left on device" in line
        complete = [p.name for p in checkpoints.iterdir() if layout.is_complete(files.path(p))]
        assert complete == ["step4"]
    remount("40m")
    assert runs.run(*options).code == 0
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step4", "step8"]


def test_a_foreign_folder_with_the_name_of_a_checkpoint_refuses_the_run_and_stays(bare, tmp_path):
    foreign = tmp_path / "run/checkpoints/step100"
    (foreign / "model_and_optim").mkdir(parents=True)
    result = runs.run(*bare, "train.duration=3")
    assert result.code == 1
    assert result.errors == [
        f"config.dir: {foreign} is not written by olmo_jax and has the name of a checkpoint of this"
        " run; move it away, or set another config.dir"
    ]
    written = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert written == {"checkpoints"}
    assert [path.name for path in tmp_path.glob("run/*/**/*")] == ["step100", "model_and_optim"]


def test_the_config_of_others_is_not_overwritten(bare, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"model_type": "olmo2"}')
    result = runs.run(*bare, "train.duration=3")
    assert (result.code, result.errors) == (1, [
        f"config.dir: {tmp_path}/run/config.json is not the config of a run of olmo_jax and is not"
        " overwritten; set another config.dir"
    ])  # fmt: skip
    assert (tmp_path / "run/config.json").read_text() == '{"model_type": "olmo2"}'


def test_after_a_failed_save_what_was_trained_since_is_saved(bare, tmp_path, monkeypatch):
    commit = storage.ArrayWriter.commit

    def failing(self, *args, **options):
        if self.folder.name == "step2":
            raise OSError("away for a while")
        commit(self, *args, **options)

    monkeypatch.setattr(storage.ArrayWriter, "commit", failing)
    result = runs.run(*bare, "train.duration=6", "checkpoint.interval=2")
    assert result.code == 1
    (line,) = result.errors
    assert line.startswith(f"checkpoint {tmp_path}/run/checkpoints/step2 was not saved: away for")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step4"]


def test_records_that_cannot_be_written_end_the_run_with_one_line(place, tmp_path, monkeypatch):
    log = jsonl.Jsonl.log

    def full(self, step, *args):
        if step > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, step, *args)

    monkeypatch.setattr(jsonl.Jsonl, "log", full)
    result = runs.run(*place)
    assert result.code == 1
    (line,) = result.errors
    assert "cannot write the records of the run: No space left on device" in line
    assert sorted(jsonl.read(tmp_path / "run")) == [0, 1, 2, 3]


def test_an_interrupt_at_start_is_no_traceback(place, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "resolve", interrupted)
    result = runs.run(*place)
    assert result.code == 130
    assert result.errors == ["interrupted; the same command goes on from the newest checkpoint"]


def test_a_device_without_room_is_no_traceback(place, monkeypatch):
    def train(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 549755813632 bytes.\nmore")

    monkeypatch.setattr(start, "train", train)
    result = runs.run(*place)
    (line,) = result.errors
    assert result.code == 1
    assert line.startswith("RESOURCE_EXHAUSTED: Out of memory allocating 549755813632 bytes.")
    assert line.endswith("; --dry_run says what the state takes, see compute.remat, compute."
                         "accumulate and mesh")  # fmt: skip


def test_losses_that_stay_infinite_end_the_run_with_the_step_and_the_option(place, tmp_path):
    result = runs.run(*place, "optim.lr=1e37", "train.max_nonfinite_steps=3")
    assert result.code == 1
    (line,) = result.errors
    at = int(re.match(r"step (\d+): loss (nan|inf), grad norm ", line)[1])
    assert "not finite for 3 steps in a row (config.train.max_nonfinite_steps)" in line
    assert line.endswith("None of them changed the parameters; step 0 is saved")
    losses = {n: values["train/CE loss"] for n, values in jsonl.read(tmp_path / "run").items() if n}
    assert [np.isfinite(losses[n]) for n in range(at - 3, at + 1)] == [True, False, False, False]


def test_a_step_without_tokens_is_neither_with_nor_without_a_finite_loss():
    checkpointer = types.SimpleNamespace(finite_step=6)
    keeper: Any = types.SimpleNamespace(nonfinite=2, last_finite=6, checkpointer=checkpointer)
    Keeper.judge(keeper, 9, None, math.nan)
    assert (keeper.nonfinite, keeper.last_finite, checkpointer.finite_step) == (2, 6, 6)
    Keeper.judge(keeper, 10, 1.0, 1.0)
    assert (keeper.nonfinite, keeper.last_finite, checkpointer.finite_step) == (0, 10, 10)
