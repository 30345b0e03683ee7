"""Studies from their first run to their tables, with training that takes no time."""

from pathlib import Path

import pytest
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import (
    ClientFailure,
    DataError,
    Divergence,
    StudyError,
)
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies

pytestmark = pytest.mark.usefixtures("no_table_figures")

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
    assert not any("| val" in line for line in list_study(StudyResults(changed, tmp_path), every_run=True))
    run_studies([changed], tmp_path)
    assert [run.local_steps for run in training.runs] == [1] * 6 + [3] * 6


def test_a_finished_run_whose_settings_do_not_fit_its_name_is_refused(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    record = next((tmp_path / "tiny" / "runs").glob("*-s0-*")) / "run.json"
    record.write_text(record.read_text().replace('"local-steps": 1', '"local-steps": 5'))
    (record.parent / "SHA256SUMS").unlink()  # else the change itself is refused
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
    listed = list_study(StudyResults(study, tmp_path), every_run=True)
    assert any("running or interrupted" in line for line in listed)
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
    cost = "The 4 final runs took 0.4 minutes of one process, the 6 others of the searches that did not diverge"
    assert f"{cost} 0.3 minutes; 3 s a round (3 to 3):" in (tmp_path / "searched" / "README.md").read_text()
    assert {row["round_seconds"] for row in table(tmp_path / "searched" / "runs.csv")} == {"3.0"}


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


def test_a_seed_that_ends_below_its_head_is_named(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    training.accuracy, training.test = (lambda run: 0.9 if run.seed == 0 else 0.3), lambda value: value
    run_studies([study_of(SEARCHED, tmp_path)], tmp_path)
    written, said = (tmp_path / "searched" / "README.md").read_text(), capsys.readouterr().out
    for arm in ("dense", "half"):
        assert (
            f"- {arm}: seed 1 at 30.00 % ended below the ridge head. The learning rate was chosen on seed 0" in written
        )
    assert said.count("| test 30.00 % | below the ridge head |") == said.count("| below") == 2

    training.accuracy = lambda run: 0.3
    run_studies([study_of(SEARCHED.replace("searched", "lost"), tmp_path)], tmp_path)
    written = (tmp_path / "lost" / "README.md").read_text()
    assert "- dense: seed 0 at 30.00 %, seed 1 at 30.00 % ended below the ridge head.\n" in written


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
    assert len(printed.splitlines()) < 10, "a summary"
    assert "Measured here: device cpu, fp32, compile off" in printed
    assert main([command[0], "--list", *command[1:]]) == 0, "the option may come before the file"
    assert capsys.readouterr().out.count("images/s") == printed.count("images/s")
    assert main([*command, "--list", "all"]) == 0
    assert capsys.readouterr().out.count("to do") == 6
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    run_studies([study], tmp_path)  # 2 runs of 2 rounds
    lines = list(list_study(StudyResults(study_of(STUDY, tmp_path), tmp_path), every_run=True))
    assert lines[-1].startswith("Left: 4 runs of 8 rounds, about ")
    assert sum(line.endswith("| 6.0 s") for line in lines) == 2
    assert capsys.readouterr().out and (tmp_path / "tiny" / "study.log").read_text().count("| 6.0 s") == 2


@pytest.mark.parametrize("text", ["25", "m", "0m", "1.5h", "25x", ""])
def test_a_budget_without_a_unit_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(tmp_path / "study.toml"), "--budget", text])
    assert stopped.value.code == 2
