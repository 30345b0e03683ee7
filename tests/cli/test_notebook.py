"""The Colab notebook: run from top to bottom in a kernel of its own, again, and with the kernel killed half-way."""

import os
import signal
import time
from pathlib import Path
from threading import Thread

import nbformat
import pandas
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

NOTEBOOK = Path(__file__).parents[2] / "results" / "colab.ipynb"
PARTS = ("centralized", "fedavg-iid", "heterogeneity", "six-models", "sparsity", "extension")
STUDY = """
title = "Tiny: {part}"
name = "digits/{part}"
seeds = [0, 1]
[settings]
num-rounds = 2
evaluate-every = 1
train-subset = 200
test-subset = 100
validation-size = 60
learning-rate = 0.003
mask-rule = "none"
[[arm]]
name = "first"
settings = {{ {first} }}
[[arm]]
name = "second"
settings = {{ {second} }}
"""
FEDERATED = "num-clients = 10, local-steps = {}"
MEASURED = ["arm", "test_percent", "val_percent", "task_vector_norm"]


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_outputs_and_has_a_cell_per_part() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        compile(cell.source, str(NOTEBOOK), "exec")
    called = [part for part in PARTS if any(f'part("{part}")' in cell.source for cell in code)]
    assert called == list(PARTS)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookClient:
    """The notebook over tiny studies of the parts' names; its results go to `tmp_path`/results."""
    studies = tmp_path / "studies"
    studies.mkdir()
    for part in PARTS:
        pair = [FEDERATED.format(steps) for steps in (1, 2)]
        if part == "centralized":
            pair = ['strategy = "centralized"', 'strategy = "centralized", schedule = "constant"']
        (studies / f"{part}.toml").write_text(STUDY.format(part=part, first=pair[0], second=pair[1]))
    monkeypatch.setenv("FL_TASKARITH_STUDIES", str(studies))
    monkeypatch.setenv("FL_TASKARITH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return NotebookClient(
        read_notebook(), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )


def printed(client: NotebookClient) -> str:
    return "".join(output.get("text", "") for cell in client.nb.cells for output in cell.get("outputs", []))


def measured(folder: Path) -> dict[str, list[list[object]]]:
    tables = {part: pandas.read_csv(folder / "digits" / part / "table.csv") for part in PARTS}
    return {part: frame[MEASURED].to_numpy().tolist() for part, frame in tables.items()}


@pytest.mark.slow
def test_the_notebook_runs_every_part_and_then_repeats_nothing(client: NotebookClient, tmp_path: Path) -> None:
    client.execute()
    runs = sorted((tmp_path / "results" / "digits" / "runs").glob("*/rounds.csv"))
    written = {path: path.stat().st_mtime_ns for path in runs}
    assert len(runs) == 2 * 2 + 2 * 2, "the federated parts share their runs"
    assert (tmp_path / "results" / "page" / "index.html").stat().st_size > 10**6
    assert (tmp_path / "results" / "report" / "main.tex").exists()
    for figure in ("shards/histogram.png", "masks/anatomy.png", "masks/sensitivity.png"):
        assert (tmp_path / "results" / "digits" / figure).exists()
    cells = {cell.source: cell.get("outputs", []) for cell in client.nb.cells}
    for part in PARTS:
        (outputs,) = (outputs for source, outputs in cells.items() if f'part("{part}")' in source)
        shown = [kind for output in outputs for kind in output.get("data", {})]
        assert "text/html" in shown and "image/png" in shown, "its table and its figures"
        assert any(
            "Measured here: about" in output.get("text", "") or "Nothing is left" in output.get("text", "")
            for output in outputs
        )
    numbers = measured(tmp_path / "results")

    client.nb = read_notebook()
    client.execute()
    assert {path: path.stat().st_mtime_ns for path in runs} == written, "nothing is trained again"
    assert printed(client).count("Nothing is left to do.") == len(PARTS)
    assert measured(tmp_path / "results") == numbers


@pytest.mark.slow
def test_a_killed_kernel_goes_on_to_the_same_numbers(
    client: NotebookClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.execute()
    whole = measured(tmp_path / "results")
    cut = tmp_path / "cut"
    monkeypatch.setenv("FL_TASKARITH_RESULTS", str(cut))

    def kill_in_the_middle() -> None:
        while len(list((cut / "digits" / "runs").glob("*/rounds.csv"))) < 3:
            time.sleep(0.01)
        os.kill(client.km.provisioner.pid, signal.SIGKILL)  # type: ignore[union-attr]

    client.nb = read_notebook()
    killer = Thread(target=kill_in_the_middle)
    killer.start()
    with pytest.raises(DeadKernelError):
        client.execute()
    killer.join()
    assert not (cut / "page").exists()
    client.nb = read_notebook()
    client.execute()
    assert measured(cut) == whole
