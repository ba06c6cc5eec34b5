"""Imports flow one way, each third-party package has one home, and light parts stay light."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "olmo_jax"
FILES = {p.relative_to(PACKAGE).with_suffix("").as_posix(): p for p in PACKAGE.rglob("*.py")}

# A module imports only what stands in a line above its own, and its own folder.
LEVELS = """
disk options
command config foreign parsing presets records processes distributed xla_flags
changes schedules flops optim storage
validate
sharding progress events data
kernels metrics plot snapshot profiler
nn losses
step checkpoint
generation evals convert plan
summary report program
start
loop
train __init__
"""
LEVEL_OF = {name: i for i, line in enumerate(LEVELS.strip().splitlines()) for name in line.split()}

# Third-party packages but jax and numpy, and the only files that may import them.
HOMES = {
    "flax": "nn/",
    "optax": "optim",
    "tensorstore": "storage",
    "etils": "storage",
    "grain": "data/loader",
    "matplotlib": "plot",
    "tensorboardX": "events",
    "wandb": "metrics",
    "tokenizers": "data/tokenizer",
    "sentencepiece": "data/tokenizer",
    "ml_collections": "config",
    "huggingface_hub": "convert/hub",
    "yaml": "convert/legacy",
}
WITHOUT_JAX = (
    "command train config options validate presets flops schedules records progress metrics"
    " data.files data.checks data.tokens data.order data.tokenizer data.corpus"
).split()


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports anywhere; `from a import b` gives `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_flow_one_way(name):
    part = name.split("/")[0]
    assert part in LEVEL_OF, f"give {part} a line in LEVELS"
    for imported in imports(FILES[name]):
        package, *rest = imported.split(".")
        if package == "olmo_jax" and rest and rest[0] != part:
            assert LEVEL_OF[rest[0]] < LEVEL_OF[part], f"{name} imports {imported}"


@pytest.mark.parametrize("name", FILES)
def test_each_third_party_package_has_one_home(name):
    for imported in imports(FILES[name]):
        package = imported.split(".")[0]
        if package not in {"olmo_jax", "jax", "numpy", *sys.stdlib_module_names}:
            assert package in HOMES, f"{name} imports {package}: give it a home in HOMES"
            assert name.startswith(HOMES[package]), f"{name}: only {HOMES[package]} has {package}"


def test_levels_and_homes_name_what_exists():
    parts = {name.split("/")[0] for name in FILES}
    assert set(LEVEL_OF) == parts
    assert all(any(name.startswith(home) for name in FILES) for home in HOMES.values())


def test_there_is_no_drawer_for_everything():
    drawers = ("util", "utils", "helper", "helpers", "misc", "common")
    assert not [name for name in FILES if name.split("/")[-1] in drawers]


def test_config_and_data_do_without_jax():
    modules = ", ".join(f"olmo_jax.{name}" for name in WITHOUT_JAX)
    code = f"import sys, olmo_jax, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_only_tests_and_benchmarks_know_torch():
    folders = [PACKAGE, ROOT / "configs", ROOT / "tools"]
    for path in [p for folder in folders for p in folder.rglob("*.py")]:
        packages = {name.split(".")[0] for name in imports(path)}
        if ROOT / "tools/bench" not in path.parents:
            assert not packages & {"torch", "transformers"}, path


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and line[0] != "#"] == project["dependencies"]


def _by_the_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding that the environment chooses."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):  # epath's forget the encoding that they are given
        return True
    keywords = {keyword.arg for keyword in call.keywords}
    words = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
    mode = next((word for word in words if re.fullmatch("[rwax+bt]{1,3}", word)), None)
    if mode is None and isinstance(call.func, ast.Name) and name == "open":  # not folders.open
        mode = "r"
    is_opened = name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile")
    is_text = is_opened and "b" not in (mode or "b")
    is_text |= name == "TextIOWrapper" or "text" in keywords
    return is_text and "encoding" not in keywords


def test_text_is_utf_8_whatever_the_locale():
    for folder in (PACKAGE, ROOT / "configs", ROOT / "tools"):
        for path in folder.rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, ast.Call)]
            found = [ast.unparse(call) for call in calls if _by_the_locale(call)]
            assert not found, path
