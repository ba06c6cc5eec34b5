"""Imports flow one way, each third-party package has one home, and light parts stay light."""

import ast
import collections
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "olmo_jax"
FILES = {p.relative_to(PACKAGE).with_suffix("").as_posix(): p for p in PACKAGE.rglob("*.py")}

# A folder imports only what stands in a line above its own; so does each file within it, since
# files make no circles. On the floor each may also import what stands to its left.
LEVELS = """
files config cli
parallel data records
kernels curation
nn
checkpoints generation
training
evals pods
train convert plan plot __init__
"""
LEVEL_OF = {name: i for i, line in enumerate(LEVELS.strip().splitlines()) for name in line.split()}
FLOOR = LEVELS.split("\n")[1].split()

# Third-party packages but jax and numpy, and the only files that may import them.
HOMES = {
    "flax": "nn/",
    "optax": "training/optim",
    "tensorstore": ("checkpoints/storage", "checkpoints/layout"),
    "etils": "files",
    "orbax": "checkpoints/formats/orbax",
    "grain": "data/loader",
    "matplotlib": "records/plot",
    "tensorboardX": "records/tensorboard",
    "wandb": "records/wandb",
    "tokenizers": "data/tokenizer",
    "sentencepiece": "data/tokenizer",
    "ml_collections": "config/",
    "huggingface_hub": "checkpoints/formats/hub",
    "yaml": "checkpoints/formats/legacy",
}
WITHOUT_JAX = (
    "cli files train convert plan plot config config.describe records.writer records.plot"
    " curation.stdlib training.schedules data.token_files data.documents data.fixed_length"
    " data.batch data.checks data.order data.tokenizer"
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


def modules(name: str) -> set[str]:
    """The files of the package that a file imports, anywhere in it."""
    found = set()
    for imported in imports(FILES[name]):
        package, *path = imported.split(".")
        if package == "olmo_jax":  # the last word may be a symbol of the file
            whole, file = "/".join(path), "/".join(path[:-1])
            found |= {module for module in (whole, file) if module in FILES}
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_flow_one_way(name):
    part = name.split("/")[0]
    assert part in LEVEL_OF, f"give {part} a line in LEVELS"
    for module in modules(name):
        above = module.split("/")[0]
        is_below = LEVEL_OF[above] < LEVEL_OF[part] or above == part
        assert is_below or (above, part) in itertools.combinations(FLOOR, 2), (
            f"{name} imports {module}"
        )


def test_files_make_no_circle():
    rest = {name: modules(name) for name in FILES}
    while free := {name for name, needed in rest.items() if not needed & rest.keys()}:
        rest = {name: needed for name, needed in rest.items() if name not in free}
    assert not rest


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


def test_few_functions_see_a_whole_config():
    """Verbs, `start`, the dry run, plans, and what checks relations."""
    allowed = ("train", "convert", "plan", "plot", "training/start", "pods/")
    allowed += ("config/describe", "config/run")
    takers = [
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(
            a.annotation is not None and re.search(r"\bConfig\b", ast.unparse(a.annotation))
            for a in (*node.args.args, *node.args.kwonlyargs)
        )
    ]
    assert not {name for name in takers if not name.startswith(allowed)}
    assert len(takers) <= 30


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


def test_a_public_noun_names_one_thing():
    where = collections.defaultdict(list)
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(name)
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and re.match("[A-Z].*[a-z]", target.id):
                    where[target.id].append(name)  # an alias of a type
    assert not {noun: files for noun, files in where.items() if len(files) > 1}
