"""The notebooks run from top to bottom on a small run, stay thin, and keep no picture that is not ours to give away."""

from pathlib import Path

import pytest
from small_run import small_run

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE_LINES, OUTPUT_BYTES = 80, 1_500_000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("notebooks"))


def code(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, run, monkeypatch):
    monkeypatch.setenv("K2_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(run / ".ipython"))
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/jpeg" in kinds and "image/png" in kinds and "text/markdown" in kinds
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin(path):
    lines = [line for line in code(nbformat.read(path, 4)).splitlines() if line.strip()]
    assert len(lines) <= CODE_LINES and not [line for line in lines if line.lstrip().startswith(("def ", "class "))]
    assert path.stat().st_size < OUTPUT_BYTES


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["sae_features", "selection_funnel", "synthetic_scores"]
