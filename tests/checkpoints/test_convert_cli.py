"""`olmo_jax.convert` as users run it: results, exit codes, ends in the middle, the Hub."""

import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import made
import numpy as np
import pytest
import runs
import torch
import web
from hf import exported_logits, random_model
from test_hf import TOKENS, quiet, save, tensors

import olmo_jax
from olmo_jax import convert
from olmo_jax.checkpoints import conversion, storage
from olmo_jax.checkpoints.formats import native, safetensors
from olmo_jax.checkpoints.formats.open import open_weights
from olmo_jax.checkpoints.logits import logits
from olmo_jax.data import foreign


def run(*arguments) -> runs.Result:
    """Run the command line here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = convert.main([str(a) for a in arguments])
    return runs.Result(code, out.getvalue(), err.getvalue())


def start(*arguments, code: str = "", **environment) -> subprocess.Popen:
    """Run the command line in a process of its own, after some code."""
    text = f"from olmo_jax import cli\n{code}\ncli.run('convert')"
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- results and exit codes -----------------------------------------------------------------------


def test_there_and_back_says_what_it_found_and_checked(tmp_path):
    folder = save(tmp_path, "olmo3 yarn grouped")
    result = run("to_jax", folder, tmp_path / "ours")
    assert result.code == 0, result.err
    assert f"{folder}: Hugging Face Olmo3ForCausalLM, 47 tensors in 1 file" in result.out
    checked = "checked: names, shapes, dtypes and all numbers of 14 arrays; logits on 8 tokens"
    assert f"{checked} differ by 0 " in result.out
    result = run("to_hf", tmp_path / "ours", tmp_path / "back", "--max_shard_size=30KB")
    assert result.code == 0, result.err
    assert "olmo_jax checkpoint, 14 arrays" in result.out
    assert tensors(tmp_path / "back") == tensors(folder)
    assert run("check", folder, tmp_path / "back").code == 0
    assert result.err == ""


def test_check_names_the_largest_difference_and_where_it_is(tmp_path):
    folder = save(tmp_path, "olmo2 grouped")
    conversion.to_hf(str(folder), str(tmp_path / "bf16"), dtype="bfloat16", say=quiet)
    one, two = open_weights(str(folder)), open_weights(str(tmp_path / "bf16"))
    apart = {name: np.abs(one.read(name) - two.read(name).astype("f4")) for name in one.leaves}
    worst = max(apart, key=lambda name: apart[name].max())
    at = [int(i) for i in np.unravel_index(apart[worst].argmax(), apart[worst].shape)]
    result = run("check", folder, tmp_path / "bf16")
    assert result.code == 1
    assert f"largest difference {apart[worst].max():.3g} in {worst} at {at}" in result.out
    found = np.abs(logits(one, TOKENS) - logits(two, TOKENS)).max()
    assert "logits: largest difference" in result.out
    assert found > 0
    assert run("check", folder, tmp_path / "bf16", "--atol=0.1").code == 0


def test_check_of_other_shapes_and_options_says_which(tmp_path):
    one, two = save(tmp_path / "a", "olmo2"), save(tmp_path / "b", "olmo2 grouped")
    result = run("check", one, two)
    assert result.code == 1
    assert "model.n_kv_heads: 4 and 2" in result.out
    assert "cannot be compared: " in result.err
    config = json.loads((one / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    (other / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes())
    result = run("check", one, other)
    assert result.code == 1
    assert "model.norm_eps: 1e-06 and 1e-05" in result.out
    assert "of 14 are equal" in result.out.replace("14 of 14", "of 14")


@pytest.mark.parametrize(
    "arguments",
    [
        ["to_jax", "a"],
        ["to_hf", "a", "b", "--dtype=float64"],
        ["to_hf", "a", "b", "--max_shard_size=0GB"],
        ["to_hf", "a", "b", "--max_shard_size=much"],
        ["to_tf", "a", "b"],
        ["check", "a", "b", "c"],
        [],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments):
    assert run(*arguments).code == 2


def test_what_cannot_be_converted_is_one_line_and_1(tmp_path):
    result = run("to_jax", tmp_path / "none", tmp_path / "new")
    assert (result.code, result.err) == (1, f"error: {tmp_path}/none does not exist\n")
    (tmp_path / "empty").mkdir()
    result = run("to_hf", tmp_path / "empty", tmp_path / "new")
    assert result.code == 1
    assert "is no checkpoint that is known here" in result.errors[0]
    folder = save(tmp_path, "olmo2")
    result = run("to_jax", folder, tmp_path / "new", "--optimizer")
    assert "has no optimizer state" in result.errors[0]
    result = run("to_jax", folder, tmp_path / "new", "--revision=main")
    assert "--revision=main is for ids on the Hugging Face Hub" in result.errors[0]
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_of_ours_is_named(tmp_path):
    conversion.to_jax(str(save(tmp_path, "olmo2")), str(tmp_path / "ours"), say=quiet)
    chunk = next((tmp_path / "ours" / "params.layers.mlp.w_up" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    result = run("to_hf", tmp_path / "ours", tmp_path / "new")
    assert result.code == 1
    assert "leaf params/layers/mlp/w_up is damaged" in result.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_copy_that_is_not_like_its_source_never_gets_its_name(tmp_path, monkeypatch):
    folder = save(tmp_path, "olmo2")
    place = storage.ArrayWriter.write

    def wrong(self, name, start, block):
        place(self, name, start, block * 2 if name.endswith("w_up") else block)

    monkeypatch.setattr(storage.ArrayWriter, "write", wrong)
    result = run("to_jax", folder, tmp_path / "new")
    assert "the copy differs from its source: " in result.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


WAIT = """
import time
from olmo_jax.checkpoints import storage
from olmo_jax.checkpoints.formats import hf_write
def commit(*args, **keywords):
    print("here", flush=True)
    time.sleep(60)
storage.ArrayWriter.commit = hf_write._write_json = commit
"""


@pytest.mark.parametrize(
    ("verb", "number", "code", "left"),
    [
        pytest.param("to_jax", signal.SIGHUP, 129, [], marks=pytest.mark.slow),
        pytest.param("to_hf", signal.SIGTERM, 143, [], marks=pytest.mark.slow),
        ("to_hf", signal.SIGKILL, -9, ["new.partial"]),
    ],
)
def test_an_end_in_the_middle_leaves_no_result(tmp_path, verb, number, code, left):
    folder = save(tmp_path, "olmo2")
    with runs.processes(start(verb, folder, tmp_path / "new", code=WAIT)) as (process,):
        lines = iter(process.stdout.readline, "")
        assert any("here" in line for line in lines), process.stderr.read()
        process.send_signal(number)
        assert process.wait(20) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "theirs"]
    if left:
        result = run(verb, folder, tmp_path / "new")
        assert "new.partial is there, from a conversion that was killed" in result.errors[0]


def test_a_silent_server_does_not_hold_who_interrupts(tmp_path):
    folder = save(tmp_path, "olmo2")
    with web.serving(folder) as server:
        server.faults = [""] * 20 + ["silent"] * 1000  # 66 requests would do
        with runs.processes(start("to_jax", server.url, tmp_path / "new")) as (process,):
            while len(server.faults) >= 1000:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_write_under_way_does_not_bring_back_what_an_error_removed(tmp_path, monkeypatch):
    folder = save(tmp_path, "olmo2")
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def late(path: pathlib.Path) -> None:
            time.sleep(0.3)
            path.mkdir(parents=True)
            raise OSError("no space left")

        def write(self, name, start, block):
            if self._pending:
                raise OSError("no space left")
            future = threads.submit(late, pathlib.Path(self.folder) / "late")
            self._pending.append((future, block.nbytes, None))

        monkeypatch.setattr(storage.ArrayWriter, "write", write)
        assert run("to_jax", folder, tmp_path / "new").errors == ["no space left"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    folder = save(tmp_path, "olmo2")

    def full(number, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.os, "write", full)
    result = run("to_hf", folder, tmp_path / "new")
    monkeypatch.undo()
    file = tmp_path / "new.partial" / "model.safetensors"
    assert result.errors == [f"[Errno 28] No space left on device: '{file}'"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_nothing_of_jax_is_imported_for_a_wrong_command_line():
    code = (
        "import sys; from olmo_jax import convert\n"
        "code = convert.main(['to_jax', '--dtype=int8'])\n"
        "sys.exit(99 if 'jax' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    lines = ["SRC is missing; see --help", "DST is missing; see --help",
             "--dtype: found 'int8', need one of float32, bfloat16"]  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "".join(f"error: {line}\n" for line in lines))


# --- averages -------------------------------------------------------------------------------------


def test_an_average_is_the_fp32_mean_of_all(tmp_path):
    first = save(tmp_path, "olmo3", torch.bfloat16)
    conversion.to_jax(str(first), str(tmp_path / "ours"), say=quiet)
    second = tmp_path / "second"
    random_model("olmo3", scale=0.3)[0].save_pretrained(second)
    result = run("average", tmp_path / "ours", second, first, tmp_path / "mean")
    assert result.code == 0, result.err
    mean = native.read(str(tmp_path / "mean"))
    sources = [open_weights(str(path)) for path in (tmp_path / "ours", second, first)]
    for name, leaf in mean.leaves.items():
        assert leaf.dtype == np.float32
        parts = [source.read(name).astype(np.float64) for source in sources]
        assert np.allclose(mean.read(name), sum(parts) / 3, rtol=1e-6, atol=1e-7)
    assert run("to_hf", tmp_path / "mean", tmp_path / "hf").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["olmo1 clipped", pytest.param("olmo2 grouped", marks=pytest.mark.slow)]
)
def test_an_upcycled_model_starts_as_the_dense_one(tmp_path, name):
    src = save(tmp_path / "dense", name)
    options = ["--n_experts=6", "--n_experts_per_token=2", "--router_std=0.3", "--seed=4"]
    assert "6 experts" in run("upcycle", src, tmp_path / "moe", *options).out
    model, params = olmo_jax.load(str(tmp_path / "moe"))
    assert (model.config.n_experts, model.config.n_experts_per_token) == (6, 2)
    router = params["layers"]["moe"]["router"]
    assert abs(float(router.std()) - 0.3) < 0.02
    assert float(np.abs(router[0] - router[1]).max()) > 0.3  # each layer its own
    tokens = np.arange(2, 50).reshape(2, 24)
    dense, dense_params = olmo_jax.load(str(src))
    want = made.logits_of(dense, dense_params, tokens)
    np.testing.assert_allclose(made.logits_of(model, params, tokens), want, atol=2e-5)
    if name == "olmo2 grouped":  # a FlexOlmo to transformers
        exported = exported_logits(str(tmp_path / "moe"), str(tmp_path / "hf"), tokens)
        np.testing.assert_allclose(exported, want, atol=2e-5)
    again = run("upcycle", tmp_path / "moe", tmp_path / "again", *options)
    assert again.code == 1
    assert "it has 6 experts already" in again.err


@pytest.mark.parametrize(
    "options",
    [
        ["--n_experts=4"],  # of which a token takes 8
        ["--n_experts=4", "--n_experts_per_token=5"],
    ],
)
def test_experts_that_cannot_be_are_refused_in_a_line(tmp_path, options):
    result = run("upcycle", save(tmp_path / "dense", "olmo2"), tmp_path / "moe", *options)
    assert result.code == 1
    (line,) = result.err.splitlines()
    wrong = options[-1].removeprefix("--") if len(options) > 1 else "n_experts_per_token=8"
    assert line.startswith("error: upcycle: ")
    assert wrong in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("arguments", "need"),
    [
        ("upcycle a b --n_experts=4 --n_experts_per_token=0", "--n_experts_per_token=0: need a"),
        ("upcycle a b --n_experts=-2", "--n_experts=-2: need a number from 1 to 2147483647"),
        ("upcycle a b --n_experts=1e30", "need a number from 1 to 2147483647"),
        ("upcycle a b --n_experts=4 --router_std=nan", "--router_std: found nan, need a finite"),
        ("upcycle a b --n_experts=4 --router_std=-1", "--router_std=-1.0: need a number from 0.0"),
        ("upcycle a b --n_experts=4 --seed=-1", "--seed=-1: need a number from 0 to 4294967295"),
        ("check a b --atol=nan", "--atol: found nan, need a finite number"),  # differs from nothing
        ("check a b --atol=-1", "--atol=-1.0: need a number from 0.0 to"),
        ("to_jax a b --padded_vocab_size=0", "--padded_vocab_size=0: need a number from 1 to"),
        (f"to_hf a b --max_shard_size={'9' * 400}GB", "need a size such as 5GB or 500MiB"),
        ("to_jax a b c", "c: not expected; flags begin with --"),
        ("to_jax a b --optimizer=true", "--optimizer=true: it takes no value"),
        ("upcycle a b --n_experts 4", "--n_experts: needs a value, as in --n_experts=\u2026"),
        (
            "upcycle a b --experts=4",
            "--experts=4: there is no such flag; did you mean --n_ex",
        ),
        (
            "to_jaxx a b",
            "to_jaxx: need one of to_jax, to_hf, check, average, upcycle",
        ),
    ],
)
def test_what_cannot_be_is_a_wrong_command_line(arguments, need):
    result = run(*arguments.split())
    assert result.code == 2
    assert len([line for line in result.errors if need in line]) == 1


def test_only_equal_models_are_averaged(tmp_path):
    one, two = save(tmp_path / "a", "olmo2"), save(tmp_path / "b", "olmo2 grouped")
    result = run("average", one, two, tmp_path / "mean")
    assert result.code == 1
    assert "are different models: model.n_kv_heads: 4 and 2" in result.errors[0]
    alone = run("average", one, tmp_path / "mean")
    assert alone.errors == ["average: need at least two checkpoints before OUT"]
    assert not (tmp_path / "mean").exists()


# --- the Hub --------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the Hub's interface for one model at `org/model`, of two revisions."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api/models/").strip("/")
        self.server.asked.append(path)
        parts = path.split("/")
        if "/".join(parts[:2]) != "org/model":
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        folder = self.server.folders.get(revision)
        if folder is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        found = (child for child in folder.rglob("*") if child.is_file())
        files = sorted(child.relative_to(folder).as_posix() for child in found)
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.server.folders[commit] = folder
        if len(parts) < 3 or parts[2] == "revision":
            listed = [{"rfilename": name} for name in files]
            answer = {"id": "org/model", "sha": commit, "siblings": listed}
            return self._answer(200, json.dumps(answer).encode())
        if parts[2] == "tree":
            sizes = [(folder / name).stat().st_size for name in files]
            tree = [
                {"type": "file", "path": name, "size": size, "oid": name.encode().hex()}
                for name, size in zip(files, sizes, strict=True)
            ]
            return self._answer(200, json.dumps(tree).encode())
        data = (folder / "/".join(parts[4:])).read_bytes()
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self._answer(200, data, {"X-Repo-Commit": commit, "ETag": tag})

    def _answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub(**folders):
    """A Hub that knows these revisions."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads, server.folders, server.asked = True, dict(folders), []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_a_revision_is_fetched_from_the_hub_once_and_without_the_other_format(tmp_path):
    main, other = save(tmp_path / "a", "olmo2"), save(tmp_path / "b", "olmo2 grouped")
    (other / "pytorch_model.bin").write_bytes(b"the same in another format")
    (other / "tokenizer.json").write_bytes(b"{}")
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}")
    (other / "README.md").write_text("a model")
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with hub(main=main, **{"stage1-step1000": other}) as (server, url):
        arguments = ("to_jax", "org/model", tmp_path / "ours", "--revision=stage1-step1000")
        process = start(*arguments, HF_ENDPOINT=url, **home)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        fetched = {path.split("/")[-1] for path in server.asked if "/resolve/" in path}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"} | {
        "tokenizer.json",
        "tool_use.jinja",
    }
    assert "org/model: Hugging Face Olmo2ForCausalLM" in out
    assert conversion.check(str(other), str(tmp_path / "ours"), say=quiet)
    # Without a network what is there already still serves.
    arguments = ("to_hf", "org/model", tmp_path / "hf", "--revision=stage1-step1000")
    process = start(*arguments, HF_ENDPOINT="http://127.0.0.1:9", **home)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert tensors(tmp_path / "hf") == tensors(other)
    template = tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_bytes() == b"{{ tools }}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("org/model", "--revision=step7", "org/model has no revision step7 on the Hub"),
        ("org/other", "--revision=main", "org/other is no path here and no public model"),
        ("", "", "not whole in the cache, and the Hugging Face Hub cannot be reached"),
    ],
)
def test_what_the_hub_has_not_or_no_hub_at_all_is_one_line(tmp_path, name, option, message):
    with hub(main=tmp_path) as (_, url):
        process = start(
            "to_jax",
            name or "org/model",
            tmp_path / "ours",
            *([option] if option else []),
            HF_ENDPOINT=url if name else "http://127.0.0.1:9",
            HF_HOME=str(tmp_path / "cache"),
        )
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/quickstrat", "model", "a/b/c", "./a/b"):
        assert not foreign.is_hub_id(name)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_weights(name)
    assert foreign.is_hub_id("allenai/OLMo-2-1124-7B")
