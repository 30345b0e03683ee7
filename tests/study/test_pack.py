"""Runs in one file stand in for their folders: for tables, listings, resuming and plots."""

import shutil
from pathlib import Path

import pytest
from small_studies import SEARCHED, FakeTraining, study_of

from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError, Divergence, FolderInUse
from fl_taskarith.figures.run_groups import find_runs, members
from fl_taskarith.storage.folder_choice import hold
from fl_taskarith.storage.locks import owned
from fl_taskarith.storage.packed_runs import pack_of, read_pack, write_pack
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.pack import pack_runs
from fl_taskarith.study.results import StudyResults, read_outcome
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.tables import write_tables

pytestmark = pytest.mark.usefixtures("no_table_figures")


@pytest.fixture
def results(tmp_path: Path, training: FakeTraining) -> StudyResults:
    """A finished study with a search, one rate of which diverged."""
    usual = training.accuracy

    def accuracy(run: Config) -> float:
        if run.learning_rate == 10.0:
            raise Divergence("the loss is nan")
        return usual(run)

    training.accuracy = accuracy
    study = study_of(SEARCHED, tmp_path)
    run_studies([study], tmp_path)
    return StudyResults(study, tmp_path)


def tables(results: StudyResults) -> dict[str, bytes]:
    write_tables(StudyResults(results.study, results.folder.parent))
    return {
        path.name: path.read_bytes() for path in results.folder.iterdir() if path.suffix in (".md", ".csv", ".json")
    }


def test_packed_runs_are_not_run_again_and_tables_and_figures_stay(
    results: StudyResults, training: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, count = tables(results), len(training.runs)
    outcomes = {path: read_outcome(path) for path in results.runs.iterdir()}
    drawn, listed = members(find_runs([results.folder])), list(list_study(results, every_run=True))
    assert main(["study", str(tmp_path / "study.toml"), "--results-dir", str(tmp_path), "--pack"]) == 0
    assert f"{count} run folders went into {results.folder / 'runs.jsonl'}" in capsys.readouterr().out
    assert not list(results.runs.iterdir()) and len(training.runs) == count
    assert {path: read_outcome(path) for path in outcomes} == outcomes
    assert tables(results) == before
    assert list(list_study(StudyResults(results.study, tmp_path), every_run=True)) == listed
    run_studies([results.study], tmp_path)
    assert len(training.runs) == count
    for place in (results.folder, results.runs, pack_of(results.runs)):
        assert members(find_runs([place])) == drawn
    one = next(path for path, outcome in outcomes.items() if outcome.rows)
    assert find_runs([one])[0].rows == outcomes[one].rows


def test_only_one_process_packs_and_a_run_that_is_written_stays(results: StudyResults) -> None:
    pack, folders = pack_of(results.runs), sorted(results.runs.iterdir())
    with owned(pack), pytest.raises(FolderInUse, match="Another process is writing"):
        pack_runs(results.runs)
    assert not pack.exists() and sorted(results.runs.iterdir()) == folders
    lock = hold(folders[0])
    assert lock is not None
    assert pack_runs(results.runs) == (pack, len(folders) - 1)
    assert list(results.runs.iterdir()) == folders[:1] and len(read_pack(pack)) == len(folders)
    lock.release()
    assert pack_runs(results.runs) == (pack, 1)
    assert list(results.folder.glob("*.lock")) == []


def test_a_folder_wins_over_the_pack_and_packing_again_takes_it_in(
    results: StudyResults, training: FakeTraining, tmp_path: Path
) -> None:
    before = tables(results)
    pack, _ = pack_runs(results.runs)
    text = pack.read_text()
    assert pack_runs(results.runs) == (pack, 0) and pack.read_text() == text
    other = tmp_path / "other"
    usual = training.accuracy
    training.accuracy = lambda run: 0.25 if run.seed == 1 else usual(run)
    run_studies([results.study], other)
    folder = next((other / "searched" / "runs").glob("*-s1-*"))
    shutil.copytree(folder, results.runs / folder.name)
    assert tables(results) != before
    assert pack_runs(results.runs) == (pack, 1)
    assert read_pack(pack)[folder.name].rows[-1]["val_accuracy"] == 0.25
    changed = sum(old != new for old, new in zip(text.splitlines(), pack.read_text().splitlines(), strict=True))
    assert changed == 1, "a diff shows the run that changed"


def test_what_is_not_settled_stays_in_its_folder(results: StudyResults) -> None:
    first, second, *_ = sorted(results.runs.iterdir())
    (first / "run.json").write_text('{"status": "interrupted", "config": {}}')
    (first / "SHA256SUMS").unlink(missing_ok=True)
    (first / "failure.json").unlink(missing_ok=True)
    pack, number = pack_runs(results.runs)
    assert [path.name for path in results.runs.iterdir()] == [first.name]
    assert number == len(read_pack(pack)) and second.name in read_pack(pack)


def test_a_damaged_folder_or_pack_is_named_and_nothing_is_removed(results: StudyResults, tmp_path: Path) -> None:
    folder = next(path for path in results.runs.iterdir() if (path / "SHA256SUMS").exists())
    rounds = (folder / "rounds.csv").read_text()
    (folder / "rounds.csv").write_text(rounds.replace("0.5", "0.6", 1))
    count = len(list(results.runs.iterdir()))
    with pytest.raises(CheckpointError, match=r"rounds\.csv"):
        pack_runs(results.runs)
    assert len(list(results.runs.iterdir())) == count and not pack_of(results.runs).exists()
    (folder / "rounds.csv").write_text(rounds)
    pack, _ = pack_runs(results.runs)
    for damaged in (pack.read_text().replace("0.5", "0.6", 1), pack.read_text()[:-20], "{}"):
        broken = tmp_path / "broken" / "runs.jsonl"
        broken.parent.mkdir(exist_ok=True)
        broken.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"line \d+ of .*runs\.jsonl"):
            read_pack(broken)


def test_a_copied_folder_is_named_and_neither_pack_nor_folders_change(results: StudyResults) -> None:
    folder = next(path for path in sorted(results.runs.iterdir()) if read_outcome(path).rows)
    other = results.runs.parent / "other"
    folder.rename(other)
    pack, _ = pack_runs(results.runs)
    before = pack.read_bytes()
    shutil.copytree(other, results.runs / f"Copy of {folder.name}")
    other.rename(folder)
    with pytest.raises(CheckpointError, match=f"Copy of {folder.name} is a copy of the run {folder.name}: move it"):
        pack_runs(results.runs)
    assert pack.read_bytes() == before and len(list(results.runs.iterdir())) == 2
    shutil.rmtree(results.runs / f"Copy of {folder.name}")
    assert pack_runs(results.runs) == (pack, 1)


def test_a_pack_that_would_not_read_back_does_not_replace_one_that_does(results: StudyResults) -> None:
    pack, _ = pack_runs(results.runs)
    before, runs = pack.read_bytes(), dict(read_pack(pack))
    name = next(name for name, run in runs.items() if run.record is not None)
    with pytest.raises(CheckpointError, match="under another name"):
        write_pack(pack, {**runs, "another": runs[name]})
    assert pack.read_bytes() == before and list(pack.parent.glob(".*new*")) == []
    lines = before.decode().splitlines(keepends=True)
    pack.write_text(lines[0].replace(f'"runs": {len(runs)}', f'"runs": {len(runs) - 1}') + "".join(lines[2:]))
    assert len(read_pack(pack)) == len(runs) - 1, "what the message about a damaged line advises"


def test_an_empty_pack_and_no_pack_hold_no_runs(tmp_path: Path) -> None:
    assert read_pack(tmp_path / "runs.jsonl") == {}
    write_pack(tmp_path / "runs.jsonl", {})
    assert read_pack(tmp_path / "runs.jsonl") == {}


def test_a_pack_that_ends_too_early_and_a_link_in_place_of_a_folder_are_refused(results: StudyResults) -> None:
    first, *_ = sorted(results.runs.iterdir())
    elsewhere = results.runs.parent / "elsewhere"
    first.rename(elsewhere)
    first.symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(CheckpointError, match="is a link"):
        pack_runs(results.runs)
    first.unlink()
    elsewhere.rename(first)
    pack, number = pack_runs(results.runs)
    pack.write_text("".join(pack.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CheckpointError, match=f"counts {number} runs, not {number - 1}"):
        read_pack(pack)


def test_a_line_of_a_pack_under_another_name_is_told(results: StudyResults) -> None:
    diverged = next(path.name for path in results.runs.iterdir() if read_outcome(path).cause)
    pack, _ = pack_runs(results.runs)
    pack.write_text(pack.read_text().replace(f'"run": "{diverged}"', '"run": "digits-another"'))
    with pytest.raises(CheckpointError, match="another run under the name"):
        read_pack(pack)


def test_a_failure_of_another_run_is_not_this_ones(results: StudyResults) -> None:
    diverged = next(path for path in results.runs.iterdir() if read_outcome(path).cause)
    other = results.runs / "another"
    shutil.copytree(diverged, other)
    with pytest.raises(CheckpointError, match=f"is of the run .*{diverged.name}"):
        read_outcome(other)
