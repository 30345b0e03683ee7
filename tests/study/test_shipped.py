"""Results that came with the project stay known as such: in tables, listings and copies; a user's own runs do not."""

import json
import shutil
from pathlib import Path

import pytest
from report_studies import committed_results
from small_studies import SEARCHED, STUDY, FakeTraining, study_of

from fl_taskarith.storage.paths import shipped_file
from fl_taskarith.study import shipped
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.ship import shipped_digests
from fl_taskarith.study.shipped import LIST, count_shipped, is_shipped, origin_words
from fl_taskarith.study.tables import write_tables

pytestmark = pytest.mark.usefixtures("no_table_figures")


def ship(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what lies in `results` be what came with the project."""
    digests = {digest for family in shipped_digests(results).values() for digest in family}
    monkeypatch.setattr(shipped, "_known", lambda: frozenset(digests))


def test_every_committed_run_is_listed_and_its_tables_say_so() -> None:
    record = json.loads(shipped_file(LIST).read_text(encoding="utf-8"))
    results = committed_results()
    found = shipped_digests(results)
    assert "digits" in found and "cifar100" in found
    for family, digests in record["runs"].items():
        missing = set(digests.split()) - set(found.get(family, ()))
        assert not missing, "committed results are gone"
    tables = [path for path in results.rglob("runs.csv") if (path.parent / "settings.json").exists()]
    assert len(tables) >= 11
    for path in tables:
        number, finished = count_shipped(path)
        assert number == finished > 0, f"{path} has runs that are not listed: commit it with {LIST}, or not at all"
        assert origin_words(number, finished) in (path.parent / "README.md").read_text(encoding="utf-8").split("\n\n")


@pytest.mark.parametrize("text", [STUDY, SEARCHED])
def test_tables_and_listing_name_shipped_runs_again_and_again(
    text: str, tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(text, tmp_path)
    run_studies([study], tmp_path / "home")
    results = StudyResults(study, tmp_path / "home")
    readme = results.folder / "README.md"
    assert "shipped" not in readme.read_text() + "\n".join(list_study(results, every_run=True))
    ship(tmp_path / "home", monkeypatch)
    final = 6 if text == STUDY else 4
    for _ in range(2):
        write_tables(results)
        assert f"All {final} finished runs were shipped with fl_taskarith and run by its authors." in readme.read_text()
    listed = list(list_study(results, every_run=True))
    assert sum(line.endswith(" | shipped") for line in listed) == len(training.runs)
    assert f"All {len(training.runs)} finished runs were shipped with fl_taskarith and run by its authors." in listed

    shutil.copytree(results.folder, tmp_path / "copy" / study.name)
    copied = StudyResults(study, tmp_path / "copy")
    write_tables(copied)
    assert f"All {final} finished runs were shipped" in (copied.folder / "README.md").read_text()
    shutil.rmtree(copied.runs)  # as in a checkout that holds the tables alone
    write_tables(copied)
    assert f"All {final} finished runs were shipped" in (copied.folder / "README.md").read_text()
    expected = f"Of the tables in {copied.folder}: All {final} finished runs were shipped"
    assert any(line.startswith(expected) for line in list_study(copied))


def test_runs_of_ones_own_are_not_marked_and_a_mixture_is_counted(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(STUDY, tmp_path)
    run_studies([study], tmp_path / "home")
    ship(tmp_path / "home", monkeypatch)
    accuracy = training.accuracy
    training.accuracy = lambda run: accuracy(run) + 1 / 1024
    own = StudyResults(study, tmp_path / "own")
    run_studies([study], tmp_path / "own")
    assert {path.name for path in own.runs.iterdir()} == {path.name for path in (tmp_path / "home/tiny/runs").iterdir()}
    assert "shipped" not in (own.folder / "README.md").read_text() + "\n".join(list_study(own, every_run=True))
    for path in (tmp_path / "home" / "tiny" / "runs").glob("*-s1-*"):
        shutil.rmtree(own.runs / path.name)
        shutil.copytree(path, own.runs / path.name)
    own = StudyResults(study, tmp_path / "own")  # settled runs are read once
    write_tables(own)
    mixed = "2 of the 6 finished runs were shipped with fl_taskarith and run by its authors; the other 4 were not."
    assert mixed in (own.folder / "README.md").read_text()
    assert mixed in list(list_study(own))


def test_a_run_is_known_by_name_accuracy_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_known", lambda: frozenset({shipped.digest("a", 97.5, 11.25)}))
    assert is_shipped("a", 97.5, 11.25)
    assert not any(is_shipped(*run) for run in (("b", 97.5, 11.25), ("a", 97.25, 11.25), ("a", 97.5, 11.5), ("", 1, 1)))


def test_tables_that_are_missing_or_damaged_have_no_shipped_runs(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "cells.csv").write_text("run,state,test_percent,seconds\na,done,many,3\n")
    assert count_shipped(tmp_path / "none.csv") == count_shipped(tmp_path / "text.csv") == (0, 0)
    assert count_shipped(tmp_path / "cells.csv") == (0, 0)
