"""Tables from what a study printed, its run folders lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.cli import main
from fl_taskarith.config import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.study.from_log import LoggedResults
from fl_taskarith.study.one_run import describe_run
from fl_taskarith.study.results import Outcome, State, StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import Choice
from fl_taskarith.study.study_file import load_study

pytestmark = pytest.mark.usefixtures("no_table_figures")

LONGER = (
    SEARCHED.replace("num-rounds = 2", "num-rounds = 3")
    + """
[[arm]]
name = "ridge head"
settings = { learning-rate = 0.0 }
"""
)
COLUMNS = ("group", "arm", "learning_rate", "edge", "n", "ridge_test_percent")
MEANS = ("test_percent", "val_percent", "test_percent_sd", "gain_mean", "gain_low", "gain_high")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    """0.1 decides the search; without training all stay at the ridge head's 0.5."""

    def accuracy(run: Config) -> float:
        if run.learning_rate == 0.0:
            return 0.5
        return 0.6 + 0.01 * run.seed - (0.1 if run.learning_rate != 0.1 else 0.0) + 0.03 * (run.participation == 0.1)

    fake = FakeTraining(accuracy)
    monkeypatch.setattr("fl_taskarith.simulation.simulate", fake)
    return fake


def printed(study_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run_studies([study_of(study_text, tmp_path)], tmp_path / "runs")
    return capsys.readouterr().out


def test_the_tables_are_those_of_the_runs(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "study.log"
    log.write_text("a notebook's own words\nHardware: a borrowed GPU\n" + printed(LONGER, tmp_path, capsys))
    main(["study", "--log", str(log), "--results-dir", str(tmp_path / "log"), str(tmp_path / "study.toml")])
    theirs, ours = (table(tmp_path / place / "searched" / "table.csv") for place in ("runs", "log"))
    assert len(ours) == 3
    for mine, run in zip(ours, theirs, strict=True):
        assert [mine[column] for column in COLUMNS] == [run[column] for column in COLUMNS]
        for column in MEANS:
            assert float(mine[column]) == pytest.approx(float(run[column]), abs=1e-9), column
        assert (not mine["uplink_megabytes"] and run["uplink_megabytes"]) or float(run["learning_rate"]) == 0.0
    theirs, ours = (table(tmp_path / place / "searched" / "search.csv") for place in ("runs", "log"))
    told = ("arm", "learning_rate", "rounds", "val_accuracy", "diverged", "chosen")
    assert [[row[name] for name in told] for row in ours] == [[row[name] for name in told] for row in theirs]
    words = (tmp_path / "log" / "searched" / "README.md").read_text()
    assert "the folders of its runs are lost" in words and "The 6 final runs took 0.9 minutes" in words
    assert "Hardware: a borrowed GPU. The 6 final runs" in words
    settings = json.loads((tmp_path / "log" / "searched" / "settings.json").read_text())
    assert settings["machines"] == ["a borrowed GPU"]
    assert not (tmp_path / "log" / "searched" / "curves.csv").exists()


def test_a_seed_that_the_log_lacks_is_not_made_up(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(STUDY, tmp_path, capsys).splitlines()
    kept = [line for line in lines if "head alone" not in line or "seed 1" in line]
    study = study_of(STUDY, tmp_path)
    results = LoggedResults(study, tmp_path, kept)
    states = [results.outcome(run).state for run in results.final_runs(study.arms[1], Choice(0.1))]
    assert states == [State.TO_DO, State.DONE, State.TO_DO]


def test_a_diverged_run_and_its_cause_are_told(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    results = LoggedResults(
        study, tmp_path, ["dense | rate 0.01 | seed 2 | rounds 2 | diverged: Client 3 diverged | badly."]
    )
    run = results.final_runs(study.arms[0], Choice(0.01))[2]
    assert results.outcome(run).state is State.DIVERGED
    assert results.outcome(run).cause == "Client 3 diverged | badly."


def test_of_two_lines_on_one_run_the_later_counts(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    line = "dense | rate 0.01 | seed 0 | rounds 2 | "
    results = LoggedResults(
        study, tmp_path, [line + "running or interrupted", line + "val 50.00 % | test 51.00 % | 3.0 s"]
    )
    assert results.outcome(results.final_runs(study.arms[0], Choice(0.01))[0]).rows[-1]["test_accuracy"] == 0.51


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["danse | rate 0.01 | seed 0 | rounds 2 | val 50.00 % | 3.0 s"], '"danse"'),
        (
            [f"dense | rate {rate} | seed 0 | rounds 3 | val 1.00 % | test 1.00 % | 3.0 s" for rate in (0.1, 1)],
            "several",
        ),
    ],
)
def test_a_log_of_another_study_is_refused(lines: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        LoggedResults(study_of(LONGER, tmp_path), tmp_path, lines)


def test_a_log_that_is_not_there_or_of_two_studies_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    for files, expected in ((1, "Cannot read the log"), (2, "of one study, and 2 files")):
        assert main(["study", "--log", str(tmp_path / "none.log"), *[str(tmp_path / "study.toml")] * files]) == 1
        assert expected in capsys.readouterr().err


@given(
    val=st.floats(0, 1),
    test=st.none() | st.floats(0, 1),
    seconds=st.floats(0, 1e5),
    rate=st.sampled_from([0.0, 1e-05, 0.00316, 0.1, 10.0, 100.0]),
    title=st.sampled_from(["dense", "head alone"]),
)
def test_a_line_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, val: float, test: float | None, seconds: float, rate: float, title: str
) -> None:
    root = tmp_path_factory.getbasetemp()
    path = root / "fixed.toml"
    path.write_text(STUDY)
    study = load_study(path)
    arm = next(arm for arm in study.arms if arm.label == title)
    run = study.config(arm, rate, 7, 1, root)
    row = {"round": 7, "val_accuracy": val, "test_accuracy": test, "overhead_seconds": seconds}
    line = describe_run(arm, run, Outcome(State.DONE, (row,)), reported=test is not None)
    found = LoggedResults(study, root, [line]).outcome(run)
    assert found.state is State.DONE and found.seconds == pytest.approx(seconds, abs=0.06)
    for name, value in (("val_accuracy", val), ("test_accuracy", test)):
        assert found.rows[-1].get(name) == (None if value is None else pytest.approx(value, abs=5.1e-5))


def test_without_a_log_results_are_read_from_folders(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    results = StudyResults(study, tmp_path)
    assert results.outcome(results.final_runs(study.arms[0], Choice(0.01))[0]).state is State.TO_DO
