import contextlib
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import numbers

from fl_taskarith.cli import main
from fl_taskarith.config import Config
from fl_taskarith.errors import (
    BudgetSpent,
    CheckpointError,
    ClientFailure,
    ConfigError,
    DataError,
    Divergence,
    StudyError,
)
from fl_taskarith.logbook import Logbook, read_rounds
from fl_taskarith.run import History
from fl_taskarith.study import runner
from fl_taskarith.study.definition import Study
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.one_run import run_once
from fl_taskarith.study.results import State, StudyResults, run_folder
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import Choice
from fl_taskarith.study.study_file import load_study
from fl_taskarith.study.tables import write_tables

STUDY = """
title = "A study"
name = "tiny"
seeds = [0, 1, 2]
reference = "dense"

[settings]
num-clients = 10
num-rounds = 2
mask-rule = "none"
local-steps = 1

[[arm]]
name = "dense"
settings = { learning-rate = 0.01 }

[[arm]]
name = "head alone"
settings = { learning-rate = 0.1, trainable = "head" }
"""

SEARCHED = """
name = "searched"
seeds = [0, 1]
[settings]
num-clients = 10
num-rounds = 2
mask-rule = "none"
[search]
from = 1e-3
to = 10.0
per-decade = 1
rounds = [1, 2]
keep = 2
[[arm]]
name = "dense"
[[arm]]
name = "half"
settings = { participation = 0.1 }
same-rate-as = "dense"
"""


def study_of(text: str, tmp_path: Path) -> Study:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return load_study(path)


class FakeTraining:
    """Stands for `simulate`: writes a run's folder through the real logbook, with accuracies from a formula."""

    def __init__(self, accuracy: Callable[[Config], float]) -> None:
        self.accuracy = accuracy
        self.runs: list[Config] = []

    def __call__(self, config: Config, deadline: float | None = None) -> History:
        self.runs.append(config)
        with Logbook(config) as logbook:
            logbook.write_round({"round": 0, "val_accuracy": 0.5, "test_accuracy": 0.5, "uplink_bytes": 7})
            value = self.accuracy(config)
            for server_round in range(1, config.num_rounds + 1):
                logbook.write_round(
                    {
                        "round": server_round,
                        "val_accuracy": value,
                        "val_loss": 1.0,
                        "test_accuracy": value,
                        "uplink_bytes": 2_000_000 * server_round,
                        "train_seconds": 3.0,
                        "task_vector_norm": 0.5 * server_round,
                    }
                )
        return History(logbook.folder, logbook.rows)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """Accuracy 0.9, less a point for each decade between the learning rate and 0.1, plus a tenth of it per seed."""
    fake = FakeTraining(lambda run: 0.9 - 0.01 * abs(math.log10(run.learning_rate) + 1) + 0.001 * run.seed)
    monkeypatch.setattr("fl_taskarith.simulation.simulate", fake)
    return fake


@pytest.fixture(autouse=True)
def _no_table_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.study.tables.plot_arms", lambda rows, title, output: [])


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# study files


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds = [0, 1]", "seed = [0, 1]", 'did you mean "seeds"'),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ("seeds = [0, 1]", "seeds = [0, 0.5]", "whole numbers"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "each once"),
        ('name = "searched"', 'name = "../out"', "plain folder name"),
        ('name = "searched"', "", "name is missing"),
        ("num-clients = 10", "num-client = 10", 'did you mean "num-clients"'),
        ("num-clients = 10", "run-name = 'mine'", "run-name is set by the study"),
        ("num-clients = 10", "learning-rate = 0.1", "contradicts [search]"),
        ("num-clients = 10", "validation-size = 0\nridge-lambda = 1.0\nlogit-scale = 1.0", "validation-size above 0"),
        ("num-clients = 10", "warmup-rounds = 2", "searched with num-rounds = 1"),
        ("to = 10.0", "to = 1.0", "4 decades"),
        ("to = 10.0", "to = 'high'", "to = 'high': expected a number"),
        ("from = 1e-3", "", "from is missing"),
        ("per-decade = 1", "per-decade = 0", "per-decade"),
        ("to = 10.0", "to = 20.0", "does not divide"),
        ("rounds = [1, 2]", "rounds = [2, 1]", "rising"),
        ("keep = 2", "keep = 6", "keep = 6"),
        ("participation = 0.1", "participation = 2.0", 'arm "half": participation'),
        ('"dense"\n[[arm]]', '"half"\n[[arm]]', "is there twice"),
        ('same-rate-as = "dense"', 'same-rate-as = "danse"', 'same-rate-as = "danse" is no arm'),
        ('same-rate-as = "dense"', 'same-rate-as = "half"', "a rate of its own"),
        ("participation = 0.1", "learning-rate = 0.1", "not both"),
        ("seeds = [0, 1]", 'seeds = [0, 1]\nreference = "sparse"', 'reference = "sparse"'),
        ("[settings]", "[grid]\nlocal-steps = 4\n[settings]", "[grid] local-steps"),
        ("[settings]", "[settings", "not valid TOML"),
        ('[[arm]]\nname = "half"', '[arm.x]\nname = "half"', '[[arm]]: "x" is not a key'),
    ],
)
def test_a_bad_study_file_is_refused_with_its_place(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert old in SEARCHED
    with pytest.raises(ConfigError) as caught:
        study_of(SEARCHED.replace(old, new), tmp_path)
    assert expected in str(caught.value)
    assert "study.toml" in str(caught.value)


def test_a_study_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_arms_are_run_in_every_group_and_grid_point_and_compared_within_them(tmp_path: Path) -> None:
    study = study_of(
        """
        name = "cells"
        seeds = [0]
        reference = "dense"
        [settings]
        mask-rule = "none"
        [grid]
        local-steps = [4, 8]
        [[group]]
        name = "iid"
        settings = { sharding = "iid" }
        [[group]]
        name = "Nc = 1"
        settings = { classes-per-client = 1 }
        [[arm]]
        name = "dense"
        [[arm]]
        name = "head"
        settings = { trainable = "head" }
        """,
        tmp_path,
    )
    assert study.groups == ["iid", "Nc = 1"]
    assert [arm.label for arm in study.arms[:4]] == [
        f"{name}, local-steps = {steps}" for name in ("dense", "head") for steps in (4, 8)
    ]
    assert len(study.arms) == 8
    last = study.arms[-1]
    reference = study.reference_of(last)
    assert reference is not None
    assert reference.title == "Nc = 1: dense, local-steps = 8"
    assert last.settings == {
        "mask-rule": "none",
        "classes-per-client": 1,
        "trainable": "head",
        "local-steps": 8,
    }


def test_overrides_reach_every_run_and_no_path_of_this_machine_the_tables(
    tmp_path: Path, training: FakeTraining
) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    command = ["study", str(tmp_path / "study.toml"), f"data-dir={tmp_path}/data", "local-steps=3"]
    assert main([*command, "--results-dir", str(tmp_path)]) == 0
    assert {(run.data_dir, run.local_steps) for run in training.runs} == {(f"{tmp_path}/data", 3)}
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert 'Command: `fl-taskarith study study.toml data-dir="DATA" local-steps=3`' in written
    assert str(tmp_path) not in written
    assert main([*command, "seed=1"]) == 1


def test_the_density_of_a_masked_arm_is_shown(tmp_path: Path, training: FakeTraining) -> None:
    masked = '[[arm]]\nname = "masked"\nsettings = { mask-rule = "least-sensitive", density = 0.25 }\n'
    run_studies([study_of(STUDY + masked, tmp_path)], tmp_path)
    assert [row["density"] for row in table(tmp_path / "tiny" / "table.csv")] == ["", "", "0.25"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "conf" / "study").rglob("*.toml")), ids=str)
def test_the_shipped_study_files_are_valid(path: Path) -> None:
    assert load_study(path).arms


# runner


def test_what_is_done_is_not_run_again(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    assert len(training.runs) == 6
    run_studies([study], tmp_path)
    assert len(training.runs) == 6
    assert {(run.seed, run.shard_seed) for run in training.runs} == {(0, 0), (1, 1), (2, 2)}


def test_a_changed_setting_is_run_anew(tmp_path: Path, training: FakeTraining) -> None:
    run_studies([study_of(STUDY, tmp_path)], tmp_path)
    changed = study_of(STUDY.replace("local-steps = 1", "local-steps = 3"), tmp_path)
    assert not any("| val" in line for line in list_study(StudyResults(changed, tmp_path)))
    run_studies([changed], tmp_path)
    assert [run.local_steps for run in training.runs] == [1] * 6 + [3] * 6


def test_a_finished_run_whose_settings_do_not_fit_its_name_is_refused(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    record = next((tmp_path / "tiny" / "runs").glob("*-s0-*")) / "run.json"
    record.write_text(record.read_text().replace('"local-steps": 1', '"local-steps": 5'))
    with pytest.raises(StudyError, match=r"finished run of other settings \(local-steps"):
        run_studies([study], tmp_path)
    assert "other settings" in (tmp_path / "tiny" / "README.md").read_text()
    assert len(training.runs) == 6


def test_an_interrupted_run_goes_on_in_its_folder(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)

    def interrupt(run: Config) -> float:
        raise KeyboardInterrupt

    training.accuracy, usual = interrupt, training.accuracy
    with pytest.raises(KeyboardInterrupt):
        run_studies([study], tmp_path)
    assert any("running or interrupted" in line for line in list_study(StudyResults(study, tmp_path)))
    assert "not run" in (tmp_path / "tiny" / "README.md").read_text()
    training.accuracy = usual
    run_studies([study], tmp_path)
    assert len(list((tmp_path / "tiny" / "runs").iterdir())) == 6, "no NAME-2 beside the interrupted run"


def test_the_search_chooses_on_validation_and_its_longest_run_is_reused(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(SEARCHED, tmp_path)
    run_studies([study], tmp_path)
    trials = [(run.learning_rate, run.num_rounds) for run in training.runs[:7]]
    assert trials == [(0.001, 1), (0.01, 1), (0.1, 1), (1.0, 1), (10.0, 1), (0.01, 2), (0.1, 2)]
    rest = [(run.learning_rate, run.num_rounds, run.seed, run.participation) for run in training.runs[7:]]
    assert rest == [(0.1, 2, 1, 0.2), (0.1, 2, 0, 0.1), (0.1, 2, 1, 0.1)], "seed 0 of the first arm was a trial"
    tried = table(tmp_path / "searched" / "search.csv")
    assert [(float(row["learning_rate"]), int(row["rounds"])) for row in tried] == trials
    assert {row["learning_rate"] for row in tried if row["chosen"] == "True"} == {"0.1"}


def test_divergence_in_the_search_is_the_worst_score_and_is_not_tried_again(
    tmp_path: Path, training: FakeTraining
) -> None:
    usual = training.accuracy

    def diverge(run: Config) -> float:
        if run.learning_rate >= 0.1:
            raise Divergence("the training loss is nan")
        return usual(run)

    training.accuracy = diverge
    study = study_of(SEARCHED, tmp_path)
    run_studies([study], tmp_path)
    count = len(training.runs)
    run_studies([study], tmp_path)
    assert len(training.runs) == count
    tried = table(tmp_path / "searched" / "search.csv")
    assert [row["learning_rate"] for row in tried if row["diverged"] == "True"] == ["0.1", "1.0", "10.0"]
    assert {run.learning_rate for run in training.runs if run.seed == 1} == {0.01}


def test_a_client_that_fails_otherwise_is_no_divergence_and_is_tried_again(
    tmp_path: Path, training: FakeTraining
) -> None:
    def fail(run: Config) -> float:
        raise ClientFailure("no answer")

    training.accuracy, usual = fail, training.accuracy
    study = study_of(SEARCHED, tmp_path)
    with pytest.raises(StudyError, match=r"search stopped at learning-rate = 0\.001: ClientFailure: no answer"):
        run_studies([study], tmp_path)
    training.accuracy = usual
    run_studies([study], tmp_path)
    assert not list((tmp_path / "searched" / "runs").glob("*/failure.json"))


@pytest.mark.parametrize("kind", [DataError, MemoryError])
def test_a_failed_run_stands_in_the_table_and_stops_no_other(
    kind: type[Exception], tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = training.accuracy

    def fail(run: Config) -> float:
        if run.trainable == "head" and run.seed == 1:
            raise kind("too much")
        return usual(run)

    training.accuracy = fail
    (tmp_path / "study.toml").write_text(STUDY)
    assert main(["study", str(tmp_path / "study.toml"), "--results-dir", str(tmp_path)]) == 1
    assert f"head alone, seed 1: {kind.__name__}: too much" in capsys.readouterr().err
    assert len(training.runs) == 6
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert f"- head alone, seed 1: failed: {kind.__name__}: too much" in written
    assert "| 2 of 3 |" in written


def test_the_budget_stops_between_runs_and_the_same_command_goes_on(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fl_taskarith.study.runner.time.time", lambda: 100.0 * len(training.runs))
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path, budget=250)
    assert len(training.runs) == 3
    assert "budget is spent" in capsys.readouterr().out
    run_studies([study], tmp_path)
    assert len(training.runs) == 6


def test_the_list_tells_what_is_left_and_how_long_it_takes(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    command = ["study", str(tmp_path / "study.toml"), "--results-dir", str(tmp_path)]
    assert main([*command, "--list"]) == 0
    assert not training.runs
    printed = capsys.readouterr().out
    assert printed.count("to do") == 6
    assert "no run is finished yet" in printed
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    run_studies([study], tmp_path)  # 2 runs of 2 rounds, 3 s each
    lines = list(list_study(StudyResults(study_of(STUDY, tmp_path), tmp_path)))
    assert lines[-1] == "Left: 8 rounds, about 0.4 minutes of one process."
    assert sum(line.endswith("| 6.0 s") for line in lines) == 2


@pytest.mark.parametrize("text", ["25", "m", "0m", "1.5h", "25x", ""])
def test_a_budget_without_a_unit_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(tmp_path / "study.toml"), "--budget", text])
    assert stopped.value.code == 2


# tables


def test_the_tables_against_numbers_by_hand(tmp_path: Path, training: FakeTraining) -> None:
    dense, head = {0: 0.90, 1: 0.92, 2: 0.94}, {0: 0.91, 1: 0.95, 2: 0.96}
    training.accuracy = lambda run: (head if run.trainable == "head" else dense)[run.seed]
    run_studies([study_of(STUDY, tmp_path)], tmp_path)
    first, second = table(tmp_path / "tiny" / "table.csv")
    assert float(first["test_percent"]) == pytest.approx(92)
    assert float(first["test_percent_sd"]) == pytest.approx(2)
    assert float(first["gain_mean"]) == pytest.approx(42)
    assert first["difference_mean"] == ""
    assert float(first["uplink_megabytes"]) == 3.0  # mean of 2 and 4; round 0 is not a training round
    # differences 1, 3, 2: mean 2, sd 1, half-width t(0.975, 2) / √3 = 2.4841
    assert float(second["difference_mean"]) == pytest.approx(2)
    assert float(second["difference_low"]) == pytest.approx(-0.4841, abs=1e-4)
    assert float(second["difference_detectable"]) == pytest.approx((4.302653 + 1.060660) / math.sqrt(3), abs=1e-4)
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert "| dense | 0.01 | 50.00 | 92.00 ± 2.00 | 3 |" in written
    assert "| +2.00 [-0.48, +4.48] | 3.10 | 1.000 ± 0.000 | 3.00 |" in written
    assert "Command: `fl-taskarith study study.toml`" in written
    assert len(table(tmp_path / "tiny" / "runs.csv")) == 6


def test_a_table_is_made_from_folders_alone_and_says_what_was_not_run(tmp_path: Path, training: FakeTraining) -> None:
    run_studies([study_of(STUDY.replace("[0, 1, 2]", "[1]"), tmp_path)], tmp_path)
    for leftover in ("README.md", "table.csv"):
        (tmp_path / "tiny" / leftover).unlink()
    more = study_of(STUDY + '[[arm]]\nname = "new"\nsettings = { batch-size = 8 }\n', tmp_path)
    write_tables(StudyResults(more, tmp_path))
    assert len(training.runs) == 2
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert "| new | 1 | – | not run | 0 |" in written
    assert "| 89.10 | 1 of 3 |" in written, "one seed has no ±"


def test_an_edge_is_marked_in_the_table(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.5 + 0.01 * math.log10(run.learning_rate)
    run_studies([study_of(SEARCHED, tmp_path)], tmp_path)
    written = (tmp_path / "searched" / "README.md").read_text()
    assert "| dense | 10 (edge: not tuned) |" in written
    assert "| half | 10 (that of dense; edge: not tuned) |" in written


@pytest.mark.figures
def test_a_figure_is_drawn_for_every_group(tmp_path: Path, training: FakeTraining) -> None:
    groups = '[[group]]\nname = "iid"\nsettings = { sharding = "iid" }\n[[group]]\nname = "Nc = 2"\n'
    run_studies([study_of(STUDY + groups, tmp_path)], tmp_path)
    folder = tmp_path / "tiny"
    for name in ("accuracy-iid", "accuracy-nc-2"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"({name}.png)" in (folder / "README.md").read_text()


# real runs


def test_a_real_study_leaves_what_simulate_leaves_and_no_checkpoints(tmp_path: Path) -> None:
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    run_studies([study], tmp_path)
    folder = next((tmp_path / "tiny" / "runs").glob("*"))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert "test accuracy" in (folder / "log.txt").read_text()
    assert not (folder / "checkpoints").exists()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    for jobs in (1, 2):
        run_studies([study], tmp_path / str(jobs), jobs=jobs)
    for folder in (tmp_path / "1" / "tiny" / "runs").iterdir():
        assert numbers(folder) == numbers(tmp_path / "2" / "tiny" / "runs" / folder.name)
    first, second = (table(tmp_path / jobs / "tiny" / "table.csv") for jobs in ("1", "2"))
    assert first == second


def test_a_damaged_record_is_named(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    record = next((tmp_path / "tiny" / "runs").glob("*-s0-*")) / "run.json"
    record.write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        list(list_study(StudyResults(study, tmp_path)))


def test_an_arm_that_stands_in_two_tables_has_its_runs_once(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "conf" / "study" / "digits" / "six-models.toml").read_text()
    (tmp_path / "twins.toml").write_text(text)
    study = load_study(tmp_path / "twins.toml")
    first, second = (arm for arm in study.arms if arm.settings["mask-rule"] == "none" and "sharding" not in arm.settings
                     and arm.settings.get("strategy") != "centralized")  # fmt: skip
    assert first.group != second.group
    assert study.config(first, 0.1, None, 0, tmp_path) == study.config(second, 0.1, None, 0, tmp_path)
    other = next(arm for arm in study.arms if arm.settings["mask-rule"] == "random")
    assert study.config(other, 0.1, None, 0, tmp_path).run_name != study.config(first, 0.1, None, 0, tmp_path).run_name
    assert study.reference_of(first) is first
    assert study.reference_of(second) is not None
    assert study.reference_of(second).label == "least-sensitive"


def test_studies_of_one_family_share_their_runs(tmp_path: Path, training: FakeTraining) -> None:
    text = STUDY.replace('name = "tiny"', 'name = "family/{part}"')
    first, second = (study_of(text.replace("{part}", part), tmp_path) for part in ("first", "second"))
    run_studies([first, second], tmp_path)
    assert len(training.runs) == 6
    assert len(list((tmp_path / "family" / "runs").iterdir())) == 6
    assert table(tmp_path / "family" / "first" / "table.csv") == table(tmp_path / "family" / "second" / "table.csv")


def test_the_tables_say_what_the_arms_differ_in_and_where_each_run_lies(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    assert study.varied
    for row in table(tmp_path / "tiny" / "runs.csv"):
        record = json.loads((tmp_path / "tiny" / "runs" / row["run"] / "run.json").read_text())["config"]
        for key in study.varied:
            assert row[key.replace("-", "_")] == str(record[key])


def test_a_run_whose_time_is_up_stops_after_its_round_and_is_continued(tmp_path: Path) -> None:
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    task = StudyResults(study, tmp_path).final_runs(study.arms[0], Choice(0.01))[0]
    outcome = run_once(task, deadline=0.0)
    assert outcome.state is State.UNFINISHED
    folder = run_folder(task)
    assert [row["round"] for row in read_rounds(folder)] == [0]
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert run_once(task, deadline=None).state is State.DONE
    assert len(list(folder.parent.iterdir())) == 1


def test_search_chooses_one_configurations_rate_and_goes_on_where_it_stopped(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    words, command = (
        ["search", "num-clients=10", "mask-rule=none"],
        ["--rounds", "1", "2", "--results-dir", str(tmp_path)],
    )
    assert main([*words, *command]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "learning-rate = 0.1"
    assert [(run.learning_rate, run.num_rounds) for run in training.runs[9:]] == [(0.1, 2), (0.316, 2)]
    (found,) = tmp_path.glob("search/*/search.csv")
    assert [row["learning_rate"] for row in table(found) if row["chosen"] == "True"] == ["0.1", "0.1"]
    assert main([*words, *command]) == 0
    assert len(training.runs) == 11
    training.accuracy = lambda run: run.learning_rate / 100
    assert main([*words, "local-steps=2", *command]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "learning-rate = 10 (an end of the grid: not tuned)"
    assert main([*words, *command, "--to", "1"]) == 1
    assert "do not span 4 decades" in capsys.readouterr().err


def test_the_first_estimate_comes_from_the_file(tmp_path: Path) -> None:
    text = STUDY.replace("[settings]", "images-per-second = 2\n[settings]", 1)
    lines = list(list_study(StudyResults(study_of(text, tmp_path), tmp_path)))
    images = 6 * 2 * 2 * 1 * 16  # runs x rounds x clients x steps x batch
    assert f"{images:,} training images, about {images / 2 / 60:.0f} minutes" in lines[-1]


def test_what_is_done_is_not_run_again_beside_what_is_open(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    for record in (tmp_path / "tiny" / "runs").glob("*-s0-*/run.json"):  # seed 0 of both arms was interrupted
        record.write_text(record.read_text().replace('"finished"', '"interrupted"', 1))
    monkeypatch.setattr("fl_taskarith.study.runner._workers", lambda jobs: contextlib.nullcontext(runner._Submit(None)))
    run_studies([study], tmp_path, jobs=2)
    assert [run.seed for run in training.runs[6:]] == [0, 0]
    assert len(list((tmp_path / "tiny" / "runs").iterdir())) == 6
    done = StudyResults(study, tmp_path).final_runs(study.arms[0], Choice(0.01))[1]
    assert run_once(done, deadline=None).state is State.DONE
    assert len(training.runs) == 8


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_spent_budget_is_no_failure_and_is_said(
    tmp_path: Path,
    training: FakeTraining,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    jobs: int,
) -> None:
    def cut(run: Config) -> float:
        raise BudgetSpent("over")

    training.accuracy = cut
    monkeypatch.setattr("fl_taskarith.study.runner._workers", lambda jobs: contextlib.nullcontext(runner._Submit(None)))
    twins = STUDY + '\n[[arm]]\nname = "follower"\nsame-rate-as = "dense"\nsettings = { local-steps = 1 }\n'
    run_studies([study_of(twins, tmp_path), study_of(SEARCHED, tmp_path)], tmp_path, jobs=jobs)
    assert "budget is spent" in capsys.readouterr().out


def test_a_run_that_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    task = StudyResults(study, tmp_path).final_runs(study.arms[0], Choice(0.01))[0]
    with Logbook(task):
        outcome = run_once(task, deadline=None)
        assert outcome.state is State.FAILED
        assert "Another process" in outcome.cause
        assert not (run_folder(task) / "failure.json").exists()


def test_a_study_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "density=0.1"]) == 1
    assert "study file" in capsys.readouterr().err
