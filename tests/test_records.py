"""What a study's folder keeps for a report: settings and courses, without a path of the machine they were made on."""

import json
from pathlib import Path

import pytest
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.config import OPERATIONAL_KEYS, rules
from fl_taskarith.report.comparisons import twin
from fl_taskarith.report.results import read_study
from fl_taskarith.study.runner import run_studies


@pytest.fixture(autouse=True)
def _no_table_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.study.tables.plot_arms", lambda rows, title, output: [])


def test_a_studys_folder_is_read_back_arm_by_arm(tmp_path: Path, training: FakeTraining) -> None:
    text = STUDY.replace('trainable = "head"', 'trainable = "head", weights = "/somewhere/private/vit.safetensors"')
    run_studies([study_of(text, tmp_path)], tmp_path)
    assert str(tmp_path) not in (tmp_path / "tiny" / "settings.json").read_text()
    found = read_study(tmp_path / "tiny")
    dense, head = found.arms
    assert (dense.label, dense.rate, dense.edge) == ("dense", 0.01, False)
    assert dense.settings.keys() == rules().keys() - OPERATIONAL_KEYS - {"seed", "shard-seed", "learning-rate"}
    assert dense.settings["local-steps"] == 1
    assert head.settings["weights"] == "vit.safetensors"
    assert twin(dense, found.arms, {"trainable": "head"}, also=("weights",)) is head
    assert dense.test == {seed: float(line["test_percent"])
                          for seed, line in enumerate(table(tmp_path / "tiny" / "runs.csv")[:3])}  # fmt: skip
    assert dense.curves[2] == ((0, 50.0), (1, dense.val[2]), (2, dense.val[2]))
    assert set(dense.states.values()) == {"done"}
    assert dense.seconds == {0: 6.0, 1: 6.0, 2: 6.0}
    assert found.record["seeds"] == [0, 1, 2]
    courses = table(tmp_path / "tiny" / "curves.csv")
    assert [float(line["uplink_megabytes"]) for line in courses[:3]] == pytest.approx([7e-6, 2 + 7e-6, 6 + 7e-6])


def test_a_search_is_recorded_and_an_arm_without_runs_stays(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.5 + 0.01 * run.learning_rate
    run_studies([study_of(SEARCHED, tmp_path)], tmp_path, budget=0.0)
    found = read_study(tmp_path / "searched")
    assert [arm.test for arm in found.arms] == [{}, {}]
    assert json.loads((tmp_path / "searched" / "settings.json").read_text())["search"] == {
        "rates": [0.001, 0.01, 0.1, 1.0, 10.0], "rounds": [1, 2], "keep": 2, "seed": 0,
    }  # fmt: skip
    run_studies([study_of(SEARCHED, tmp_path)], tmp_path)
    assert all(arm.edge and arm.rate == 10.0 for arm in read_study(tmp_path / "searched").arms)
