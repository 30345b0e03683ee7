"""Real runs of a study, its search and its budget; what studies share."""

import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
from conftest import numbers, power_cut
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import BudgetSpent, ConfigError
from fl_taskarith.server.speed import Speed
from fl_taskarith.storage.run_folder import Logbook, read_rounds
from fl_taskarith.storage.verified_files import CHECKSUM_DIGITS
from fl_taskarith.study import listing, monitor, runner
from fl_taskarith.study.listing import list_study, share_left
from fl_taskarith.study.monitor import Monitor
from fl_taskarith.study.one_run import run_once
from fl_taskarith.study.plan import plans_of
from fl_taskarith.study.results import State, StudyResults, run_folder
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import Choice
from fl_taskarith.study.study_file import load_study

pytestmark = pytest.mark.usefixtures("no_table_figures")

# real runs


def test_a_real_study_leaves_what_simulate_leaves_and_no_checkpoints(tmp_path: Path) -> None:
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    run_studies([study], tmp_path)
    folder = next((tmp_path / "tiny" / "runs").glob("*"))
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert "test accuracy" in (folder / "run.log").read_text()
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


def test_records_of_finished_runs_count_in_a_checkout_elsewhere(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(STUDY, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("fl_taskarith.storage.paths.checkout", lambda: tmp_path / "here")
    run_studies([study], tmp_path / "here" / "results")
    done = len(training.runs)
    for record in (tmp_path / "here" / "results" / "tiny" / "runs").glob("*/run.json"):
        assert str(tmp_path) not in json.dumps(json.loads(record.read_text())["config"])
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr("fl_taskarith.storage.paths.checkout", lambda: tmp_path / "there")
    run_studies([study], tmp_path / "there" / "results")
    assert len(training.runs) == done > 0


def test_the_last_rung_may_have_more_seeds(tmp_path: Path, training: FakeTraining) -> None:
    """Seed 1 loses at the rate that is best for seed 0 alone, so the mean over both takes another."""
    training.accuracy = lambda config: {1.0: 0.9 if config.seed == 0 else 0.1, 0.1: 0.8}.get(config.learning_rate, 0.2)
    chosen = {}
    for last in ("", "last-seeds = [0, 1]\n"):
        study = study_of(SEARCHED.replace("keep = 2\n", f"keep = 2\n{last}"), tmp_path)
        root = tmp_path / f"{len(last)}"
        run_studies([study], root)
        results = StudyResults(study, root)
        chosen[last] = results.choice(study.arms[0])
        assert study.search is not None and study.search.trials == (9 if last else 7)
        assert len(list((root / "searched" / "runs").iterdir())) == (11 if last else 10)
        assert not any(plan.left() for plan in plans_of(results))
    assert {last: choice.rate for last, choice in chosen.items() if choice} == {"": 1.0, "last-seeds = [0, 1]\n": 0.1}
    assert "the last rung averaged over seeds 0, 1" in (root / "searched" / "README.md").read_text()
    assert json.loads((root / "searched" / "settings.json").read_text())["search"]["last_seeds"] == [0, 1]


@pytest.mark.usefixtures("no_table_figures")
def test_runs_of_a_machine_that_chose_another_precision_are_told(
    tmp_path: Path, training: FakeTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    run_studies([load_study(path, {"precision": "fp16"})], tmp_path)
    told = "6 of the runs left were finished under precision=fp16, as another machine chose"
    assert told in "\n".join(list_study(StudyResults(load_study(path), tmp_path)))
    for words in (["--tables"], []):
        assert main(["study", str(path), "--results-dir", str(tmp_path), *words]) == 0
        assert (told in capsys.readouterr().out) is True
    assert told not in "\n".join(list_study(StudyResults(load_study(path), tmp_path))), "nothing is left"


def test_what_is_left_of_a_run_that_was_cut_counts_from_its_checkpoint(tmp_path: Path, quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, num_rounds=8, checkpoint_every=3, run_name="cut")
    with power_cut(after_round=5):
        simulate(config)
    assert (share_left(config), share_left(config, going=True)) == (1 - 3 / 8, 1 - 5 / 8)


def test_an_arm_that_stands_in_two_tables_has_its_runs_once(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "conf" / "study" / "digits" / "six-models.toml").read_text()
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
        ["--from", "1e-3", "--to", "10", "--rounds", "1", "2", "--results-dir", str(tmp_path)],
    )
    assert main([*words, *command, "--no-bracket"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "learning-rate = 0.1"
    assert [(run.learning_rate, run.num_rounds) for run in training.runs[9:]] == [(0.1, 2), (0.316, 2)]
    (found,) = tmp_path.glob("search/*/search.csv")
    assert [row["learning_rate"] for row in table(found) if row["chosen"] == "True"] == ["0.1", "0.1"]
    assert main([*words, *command]) == 0
    assert [(run.learning_rate, run.num_rounds) for run in training.runs[11:]] == [(0.0316, 2)], (
        "the winner's neighbour"
    )
    assert main([*words, *command]) == 0
    assert len(training.runs) == 12
    training.accuracy = lambda run: run.learning_rate / 100
    assert main([*words, "local-steps=2", *command]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "learning-rate = 10 (an end of the grid: not tuned)"
    assert main([*words, *command, "--to", "1"]) == 1
    assert "do not span 4 decades" in capsys.readouterr().err


def test_the_time_left_is_that_of_the_images_at_the_measured_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "speed_of", lambda run, seconds: Speed(training=2.0, evaluation=1e9))
    lines = list(list_study(StudyResults(study_of(STUDY, tmp_path), tmp_path)))
    images = 6 * 2 * 2 * 1 * 16  # runs x rounds x clients x steps x batch
    assert lines[-1] == f"Left: 6 runs of 12 rounds, about {images / 2 / 60:.0f} minutes of one process here."
    with pytest.raises(ConfigError, match="images-per-second is measured"):
        study_of("images-per-second = 2\n" + STUDY, tmp_path)


def test_a_summary_fits_on_a_screen_however_many_arms_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "speed_of", lambda run, seconds: Speed(training=2.0, evaluation=1e9))
    arms = "".join(f'[[arm]]\nname = "arm {n}"\nsettings = {{ learning-rate = {n}.5 }}\n' for n in range(3))
    groups = "".join(f'[[group]]\nname = "group {n}"\nsettings = {{ batch-size = {n + 1} }}\n' for n in range(33))
    lines = list(list_study(StudyResults(study_of(STUDY + groups + arms, tmp_path), tmp_path)))
    assert len(lines) <= 40
    assert lines[2].split()[:3] == ["group", "0", "5"], "two arms of the study and three more"


def test_a_study_says_a_line_a_minute_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = StudyResults(study_of(STUDY, tmp_path), tmp_path)
    (arm, _), folder = results.study.arms, None
    run = results.final_runs(arm, results.choice(arm))[0]
    with Monitor([results], jobs=1) as watching:
        watching.begins(arm, run)
        folder = run_folder(run)
        folder.mkdir(parents=True)
        (folder / "rounds.csv").write_text("round,x\n0,\n1,\n")
        watching.report()
    line = capsys.readouterr().out.strip()
    assert line.startswith("arm 1 of 2 (dense, rate 0.01, seed 0): round 1 of 2, ")
    assert re.search(r"left; study: about \d+ s left for 6 runs$", line), line
    assert line in (tmp_path / "tiny" / "study.log").read_text()


def test_in_a_notebook_a_bar_shows_how_long_the_study_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(monitor, "in_notebook", lambda: True)
    monkeypatch.setattr(monitor, "EVERY", 0.5)
    monkeypatch.setattr(listing, "speed_of", lambda run, seconds: Speed(training=2.0, evaluation=1e9))
    results = StudyResults(study_of(STUDY, tmp_path), tmp_path)
    arm = results.study.arms[0]
    run = results.final_runs(arm, results.choice(arm))[0]
    with Monitor([results], jobs=1) as watching:
        assert re.fullmatch(r"Measured here: about .* left for 6 runs\.\n", capsys.readouterr().out)
        watching.begins(arm, run)
        folder = run_folder(run)
        folder.mkdir(parents=True)
        (folder / "rounds.csv").write_text("round,x\n0,\n1,\n")
        shown, until = "", time.monotonic() + 20
        while "8 %" not in shown and time.monotonic() < until:
            time.sleep(0.05)
            shown += capsys.readouterr().err
        assert re.search(r"  8 %\|.*, .* left, dense, seed 0", shown), "one of twelve rounds"
        while "round 1 of 2" not in (tmp_path / "tiny" / "study.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        (folder / "rounds.csv").write_text("round,x\n0,\n1,\n2,\n")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / f"round-000002-{'0' * CHECKSUM_DIGITS}.safetensors").touch()
        watching.ends(run)
    printed = capsys.readouterr()
    assert "round 1 of 2" not in printed.out and " 17 %|" in printed.err
    assert "round 1 of 2" in (tmp_path / "tiny" / "study.log").read_text()


def test_in_a_notebook_a_finished_study_says_so(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    assert "Nothing is left" not in capsys.readouterr().out
    monkeypatch.setattr(monitor, "in_notebook", lambda: True)
    run_studies([study], tmp_path)
    printed = capsys.readouterr()
    assert printed.out.startswith("Nothing is left to do.\n") and "%|" not in printed.err


def test_what_is_done_is_not_run_again_beside_what_is_open(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path)
    for record in (tmp_path / "tiny" / "runs").glob("*-s0-*/run.json"):  # seed 0 of both arms was interrupted
        record.write_text(record.read_text().replace('"finished"', '"interrupted"', 1))
        (record.parent / "SHA256SUMS").unlink()
    monkeypatch.setattr("fl_taskarith.study.runner._workers", lambda jobs: contextlib.nullcontext(runner.Here()))
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
    monkeypatch.setattr("fl_taskarith.study.runner._workers", lambda jobs: contextlib.nullcontext(runner.Here()))
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
