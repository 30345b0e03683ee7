"""The Colab notebook: run from top to bottom, cut and resumed, in a kernel of its own."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fl_taskarith.storage.run_folder import read_rounds

NOTEBOOK = Path(__file__).parents[2] / "results" / "colab.ipynb"
ROUNDS = 20  # enough that the cut comes before the end


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 6
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_is_cut_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_TASKARITH_RESULTS", str(tmp_path))
    monkeypatch.setenv("FL_TASKARITH_ROUNDS", str(ROUNDS))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = read_notebook()
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "exit status -9" in printed, "the run is killed"
    assert f"Continuing {tmp_path / 'colab'} after round" in printed
    assert json.loads((tmp_path / "colab" / "run.json").read_text())["status"] == "finished"
    assert [row["round"] for row in read_rounds(tmp_path / "colab")] == list(range(ROUNDS + 1))
    assert not (tmp_path / "colab-2").exists()
    shown = [output.data for output in notebook.cells[-2].outputs if "data" in output]
    assert any("image/png" in data for data in shown)
