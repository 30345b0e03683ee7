"""Runs whose folder is unusable: they are done again, and their folder is kept in set-aside/."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import power_cut
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith import simulate
from fl_taskarith.errors import ConfigError
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.one_run import run_once
from fl_taskarith.study.results import State, StudyResults, run_folder
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import Choice, Trial
from fl_taskarith.study.tables import write_tables

pytestmark = pytest.mark.usefixtures("no_table_figures")


def _cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _cut_without_checksums(path: Path) -> None:
    _cut(path)
    (path.parent / "SHA256SUMS").unlink()


def _two_wrote(path: Path) -> None:
    _cut_without_checksums(path)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("file", "damage"),
    [("rounds.csv", _cut), ("rounds.csv", _cut_without_checksums), ("rounds.csv", _two_wrote), ("rounds.csv", _empty),
     ("rounds.csv", Path.unlink), ("run.json", _cut), ("run.json", _empty), ("run.json", Path.unlink),
     ("SHA256SUMS", _cut)],
)  # fmt: skip
def test_the_same_command_runs_again_what_reached_a_drive_in_part(
    tmp_path: Path,
    training: FakeTraining,
    file: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = study_of(SEARCHED, tmp_path)
    run_studies([study], tmp_path)
    results, done = StudyResults(study, tmp_path), len(training.runs)
    sound = (results.folder / "table.csv").read_bytes(), (results.folder / "search.csv").read_bytes()
    choice = results.choice(study.arms[0])
    assert choice is not None
    for run in (results.trial_runs(study.arms[0], Trial(0.001, 1))[0], results.final_runs(study.arms[0], choice)[1]):
        damage(run_folder(run) / file)
    capsys.readouterr()
    run_studies([study], tmp_path)
    printed = capsys.readouterr().out
    assert len(training.runs) == done + 2
    assert ((results.folder / "table.csv").read_bytes(), (results.folder / "search.csv").read_bytes()) == sound
    kept = list((results.runs.parent / "set-aside").glob("*"))
    assert len(kept) in (0, 2) and all(printed.count(str(folder)) == 1 for folder in kept)
    assert bool(kept) is (file != "run.json" or damage is _cut), "without run.json a run has not begun"


def test_what_is_damaged_is_told_and_keeps_neither_tables_nor_listings_from_the_rest(
    tmp_path: Path, training: FakeTraining
) -> None:
    study = study_of(SEARCHED + '[[arm]]\nname = "other"\nsettings = { local-steps = 2 }\n', tmp_path)
    run_studies([study], tmp_path)
    results = StudyResults(study, tmp_path)
    damaged = run_folder(results.trial_runs(study.arms[0], Trial(0.001, 1))[0]) / "rounds.csv"
    damaged.write_text(damaged.read_text()[:40])
    write_tables(StudyResults(study, tmp_path))
    rows = table(tmp_path / "searched" / "table.csv")
    assert {row["arm"]: row["n"] for row in rows} == {"dense": "0", "half": "0", "other": "2"}
    listed = "\n".join(list_study(StudyResults(study, tmp_path)))
    assert f"dense | unusable, and set aside before it is run again: {damaged}" in listed
    assert "Nothing is left" not in listed and damaged.exists()


OWN = """
from fl_taskarith.strategies.fedavg import FedAvg


class Mine(FedAvg):
    pass
"""


def test_an_arm_of_ones_own_module_is_done_again_once_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "edited_arm.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    study = study_of(
        STUDY.replace("[0, 1, 2]", "[0]").replace("trainable", 'strategy = "edited_arm:Mine", trainable'), tmp_path
    )
    run_studies([study], tmp_path)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "tiny" / "runs").iterdir()}
    file.write_text(OWN + "\n\nANOTHER = 1\n")
    monkeypatch.delitem(sys.modules, "edited_arm")  # as in another process
    importlib.invalidate_caches()
    listed = "\n".join(list_study(StudyResults(study, tmp_path)))
    assert "the module that strategy names has changed since the run in" in listed
    run_studies([study], tmp_path)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "tiny" / "runs").iterdir()}
    assert [name for name in after if after[name] != before[name]] == [name for name in after if "mine" in name]
    assert len(list((tmp_path / "tiny" / "set-aside").iterdir())) == 1
    with pytest.raises(ConfigError, match="has no attribute 'Mien'"):
        run_studies(
            [study_of(STUDY.replace("trainable", 'strategy = "edited_arm:Mien", trainable'), tmp_path)], tmp_path
        )
    file.unlink()
    monkeypatch.delitem(sys.modules, "edited_arm")
    importlib.invalidate_caches()
    write_tables(StudyResults(study, tmp_path))
    assert [row["n"] for row in table(tmp_path / "tiny" / "table.csv")] == ["1", "1"], (
        "tables need no module of ones own"
    )


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(STUDY.replace("[0, 1, 2]", "[0]"), tmp_path)
    (run, *_) = StudyResults(study, tmp_path).final_runs(study.arms[0], Choice(0.01))
    with power_cut(1):
        simulate(run)
    checkpoints = list((run_folder(run) / "checkpoints").glob("*.safetensors"))
    assert checkpoints
    for checkpoint in checkpoints:
        checkpoint.write_bytes(b"")
    outcome = run_once(run, deadline=None)
    assert outcome.state is State.DONE and "kept as" in outcome.cause
    assert len(list((tmp_path / "tiny" / "set-aside").glob("*/checkpoints/*"))) == len(checkpoints)
