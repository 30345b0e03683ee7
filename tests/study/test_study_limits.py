"""Study files beyond all bounds, names that mean something elsewhere, and folders that cannot be written."""

import csv
import re
from pathlib import Path

import pytest
from small_studies import SEARCHED, STUDY, FakeTraining, study_of

from fl_taskarith.errors import CheckpointError, ConfigError, StudyError
from fl_taskarith.storage.csv_text import plain_words
from fl_taskarith.storage.files import make_folder
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.search import MOST_RUNS, Search
from fl_taskarith.study.tables import write_tables

GRID = 'name = "big"\nseeds = [0]\n[settings]\nlearning-rate = 0.1\n[grid]\n'


def test_lists_of_runs_are_counted_before_they_are_made(tmp_path: Path) -> None:
    many = list(range(1, 101))
    with pytest.raises(ConfigError, match=r"100,000,000 runs are asked for: expected no more than 4,000"):
        keys = ("local-steps", "batch-size", "num-rounds", "num-clients")
        study_of(GRID + "".join(f"{key} = {many}\n" for key in keys), tmp_path)
    with pytest.raises(ConfigError, match=r"40,000 runs are asked for"):
        study_of(STUDY.replace("[0, 1, 2]", str(list(range(20_000)))), tmp_path)
    with pytest.raises(ConfigError, match=r"runs are asked for"):
        study_of(STUDY + "".join(f'[[group]]\nname = "g{n}"\n' for n in range(MOST_RUNS // 5)), tmp_path)
    with pytest.raises(ConfigError, match=r"4,009 runs are asked for"):
        Search(1e-3, 10.0, 2, tuple(range(1, 2002)), 2, (0,))
    with pytest.raises(ConfigError, match=r"\[search\]: 4,003 runs are asked for"):
        study_of(SEARCHED.replace("rounds = [1, 2]", f"rounds = {list(range(1, 2001))}"), tmp_path)


def test_a_study_may_be_as_large_as_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.study.search.MOST_RUNS", 6)
    assert len(study_of(STUDY, tmp_path).arms) * 3 == 6
    with pytest.raises(ConfigError, match="8 runs are asked for: expected no more than 6"):
        study_of(STUDY.replace("[0, 1, 2]", "[0, 1, 2, 3]"), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds = [0, 1]", "seeds = [-1]", "seeds, number 1 = -1 is not accepted: expected a whole number from 0"),
        ("seeds = [0, 1]", "seeds = [1" + "0" * 400 + "]", "seeds, number 1 = 1000"),
        ("seeds = [0, 1]", "seeds = 3", "seeds = 3: expected a list"),
        ("from = 1e-3", "from = -1.0", "from = -1.0 is not accepted: expected a number above 0"),
        ("from = 1e-3", "from = nan", "from = nan"),
        ("to = 10.0", "to = 1" + "0" * 400, "to = 1000"),
        ("to = 10.0", "to = inf", "to = inf"),
        ("from = 1e-3", "from = 1e-320", "[search]"),
        ("keep = 2", "keep = 1e400", "keep = inf"),
        ("keep = 2", "keep = true", "keep = true"),
        ("rounds = [1, 2]", "rounds = [[1]]", "rounds, number 1 = [1]"),
        ("rounds = [1, 2]", "rounds = []", "rising whole numbers"),
        ('name = "searched"', 'name = ""', 'name = "" is not accepted: expected a string of 1 to 200 characters'),
        ('name = "dense"', 'name = "a\\nb"', "without line breaks"),
        ('name = "dense"', f'name = "{"x" * 301}"', "expected a string of 0 to 300 characters"),
        ("num-clients = 10", "num-clients = { a = 1 }", "num-clients = {'a': 1} is not accepted"),
        ("num-clients = 10", "num-clients = 10\nnum_clients = 10", '"num-clients" is given twice'),
        ("[settings]", "num-rounds = 3\n[settings]", "put them below a line [settings]"),
        ("[settings]", "[grid]\nlocal-steps = [4]\nlocal_steps = [8]\n[settings]", "local-steps is given twice"),
        ("[settings]", "[grid]\nlocal-steps = [{}, []]\n[settings]", "local-steps = {}"),
    ],
)  # fmt: skip
def test_a_value_of_any_type_and_size_is_refused_by_its_place(
    old: str, new: str, expected: str, tmp_path: Path
) -> None:
    assert old in SEARCHED
    with pytest.raises(ConfigError) as caught:
        study_of(SEARCHED.replace(old, new, 1), tmp_path)
    assert expected in str(caught.value) and "study.toml" in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.usefixtures("no_table_figures")
def test_no_name_of_an_arm_breaks_a_table_or_runs_in_a_spreadsheet(tmp_path: Path, training: FakeTraining) -> None:
    name = '=HYPERLINK(\\"x\\")|a'
    study = study_of(
        STUDY.replace('"head alone"', f'"{name}"').replace('reference = "dense"', f'reference = "{name}"'), tmp_path
    )
    run_studies([study], tmp_path)
    folder = tmp_path / "tiny"
    for file in ("table.csv", "runs.csv", "curves.csv"):
        rows = list(csv.DictReader((folder / file).read_text(encoding="utf-8").splitlines()))
        cells = [cell for row in rows for cell in row.values()]
        assert cells and not any(re.match("[=@]", cell) for cell in cells), file
        assert {plain_words(row["arm"]) for row in rows} == {"dense", '=HYPERLINK("x")|a'}
    lines = [line for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.usefixtures("no_table_figures")
def test_a_run_whose_folder_cannot_be_made_fails_and_the_others_go_on(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> None:
        if "-s0-" in folder.name and "lr0.01" in folder.name:
            raise CheckpointError("Cannot make the folder.")
        make_folder(folder)

    monkeypatch.setattr("fl_taskarith.study.one_run.make_folder", make)
    with pytest.raises(StudyError, match=r"1 failed.*\n.*dense, seed 0: Cannot make the folder"):
        run_studies([study_of(STUDY, tmp_path)], tmp_path)
    assert len(training.runs) == 5


def test_results_that_cannot_be_written_are_refused_before_the_first_run(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(STUDY, tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "runs")
    with pytest.raises(CheckpointError, match="runs: nothing can be written in it"):
        run_studies([study], tmp_path)
    assert not training.runs
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot make the folder"):
        write_tables(StudyResults(study, tmp_path / "file"))
