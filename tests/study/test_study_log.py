"""Tables from what a study printed, its run folders lost."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.study.from_log import LoggedResults
from fl_taskarith.study.one_run import describe_run
from fl_taskarith.study.results import Outcome, State, StudyResults, run_folder
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import DIVERGED, Choice
from fl_taskarith.study.study_file import load_study
from fl_taskarith.study.tables import write_tables

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
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", fake)
    return fake


def printed(study_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run_studies([study_of(study_text, tmp_path)], tmp_path / "runs")
    return capsys.readouterr().out


@pytest.fixture
def ran(tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], StudyResults]:
    """What LONGER prints, and its folders under tmp_path/runs; its first arm is searched, its last does not train."""
    lines = printed(LONGER, tmp_path, capsys).splitlines()
    return lines, StudyResults(study_of(LONGER, tmp_path), tmp_path / "runs")


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


def test_a_folder_that_is_there_counts_and_the_log_fills_in_the_others(
    tmp_path: Path, ran: tuple[list[str], StudyResults]
) -> None:
    lines, whole = ran
    study, arm = whole.study, whole.study.arms[0]
    expected = {trial: score[0] for trial, score in whole.scores(arm).items()}
    runs = whole.final_runs(arm, Choice(0.1))
    for lost in (runs[0], *(whole.trial_run(arm, trial) for trial in list(expected)[:2])):
        shutil.rmtree(run_folder(lost))
    misled = [line.replace("val 6", "val 1") if "seed 1" in line else line for line in lines]
    assert misled != lines
    results = LoggedResults(study, tmp_path / "runs", misled)
    found = [results.outcome(run) for run in runs]
    assert [outcome.record is None for outcome in found] == [True, False]
    assert found[1] == whole.outcome(runs[1])
    assert found[0].rows[0]["test_accuracy"] == 0.5  # the ridge head's, whose folder is there
    assert results.choice(arm) == Choice(0.1)
    scores = {trial: score[0] for trial, score in results.scores(arm).items()}
    assert scores == pytest.approx(expected, abs=5.1e-5)


def test_a_search_half_in_folders_and_half_in_the_log_chooses(
    tmp_path: Path, ran: tuple[list[str], StudyResults]
) -> None:
    lines, whole = ran
    study, arm = whole.study, whole.study.arms[0]
    for trial in list(whole.trials(arm))[::2]:
        shutil.rmtree(run_folder(whole.trial_run(arm, trial)))
    trials = [line for line in lines if "test" not in line]
    results = LoggedResults(study, tmp_path / "runs", trials)
    assert results.choice(arm) == Choice(0.1)
    assert [results.outcome(run).state for run in results.final_runs(arm, Choice(0.1))] == [State.DONE] * 2


def test_a_folder_that_diverged_counts_and_one_that_is_damaged_is_left_to_its_own_arm(
    tmp_path: Path, ran: tuple[list[str], StudyResults]
) -> None:
    lines, whole = ran
    study, arm, ridge = whole.study, whole.study.arms[0], whole.study.arms[-1]
    diverged = run_folder(whole.trial_run(arm, (10.0, 1)))
    shutil.rmtree(diverged)
    diverged.mkdir()
    (diverged / "failure.json").write_text(json.dumps({"diverged": True, "cause": "Client 1 diverged."}))
    for run in whole.final_runs(arm, Choice(0.1)):
        shutil.rmtree(run_folder(run))
    (run_folder(whole.final_runs(ridge, Choice(0.0))[0]) / "run.json").write_text("{broken")
    results = LoggedResults(study, tmp_path / "runs", ["Hardware: a borrowed GPU", *lines])
    assert results.scores(arm)[10.0, 1] == DIVERGED
    write_tables(results)
    rows = {row["arm"]: row for row in table(results.folder / "table.csv")}
    assert rows["dense"]["n"] == "2" and rows["ridge head"]["n"] == "0"
    words = (results.folder / "README.md").read_text()
    assert "a borrowed GPU" in words.partition("Hardware: ")[2]


def test_a_search_that_was_run_again_chooses(tmp_path: Path, ran: tuple[list[str], StudyResults]) -> None:
    lines, whole = ran
    study, arm = whole.study, whole.study.arms[0]
    finals = [line for line in lines if "test" in line and arm.title in line]
    log = [line.replace("| rate 0.1 ", "| rate 0.01 ") for line in finals]
    assert LoggedResults(study, tmp_path / "elsewhere", log).choice(arm) == Choice(0.01)
    assert LoggedResults(study, tmp_path / "runs", log).choice(arm) == Choice(0.1)


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


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_lines_on_one_run_the_one_on_its_end_counts(first: int, tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    ends = ["running or interrupted", "val 50.00 % | test 51.00 % | 3.0 s"]
    lines = [f"dense | rate 0.01 | seed 0 | rounds 2 | {ends[place]}" for place in (first, 1 - first)]
    results = LoggedResults(study, tmp_path, lines)
    assert results.outcome(results.final_runs(study.arms[0], Choice(0.01))[0]).rows[-1]["test_accuracy"] == 0.51


def test_final_runs_that_ended_badly_stand_with_their_cause_and_are_no_trials(tmp_path: Path) -> None:
    results = LoggedResults(
        study_of(LONGER, tmp_path),
        tmp_path,
        [
            "dense | rate 10 | seed 0 | rounds 1 | diverged: Client 1 diverged.",
            "dense | rate 0.1 | seed 0 | rounds 3 | diverged: Client 3 diverged.",
            "dense | rate 0.1 | seed 1 | rounds 3 | failed: MemoryError: full",
        ],
    )
    write_tables(results)
    words = (results.folder / "README.md").read_text()
    assert "| dense | 0.1 |" in words and "failed" in words
    assert "seed 0: diverged: Client 3 diverged." in words and "seed 1: failed: MemoryError: full" in words
    tried = table(results.folder / "search.csv")
    assert [(row["learning_rate"], row["rounds"], row["diverged"]) for row in tried] == [("10.0", "1", "True")]


LINE = "dense | rate {rate} | seed {seed} | rounds {rounds} | val 1.00 % | {test}3.0 s"
FINAL = {"rate": 0.1, "seed": 1, "rounds": 3, "test": "test 1.00 % | "}
TRIAL = {"rate": 0.1, "seed": 0, "rounds": 2, "test": ""}


@pytest.mark.parametrize("line", [FINAL, TRIAL])
def test_runs_of_the_study_are_taken(line: dict[str, object], tmp_path: Path) -> None:
    LoggedResults(study_of(LONGER, tmp_path), tmp_path, [LINE.format(**line)])


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([LINE.format(**FINAL).replace("dense", "danse")], '"danse"'),
        ([LINE.format(**FINAL), LINE.format(**FINAL | {"rate": 1, "seed": 0})], "several"),
        ([LINE.format(**FINAL | {"rate": 0.2})], "does not ask for"),
        ([LINE.format(**FINAL | {"seed": 7})], "does not ask for"),
        ([LINE.format(**FINAL | {"rounds": 4})], "does not ask for"),
        ([LINE.format(**TRIAL | {"seed": 1})], "does not ask for"),
        (["", "Traceback (most recent call last):"], "no line of a run"),
        ([], "no line of a run"),
    ],
)
def test_a_log_of_another_study_or_of_none_is_refused(lines: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        LoggedResults(study_of(LONGER, tmp_path), tmp_path, lines)


def test_a_log_that_cannot_be_read_and_words_that_contradict_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, utf_16, good = tmp_path / "study.toml", tmp_path / "utf-16.log", tmp_path / "good.log"
    study.write_text(STUDY)
    line = "dense | rate 0.01 | seed 0 | rounds 2 | val 50.00 % | test 51.00 % | 3.0 s"
    utf_16.write_text(line, encoding="utf-16")
    good.write_text("Hardware: of Windows\n" + line, encoding="utf-8-sig")
    for log, words, expected in (
        (tmp_path / "none.log", [study], "Cannot read the log"),
        (utf_16, [study], "UTF-8"),
        (good, [study, study], "of one study, and 2 files"),
        (good, [study, "--tables"], "leave out --list, --tables"),
    ):
        assert main(["study", "--log", str(log), *map(str, words), "--results-dir", str(tmp_path)]) == 1
        assert expected in capsys.readouterr().err
    assert main(["study", "--log", str(good), str(study), "--results-dir", str(tmp_path)]) == 0
    assert "Hardware: of Windows" in (tmp_path / "tiny" / "README.md").read_text()


def test_tables_are_not_replaced_by_those_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = study_of(STUDY, tmp_path)
    write_tables(StudyResults(study, tmp_path))
    write_tables(LoggedResults(study, tmp_path, [
        "dense | rate 0.01 | seed 0 | rounds 2 | val 50.00 % | test 51.00 % | 3.0 s"
    ]))  # fmt: skip
    before = (tmp_path / "tiny" / "table.csv").read_bytes()
    assert b"51.0" in before
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        write_tables(StudyResults(study, tmp_path))
    assert "left as it is" in caplog.text and (tmp_path / "tiny" / "table.csv").read_bytes() == before


@given(
    val=st.floats(0, 1),
    test=st.none() | st.floats(0, 1),
    seconds=st.floats(0, 1e5),
    rate=st.sampled_from([1e-05, 0.00316, 0.1, 10.0, 100.0]),
)
def test_a_line_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, val: float, test: float | None, seconds: float, rate: float
) -> None:
    root = tmp_path_factory.getbasetemp()
    path = root / "fixed.toml"
    path.write_text(STUDY.replace("learning-rate = 0.01", f"learning-rate = {rate}"))
    study = load_study(path)
    arm = study.arms[0]
    run = study.config(arm, rate, 2, 1, root)
    row = {"round": 2, "val_accuracy": val, "test_accuracy": test, "overhead_seconds": seconds}
    line = describe_run(arm, run, Outcome(State.DONE, (row,)), reported=test is not None)
    found = LoggedResults(study, root, [line]).outcome(run)
    assert found.state is State.DONE and found.seconds == pytest.approx(seconds, abs=0.06)
    for name, value in (("val_accuracy", val), ("test_accuracy", test)):
        assert found.rows[-1].get(name) == (None if value is None else pytest.approx(value, abs=5.1e-5))


def test_without_a_log_results_are_read_from_folders(tmp_path: Path) -> None:
    study = study_of(STUDY, tmp_path)
    results = StudyResults(study, tmp_path)
    assert results.outcome(results.final_runs(study.arms[0], Choice(0.01))[0]).state is State.TO_DO
