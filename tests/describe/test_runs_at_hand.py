"""Lists of the runs, studies and searches in a results folder."""

import dataclasses
from pathlib import Path

import pytest
from conftest import power_cut
from small_studies import STUDY, FakeTraining

import fl_taskarith
from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.describe.runs_at_hand import describe_results, searches
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.report.read_results import read_studies
from fl_taskarith.study.one_search import search_rate
from fl_taskarith.study.search import Search


def test_every_run_has_a_row_whatever_its_state(quick_config: Config) -> None:
    done = simulate(dataclasses.replace(quick_config, run_name="done", schedule="cosine"))
    with power_cut(after_round=1):
        simulate(dataclasses.replace(quick_config, run_name="cut", seed=1))
    root = Path(quick_config.results_dir)
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("[")
    frame = fl_taskarith.results(str(root)).set_index("run")
    assert frame["state"].to_dict() == {"done": "finished", "cut": "failed", "broken": "unreadable"}
    assert frame.loc["done", "test_accuracy"] == pytest.approx(100 * done.rows[-1]["test_accuracy"])
    assert frame.loc["done", "gain"] == pytest.approx(done.gain)
    assert (frame.loc["cut", "round"], frame.loc["cut", "rounds"], frame.loc["cut", "seed"]) == (1, 3, 1)
    assert (
        frame.loc["done", "learning_rate"] == 0.01 != done.rows[-1]["learning_rate"] and (frame["age_hours"] < 1).all()
    )
    printed = "\n".join(describe_results(str(root)))
    assert "runs, newest first" in printed and "broken" in printed and "distance" not in printed


def test_an_empty_folder_says_how_to_start(tmp_path: Path) -> None:
    assert fl_taskarith.results(str(tmp_path)).empty and fl_taskarith.studies(str(tmp_path)).empty
    assert "fl-taskarith simulate" in "\n".join(describe_results(str(tmp_path)))
    with pytest.raises(ConfigError, match="There is no folder"):
        list(describe_results(str(tmp_path / "nothing")))


def test_a_study_is_a_function_and_its_best_arm_is_that_of_validation(tmp_path: Path, training: FakeTraining) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    table = fl_taskarith.study(tmp_path / "study.toml", results_dir=str(tmp_path), batch_size=8)
    assert list(table["arm"]) == ["dense", "head alone"] and set(table["study"]) == {"tiny"}
    assert all(run.batch_size == 8 for run in training.runs)
    (row,) = fl_taskarith.studies(str(tmp_path)).to_dict("records")
    assert (row["arms"], row["finished"]) == (2, 2)
    settings = tmp_path / "tiny" / "settings.json"
    settings.write_text(settings.read_text().replace('"seeds": [\n  0,', '"seeds": [\n  9,\n  0,'))
    assert fl_taskarith.studies(str(tmp_path)).loc[0, "finished"] == 0, "a seed is missing everywhere"
    content = (tmp_path / "tiny" / "table.csv").read_bytes()
    (tmp_path / "tiny" / "table.csv").write_bytes(b"")
    assert fl_taskarith.studies(str(tmp_path)).loc[0, "best_arm"] == "unreadable"
    with pytest.raises(CheckpointError, match=r"table\.csv: it is empty|table\.csv.*it is empty"):
        read_studies(tmp_path)
    (tmp_path / "tiny" / "table.csv").write_bytes(content)
    assert (row["study"], row["arms"], row["finished"], row["best_arm"]) == ("tiny", 2, 2, "head alone")
    assert table["test_percent"].idxmax() == 0, "on test the other arm is better"


def test_a_search_is_listed_with_its_choice_and_at_an_end_of_its_grid_called_so(
    tmp_path: Path, training: FakeTraining
) -> None:
    search = Search(1e-3, 10.0, 1, (1, 2), 2, (0,))
    path, _ = search_rate(load(overrides={"mask_rule": "none"}), search, tmp_path)
    (row,) = searches(str(tmp_path)).to_dict("records")
    assert (row["search"], row["learning_rate"], row["tuned"]) == (f"search/{path.parent.name}", 0.1, "yes")
    assert row["trials"] == search.trials and row["val_accuracy"] == pytest.approx(
        100 * training.accuracy(load(overrides={"learning_rate": 0.1}))
    )
    assert "searches" in "\n".join(describe_results(str(tmp_path)))
    training.accuracy = lambda run: 0.5 + 0.01 * run.learning_rate
    search_rate(load(overrides={"mask_rule": "none", "seed": 1}), search, tmp_path / "edge")
    (row,) = searches(str(tmp_path / "edge")).to_dict("records")
    assert (row["learning_rate"], row["tuned"]) == (10.0, "no, an end of the grid")
    next((tmp_path / "edge").rglob("search.csv")).write_text("learning_rate\nx\n")
    assert searches(str(tmp_path / "edge")).loc[0, "tuned"] == "unreadable"


def test_a_mask_is_a_function(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('train-subset = 300\nmask-rule = "random"\ndensity = 0.2\n')
    mask = fl_taskarith.mask(path, output=tmp_path / "mask", results_dir=str(tmp_path))
    assert mask.density == pytest.approx(0.2, abs=1e-3)
    assert (tmp_path / "mask" / "mask.safetensors").exists()
