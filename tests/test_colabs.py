"""The notebooks run from their first cell to the last, in tiny settings, and hold no outputs."""

import pathlib

import pytest
import runs
import small_run

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


def read(path: pathlib.Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def tagged(notebook, tag: str):
    (cell,) = [c for c in notebook.cells if tag in c.metadata.get("tags", [])]
    return cell


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook, made = read(path), small_run.make_corpus(tmp_path)
    options = [*small_run.flags(*small_run.TINY), *small_run.data_flags(made)]
    notebook.cells.remove(tagged(notebook, "install"))
    values = small_run.STEPS, str(tmp_path / "run"), options
    tagged(notebook, "parameters").source += f"\nSTEPS, RUN, OPTIONS = {values!r}"
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiles faster
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert any("image/png" in o.get("data", ()) for o in shown)
    printed = "".join(o.text for o in shown if o.output_type == "stream" and o.name == "stdout")
    assert f"step {small_run.STEPS}/{small_run.STEPS} | loss" in printed
    assert (tmp_path / f"run/checkpoints/step{small_run.STEPS}").is_dir()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
