"""Evaluating a trained model: against a loop over its predictions, and what it refuses."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import power_cut
from hypothesis import given
from hypothesis import strategies as st

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import load_dataset
from fl_taskarith.describe.evaluation import NEIGHBOURS, TEMPERATURE, evaluate_run, nearest_classes
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.server.history import History


@pytest.fixture
def run(quick_config: Config) -> History:
    return simulate(dataclasses.replace(quick_config, run_name="run", test_subset=0, num_rounds=1))


def test_the_numbers_are_those_of_the_exported_models_own_predictions(
    run: History, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluate_run(run.folder)
    exported, test = run.model(), load_dataset("digits", Path(), False).test
    with torch.no_grad():
        predicted = exported.model(exported.transform(test.images)).argmax(1)
    cells = [[int(((test.labels == true) & (predicted == other)).sum()) for other in range(10)] for true in range(10)]
    with open(folder / "confusion.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [list(map(int, row[1:])) for row in rows[1:]] == cells
    facts = json.loads((folder / "evaluation.json").read_text())
    assert facts["test_accuracy"] == pytest.approx(run.rows[-1]["test_accuracy"])
    assert facts["test_accuracy"] == (predicted == test.labels).double().mean().item()
    assert facts["test_loss"] == pytest.approx(run.rows[-1]["test_loss"], rel=1e-5)
    assert facts["ridge_accuracy"] > 0.9 and facts["knn_accuracy"] > 0.9
    with open(folder / "by-class.csv", encoding="utf-8", newline="") as file:
        by_class = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in by_class] == [row[at] / sum(row) for at, row in enumerate(cells)]
    assert f"test accuracy {100 * facts['test_accuracy']:.2f} %" in capsys.readouterr().out
    assert (folder / "confusion.png").stat().st_size > 1000


def test_an_unfinished_run_is_evaluated_at_its_last_checkpoint(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, run_name="cut", mask_rule="random", density=0.3)
    with power_cut(after_round=2):
        simulate(config)
    folder = Path(config.results_dir) / "cut"
    found = json.loads((evaluate_run(folder, features=False) / "evaluation.json").read_text())
    assert found["test_accuracy"] == pytest.approx(History.load(folder).rows[2]["test_accuracy"])
    assert "round 2" in found["model"] and found["knn_accuracy"] is None


def test_what_cannot_be_evaluated_is_refused(run: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        evaluate_run(tmp_path)
    with pytest.raises(CheckpointError, match="There is no"):
        evaluate_run(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="num-rounds: no effect"):
        evaluate_run(run.folder, {"num_rounds": 7})
    with monkeypatch.context() as patched:  # what costs nothing is checked before a model is built or fetched
        patched.setattr("fl_taskarith.describe.evaluation.workspace", lambda config: pytest.fail(config.model))
        for source in (run.folder, run.folder / "model.safetensors"):
            for settings in ({"model": "vit_small_patch14_dinov2.lvd142m"}, {"model": "nonsense"}, {"input_size": 32}):
                with pytest.raises(ConfigError, match=r"holds a vit_glyph at input-size = 16"):
                    evaluate_run(source, settings)
    with pytest.raises(ConfigError, match=r"head\.weight"):
        evaluate_run(run.folder / "model.safetensors", {"dataset": "synthetic", "validation_size": 100})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "by-class.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"by-class\.csv"):
        evaluate_run(run.folder, output=tmp_path / "out")
    (run.folder / "model.safetensors").unlink()
    for checkpoint in (run.folder / "checkpoints").iterdir():
        checkpoint.unlink()
    with pytest.raises(CheckpointError, match="save-model"):
        evaluate_run(run.folder)


@given(st.integers(1, 30), st.integers(0, 2**32))
def test_nearest_classes_against_a_loop(number: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train, queries = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (number, 5))
    labels = torch.randint(0, 3, (number,), generator=generator)
    expected = []
    for query in queries:
        cosines = [float(query @ each / query.norm() / each.norm()) for each in train]
        nearest = sorted(range(number), key=lambda place: -cosines[place])[:NEIGHBOURS]
        votes = [sum(torch.tensor(cosines[place] / TEMPERATURE).exp().item() for place in nearest
                     if labels[place] == label) for label in range(3)]  # fmt: skip
        expected.append(votes.index(max(votes)))
    assert nearest_classes(train, labels, queries, 3).tolist() == expected
