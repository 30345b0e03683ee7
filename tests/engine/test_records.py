"""What a study's folder keeps for a report: settings and courses, without a path of the machine they were made on."""

import json
import math
from pathlib import Path

import pytest
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.config.fields import rules
from fl_taskarith.config.settings import OPERATIONAL_KEYS
from fl_taskarith.report.contrasts import twin
from fl_taskarith.report.read_results import read_study
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.frame import speed
from fl_taskarith.study.results import Outcome, State
from fl_taskarith.study.runner import run_studies

pytestmark = pytest.mark.usefixtures("no_table_figures")


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
    assert dense.curves["val_percent"][2] == {0: 50.0, 1: dense.val[2], 2: dense.val[2]}
    assert set(dense.states.values()) == {"done"}
    assert {(run.seed, run.seconds, run.shipped) for run in found.finished} == {(seed, 6.0, False) for seed in range(3)}
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


def test_a_runs_speed_is_the_median_of_its_rounds_without_evaluation() -> None:
    config = {"strategy": "fedavg", "local-steps": 4, "local-steps-max": 0, "batch-size": 32}
    record = {"config": config, "shards": {"smallest": 200}, "data": {"train": 20_000}}
    rows = tuple({"round": number, "clients": clients, "train_seconds": train, "overhead_seconds": 0.5,
                  "evaluate_seconds": 99.0}
                 for number, clients, train in ((0, 100, 300.0), (1, 10, 9.5), (2, 5, 4.5), (3, 10, 1e3)))  # fmt: skip

    def of(record: dict[str, object], rows: tuple[Row, ...] = rows) -> tuple[float, float]:
        return speed(Outcome(State.DONE, rows, record))

    assert of(record) == (10.0, 128.0), "1280 images in 10 s, 640 in 5, and one round on a busy machine"
    assert of(record | {"config": config | {"strategy": "centralized"}}) == (10.0, 2000.0)
    for unknown in ({"config": config | {"local-steps-max": 8}}, {"shards": {"smallest": 31}}):
        seconds, images = of(record | unknown)
        assert seconds == 10.0
        assert math.isnan(images)
    assert all(map(math.isnan, of(record, rows[:1])))
