"""Study files, and the tables that are made of their runs."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import own_mask_rule
import pytest
from small_studies import SEARCHED, STUDY, FakeTraining, study_of, table

from fl_taskarith.cli.command import main
from fl_taskarith.errors import (
    ConfigError,
)
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies, run_what_is_left
from fl_taskarith.study.study_file import load_studies, load_study
from fl_taskarith.study.tables import write_tables

pytestmark = pytest.mark.usefixtures("no_table_figures")

# study files


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds = [0, 1]", "seed = [0, 1]", 'did you mean "seeds"'),
        ("seeds = [0, 1]", "seeds = []", "seeds"),
        ("seeds = [0, 1]", "seeds = [0, 0.5]", "seeds, number 2 = 0.5 is not accepted: expected a whole number"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "each once"),
        ('name = "searched"', 'name = "../out"', "plain folder name"),
        ('name = "searched"', "", "name is missing"),
        ("num-clients = 10", "num-client = 10", 'did you mean "num-clients"'),
        ("num-clients = 10", "run-name = 'mine'", "run-name is set by the study"),
        ("num-clients = 10", "learning-rate = 0.1", "contradicts [search]"),
        ("num-clients = 10", "validation-size = 0\nridge-lambda = 1.0\nlogit-scale = 1.0", "validation-size above 0"),
        ("num-clients = 10", 'on-client-failure = "skip"', 'arm "dense": on-client-failure'),
        ('"dense"\n[[arm]]', '"dense"\nsettings = { on-client-failure = "skip" }\n[[arm]]', 'leave it at "stop"'),
        ("num-clients = 10", "warmup-rounds = 2", "searched with num-rounds = 1"),
        ("to = 10.0", "to = 1.0", "4 decades"),
        ("to = 10.0", "to = 'high'", 'to = "high" is not accepted: expected a number'),
        ("from = 1e-3", "", "from is missing"),
        ("per-decade = 1", "per-decade = 0", "per-decade"),
        ("to = 10.0", "to = 20.0", "does not divide"),
        ("rounds = [1, 2]", "rounds = [2, 1]", "rising"),
        ("keep = 2", "keep = 6", "keep = 6"),
        ('"dense"\n[[arm]]', '"dense"\nsearch = { to = 1.0 }\n[[arm]]', '[[arm]] "dense": search: from = 0.001'),
        ('"dense"\n[[arm]]', '"dense"\nsearch = { till = 9 }\n[[arm]]', 'search: "till" is not a key'),
        ('"dense"\n[[arm]]', '"dense"\nsearch = { seed = 1 }\n[[arm]]', "no seed of its own"),
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


def test_an_arm_may_search_otherwise_and_those_that_take_its_rate_follow(tmp_path: Path) -> None:
    own = SEARCHED.replace('"dense"\n[[arm]]', '"dense"\nsearch = { to = 100.0, rounds = [3, 5] }\n[[arm]]')
    study = study_of(own, tmp_path)
    assert study.search is not None
    assert study.search.rates == (0.001, 0.01, 0.1, 1.0, 10.0)
    for arm in study.arms:
        search = study.searched(arm)
        assert search is not None
        follows = arm.label == "dense" or arm.same_rate_as == "dense"
        assert (search.rates[-1], search.rounds) == ((100.0, (3, 5)) if follows else (10.0, (1, 2)))
    without = own[: own.index("[search]")] + own[own.index("[[arm]]") :]
    with pytest.raises(ConfigError, match=r"changes the study's \[search\], and there is none"):
        study_of(without, tmp_path)


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
    assert [arm.title for arm in study.in_turn[:3]] == [
        "iid: dense, local-steps = 4", "Nc = 1: dense, local-steps = 4", "iid: dense, local-steps = 8",
    ]  # fmt: skip


def test_an_arm_may_name_several_groups(tmp_path: Path) -> None:
    groups = "".join(f'[[group]]\nname = "{name}"\n' for name in ("a", "b", "c"))
    text = f'name = "x"\nseeds = [0]\n{groups}[[arm]]\nname = "one"\ngroup = ["a", "c"]\n'
    text += '[[arm]]\nname = "two"\ngroup = "b"\n'
    assert [arm.title for arm in study_of(text, tmp_path).arms] == ["a: one", "b: two", "c: one"]
    for wrong in ("[]", "[1]", "2"):
        with pytest.raises(ConfigError, match=r'\[\[arm\]\] "one": group = .*expected the name of a group'):
            study_of(text.replace('["a", "c"]', wrong), tmp_path)


@pytest.mark.parametrize(
    ("file", "problem"),
    [('[[group]]\nname = "Nc = 1"\n[[arm]]\nname = "a"\ngroup = "Nc=1"\n',
      r'group = "Nc=1": there is no such \[\[group\]\]; they are "Nc = 1"'),
     ('[[group]]\nname = "b"\n[[group]]\nname = "c"\n[[arm]]\nname = "a"\ngroup = "c"\n',
      r'\[\[group\]\] "b" has no arm')],
)  # fmt: skip
def test_a_group_that_nobody_is_in_or_that_does_not_exist_is_refused(file: str, problem: str, tmp_path: Path) -> None:
    head = 'name = "x"\nseeds = [0]\n[settings]\nmask-rule = "none"\nlearning-rate = 0.1\n'
    with pytest.raises(ConfigError, match=problem):
        study_of(head + file, tmp_path)


def test_two_studies_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(STUDY)
    with pytest.raises(ConfigError, match=r'second\.toml: name = "tiny" is that of .*first\.toml, too'):
        load_studies([tmp_path / "first.toml", tmp_path / "second.toml"])


def test_tables_and_settings_say_that_a_search_brackets_its_winner(tmp_path: Path, training: FakeTraining) -> None:
    run_studies([study_of(SEARCHED.replace("keep = 2", "keep = 1\nbracket = true"), tmp_path)], tmp_path)
    words = "and for as many the rates beside the winner, until both are worse"
    assert words in (tmp_path / "searched" / "README.md").read_text()
    assert json.loads((tmp_path / "searched" / "settings.json").read_text())["search"]["bracket"] is True
    long = {row["learning_rate"] for row in table(tmp_path / "searched" / "search.csv") if row["rounds"] == "2"}
    assert len(long) == 3


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


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "conf" / "study").rglob("*.toml")), ids=str)
def test_the_shipped_study_files_are_valid(path: Path) -> None:
    assert load_study(path).arms


# tables


def test_the_tables_against_numbers_by_hand(tmp_path: Path, training: FakeTraining) -> None:
    dense, head = {0: 0.90, 1: 0.92, 2: 0.94}, {0: 0.91, 1: 0.95, 2: 0.96}
    training.accuracy, training.test = (
        lambda run: (head if run.trainable == "head" else dense)[run.seed],
        lambda same: same,
    )
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


def test_an_arm_that_does_not_train_sends_nothing_per_round(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.9
    untrained = '[[arm]]\nname = "ridge head"\nsettings = { learning-rate = 0.0 }\n'
    run_studies([study_of(STUDY + untrained, tmp_path)], tmp_path)
    uplinks = {line["arm"]: line["uplink_megabytes"] for line in table(tmp_path / "tiny" / "table.csv")}
    assert uplinks == {"dense": "3.0", "head alone": "3.0", "ridge head": ""}


def test_a_table_with_another_head_calls_none_of_them_ridge(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.9
    lda = '[[arm]]\nname = "lda"\nsettings = { head = "lda", learning-rate = 0.1 }\n'
    run_studies([study_of(STUDY + lda, tmp_path)], tmp_path)
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert "| head, test % |" in written and "gain over head [95 % CI]" in written
    lines = {line["arm"]: line for line in table(tmp_path / "tiny" / "table.csv")}
    assert lines["lda"]["ridge_test_percent"] and lines["lda"]["gain_mean"]


def test_a_table_is_made_from_folders_alone_and_says_what_was_not_run(tmp_path: Path, training: FakeTraining) -> None:
    run_studies([study_of(STUDY.replace("[0, 1, 2]", "[1]"), tmp_path)], tmp_path)
    for leftover in ("README.md", "table.csv"):
        (tmp_path / "tiny" / leftover).unlink()
    more = study_of(STUDY + '[[arm]]\nname = "new"\nsettings = { batch-size = 8, learning-rate = 1.0 }\n', tmp_path)
    write_tables(StudyResults(more, tmp_path))
    assert len(training.runs) == 2
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert "| new | 1 | – | not run | 0 |" in written
    assert "| 10.90 | 1 of 3 |" in written, "one seed has no ±"


def test_a_table_needs_no_module_of_a_mask_rule_and_a_study_to_run_does(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = 'learning-rate = 0.1, mask-source = "clients", fisher-labels = "true"'
    for rule in ("MIDDLING", "MISSING"):
        (tmp_path / f"{rule}.toml").write_text(
            STUDY + f'[[arm]]\nname = "own"\nsettings = {{ mask-rule = "left_at_home:{rule}", {settings} }}\n'
        )
    words = ["study", str(tmp_path / "MIDDLING.toml"), f"--results-dir={tmp_path}"]
    with monkeypatch.context() as at_hand:
        at_hand.setitem(sys.modules, "left_at_home", own_mask_rule)
        assert main(words) == 0
    (tmp_path / "tiny" / "README.md").unlink()
    assert main([*words, "--tables"]) == 0
    assert "| own |" in (tmp_path / "tiny" / "README.md").read_text()
    done = len(training.runs)
    assert main(["study", str(tmp_path / "MISSING.toml"), f"--results-dir={tmp_path / 'other'}"]) == 1
    assert 'ConfigError: mask-rule = "left_at_home:MISSING" cannot be imported' in capsys.readouterr().err
    assert len(training.runs) == done and not (tmp_path / "other").exists(), "not even the arms before it are run"


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
    for name in ("accuracy-iid", "accuracy-nc-2", "groups"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"({name}.png)" in (folder / "README.md").read_text()


@pytest.mark.figures
def test_a_lone_arm_among_arms_that_were_not_run_has_no_figure(tmp_path: Path, training: FakeTraining) -> None:
    study = study_of(STUDY, tmp_path)
    only = dataclasses.replace(study, arms=study.arms[:1])
    run_what_is_left([StudyResults(only, tmp_path)])
    write_tables(StudyResults(study, tmp_path))
    assert not list((tmp_path / "tiny").glob("*.png"))
    write_tables(StudyResults(only, tmp_path))
    assert (tmp_path / "tiny" / "accuracy.png").exists() and not (tmp_path / "tiny" / "groups.png").exists()


def test_tables_are_not_replaced_by_those_of_nothing(
    tmp_path: Path, training: FakeTraining, caplog: pytest.LogCaptureFixture
) -> None:
    study = study_of(STUDY, tmp_path)
    write_tables(StudyResults(study, tmp_path))
    run_studies([study], tmp_path)
    before = (tmp_path / "tiny" / "table.csv").read_bytes()
    assert b"89.1" in before
    shutil.rmtree(tmp_path / "tiny" / "runs")
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        write_tables(StudyResults(study, tmp_path))
    assert "left as it is" in caplog.text and (tmp_path / "tiny" / "table.csv").read_bytes() == before


def test_tables_of_another_study_file_of_the_same_name_are_not_replaced_in_silence(
    tmp_path: Path, training: FakeTraining, caplog: pytest.LogCaptureFixture
) -> None:
    first = study_of(STUDY, tmp_path)
    run_studies([first], tmp_path)
    table = tmp_path / "tiny" / "table.csv"
    before = table.read_bytes()
    second = study_of(STUDY.replace(f'name = "{first.arms[-1].name}"', 'name = "renamed"'), tmp_path)
    assert first.arms[-1].title not in {arm.title for arm in second.arms}
    with caplog.at_level("WARNING", logger="fl_taskarith"):
        run_studies([first], tmp_path)
        assert not caplog.text
        run_studies([second], tmp_path)
    assert f"tables with arms that this study file lacks: {first.arms[-1].title}." in caplog.text
    write_tables(StudyResults(first, tmp_path))
    assert table.read_bytes() == before, "the other file's tables come back"
    table.write_bytes(before[:-5])
    caplog.clear()
    write_tables(StudyResults(second, tmp_path))
    assert not caplog.text and b"renamed" in table.read_bytes()
