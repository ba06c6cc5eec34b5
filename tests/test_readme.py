"""What the README and docs/ show works: snippets, commands, messages, links, and tables."""

import json
import os
import pathlib
import re
import shlex
import stat
import subprocess
import tomllib

import jax
import pytest
import small_run

from olmo_jax import cli, config, convert, plan, plot, presets, train
from olmo_jax.config import costs
from olmo_jax.config.run import validate
from olmo_jax.parallel import distributed
from olmo_jax.pods import report

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES if page.stem != "CONTRIBUTING")
LAUNCHERS = sorted((ROOT / "tools/launch").glob("*.sh"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.M | re.S)


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.replace("\\\n", "").splitlines()
    if shlex.split(line, comments=True)
]
FAILURES = re.findall(r"^\$ (python .*)\n(error: .*)", DOCS, re.M)
FULL = ("train.z_loss=1e-4", "log.norms_interval=1", "log.device_peak_flops=1e12")
BARE = ("train.summary=false", "eval.at_finish=false", "checkpoint.step0=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a fresh clone, with texts, a finished tiny quickstart, and nothing else."""
    folder, before = tmp_path_factory.mktemp("clone"), os.getcwd()
    os.chdir(folder)
    for name in ("configs", "tools"):
        pathlib.Path(name).symlink_to(ROOT / name)
    pathlib.Path("texts").mkdir()
    for i in range(41):  # of one length, so that the tokens of 40 also fit another dtype
        pathlib.Path(f"texts/{i}.txt").write_text("It was a dark and stormy night.\n" * 30)
    made = small_run.make_corpus(folder)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster; runs are short
    assert tiny(["--config=configs/quickstart.py"], made, *FULL) == 0
    yield made
    jax.config.update("jax_disable_most_optimizations", False)
    os.chdir(before)


def tiny(arguments, made, *options):
    """The exit code of a training command that is made small, on made data."""
    small = small_run.flags(*small_run.TINY, *(options or BARE))
    if "--config.data.paths=train.npy" in arguments:
        (makes_it,) = (code for code in blocks("python") if "write_documents" in code)
        exec(makes_it, {})
    return train.main([*small, *small_run.data_flags(made), *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_snippet_runs(place, code, capsys):
    for name in ("train", "heldout"):
        pathlib.Path(f"{name}.npy").unlink(missing_ok=True)
    scope = {}
    exec(code.replace("step3500", f"step{small_run.STEPS}"), scope)
    if "logits" in scope:
        assert scope["logits"].shape == (1, 3, small_run.VOCAB)
        assert scope["logits"].dtype == "float32"
    elif "documents" in scope:
        assert pathlib.Path("train.npy").stat().st_size > 2 * 64
        assert scope["tokenizer"].eos_id == 0  # as the command below it says
    else:
        assert len(capsys.readouterr().out) > 1


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_command_works(place, line, capsys):
    head, *rest = words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "olmo_jax.train"]:
        check_training(place, rest[2:])
    elif head == "make":
        run = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    elif words[:3] == ["python", "-m", "olmo_jax.convert"]:
        assert convert.parse(rest[2:])[0] == rest[2]
    elif words[:3] == ["python", "-m", "olmo_jax.plot"]:
        assert plot.main(rest[2:]) == 0
    elif words[:3] == ["python", "-m", "olmo_jax.plan"]:
        flags, settings = plan.configure(rest[2:])
        validate(settings, report.parse(flags.topology).n_devices)
    elif head in ("sbatch", "gcloud") or head.startswith("tools/"):
        script = next((w for w in words if w.startswith("tools/")), "tools/launch/tpu_pod.sh")
        assert (ROOT / script).stat().st_mode & stat.S_IXUSR
        inner = shlex.split(words[-1].removeprefix("--command=")) if head == "gcloud" else words
        options = [w for w in inner if w.startswith("--config")]
        if options:
            train.configure(options)
    elif head == ".venv/bin/pip":
        (extra,) = re.findall(r"\.\[(\w+)\]", rest[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra in project["optional-dependencies"]
    else:
        assert head in ("export", "tensorboard", "pip"), "this test has to learn how to check it"


def check_training(place, arguments):
    if any(a.startswith("--coordinator") for a in arguments):
        flags, _ = train.configure(arguments)
        assert distributed.find_cluster(vars(flags), {}).n_processes == 2
    elif {"--help", "--dry_run"} & set(arguments):
        assert train.main(arguments) == 0
    elif re.search(r"load_path|data\.paths", " ".join(arguments)):
        assert tiny(arguments, place) == 0
    else:  # of data that is not here, or as any other run
        assert train.main([*arguments, "--n_devices=1", "--dry_run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "message"), FAILURES)
def test_failure_prints_its_message(place, command, message, capsys, monkeypatch):
    # As in the process of a command, JAX has not met its devices yet.
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)
    arguments = shlex.split(command)[3:]
    if "rows" in message:  # of the quickstart as it is
        code = train.main([*arguments, *small_run.data_flags(place)])
    elif "quickstart" in command:
        code = tiny(arguments, place)
    else:
        code = train.main(arguments)
    assert code == (2 if "did you mean" in message or "rows" in message else 1)
    numbers = r"id \d+ at token \d+|vocab_size=\d+"  # those of other data
    printed = capsys.readouterr().err.splitlines()
    assert [re.sub(numbers, "", line) for line in printed] == [re.sub(numbers, "", message)]


@pytest.mark.slow
def test_the_same_command_again_says_that_it_is_done(place, capsys):
    assert tiny(["--config=configs/quickstart.py"], place) == 0
    assert "done already: step 3 of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_metric_names_are_those_of_a_run(place):
    lines = pathlib.Path("runs/quickstart/metrics.jsonl").read_text().splitlines()
    recorded = {name for line in lines for name in json.loads(line)}
    table = DOCS.split("| metric | meaning |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall("`([^`]*/[^`]*)`", row)}
    assert len(named) > 15
    assert named <= recorded


def test_table_of_models_has_every_preset_with_its_size():
    rows = re.findall(r"^\| [^|]* \| `(\w+)` \| ([\d,]+) \|", README, re.M)
    for name, count in rows:
        model = config.ModelConfig(**presets.MODELS[name])
        assert count == f"{costs.n_params(model).total:,}"
    official = [
        name
        for name in presets.MODELS
        if re.search(r"olmo1|^olmo\w_(7B|13B|32B|1B_v2|1B_7B)$", name)
    ]
    assert {name for name, _ in rows} == set(official) - {"olmo3_13B"}  # of which there is no run


def test_links_lead_to_files_and_every_config_is_linked():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert not [link for link in links if not (page.parent / link).exists()]
    linked = set(re.findall(r"\]\(configs/(\w+)\.py\)", README))
    assert linked == {path.stem for path in (ROOT / "configs").glob("*.py")}


def test_exit_codes_are_those_of_the_program():
    rows = re.findall(r"^\| (\d+) \|", DOCS, re.M)
    assert set(rows) == set(re.findall(r"\b(\d+) [a-z]", train.__doc__.split("Exit codes:")[1]))


def test_table_of_verbs_has_all_of_them():
    assert re.findall(r"^\| `python -m olmo_jax\.(\w+)` \|", README, re.M) == [*cli.VERBS]


# --- launch scripts -------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder of commands in front of the PATH that write down how they were called."""

    def make(**commands: str) -> pathlib.Path:
        for name, body in commands.items():
            path = tmp_path / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
            path.chmod(0o755)
        return tmp_path / "calls"

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return make


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_launch_script_has_no_syntax_error(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("code", [0, 1, 74, 75])
def test_slurm_requeues_a_run_that_was_preempted_and_no_other(stand_ins, code, monkeypatch):
    calls = stand_ins(srun=f"exit {code}", scontrol="")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = subprocess.run([ROOT / "tools/launch/slurm.sh", "--config=x y"], capture_output=True)
    assert run.returncode == code
    assert "-m olmo_jax.train --config=x y" in calls.read_text()
    assert ("scontrol requeue 7" in calls.read_text()) == (code == 75)


def test_slurm_tells_the_run_when_time_is_nearly_over(stand_ins, tmp_path, monkeypatch):
    calls = stand_ins(
        srun=f"echo $$ >{tmp_path}/pid; trap 'sleep 0.3; exit 75' USR1; echo ready;"
        " while :; do sleep 0.05; done",
        scancel=f"kill -USR1 $(cat {tmp_path}/pid)",  # the tasks get it, not srun
        scontrol="",
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = [ROOT / "tools/launch/slurm.sh"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=20) == 75
    assert calls.read_text().splitlines()[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_tpu_pod_hands_arguments_over_unchanged(stand_ins, tmp_path, monkeypatch):
    stand_ins(gcloud=f'printf "%s\\n" "$@" >{tmp_path}/arguments')
    monkeypatch.setenv("TPU", "pod")
    monkeypatch.setenv("ZONE", "zone")
    option = "--config.data.paths=a b/*.npy,$HOME"
    subprocess.run([ROOT / "tools/launch/tpu_pod.sh", "run", "echo", option], check=True)
    *where, command = (tmp_path / "arguments").read_text().splitlines()
    assert where == "compute tpus tpu-vm ssh pod --zone=zone --worker=all".split()
    (tmp_path / "olmo_jax").mkdir()
    shell = ["bash", "-c", command.removeprefix("--command=")]
    assert subprocess.check_output(shell, cwd=tmp_path, text=True) == f"{option}\n"


@pytest.mark.parametrize("port", ["", "8476"])
def test_tpu_pod_tells_the_workers_on_which_port_they_meet(stand_ins, tmp_path, monkeypatch, port):
    remote = "unset JAX_COORDINATOR_PORT; cd $HOME; command=${!#}"
    stand_ins(gcloud=remote + '; eval "${command#--command=}"; wait')
    settings = {"TPU": "pod", "ZONE": "zone", "HOME": str(tmp_path), "JAX_COORDINATOR_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    python = tmp_path / "olmo_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$JAX_COORDINATOR_PORT: $*"\n')
    python.chmod(0o755)
    subprocess.run([ROOT / "tools/launch/tpu_pod.sh", "start", "--config=a b"], check=True)
    log = (tmp_path / "olmo_jax/train.log").read_text()
    assert log == f"{port}: -m olmo_jax.train --config=a b\n"


def test_tpu_pod_without_arguments_explains_itself():
    run = subprocess.run([ROOT / "tools/launch/tpu_pod.sh"], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split("\n")[0][:5]) == (2, "Train")
