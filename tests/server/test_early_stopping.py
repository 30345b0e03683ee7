"""Early stopping and the best model on validation: by the rows alone, exact after a cut, and told wherever a run is."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import PowerCutError, final_weights, numbers, power_cut, same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_studies import study_of, table

from fl_taskarith import History, simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.describe.evaluation import evaluate_run
from fl_taskarith.errors import CheckpointError, ConfigError, WeightsError
from fl_taskarith.server.course import rounds_since_best, stops_early
from fl_taskarith.storage import run_folder
from fl_taskarith.storage.checkpoint import BEST, list_checkpoints, load_latest_checkpoint, save_best
from fl_taskarith.storage.run_folder import COLUMNS, WAITING, best_row, read_rounds
from fl_taskarith.storage.verified_files import read_checksums
from fl_taskarith.study.pack import pack_runs
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.tables import write_tables


@pytest.fixture
def wavering(quick_config: Config) -> Config:
    """Validation is best at round 1, and again from round 5 on."""
    return dataclasses.replace(
        quick_config, mask_rule="random", density=0.2, learning_rate=0.03, num_rounds=8, checkpoint_every=3
    )


COLLAPSING: dict[str, Any] = {"strategy": "centralized", "train_subset": 160, "learning_rate": 0.03, "num_rounds": 8}


def best_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-best.safetensors")


CELL = st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.lists(CELL, min_size=1, max_size=12), st.integers(0, 4), st.integers(1, 3), st.integers(0, 3))
def test_the_best_round_and_the_stop_against_a_loop(
    cells: list[tuple[int, int] | None], patience: int, every: int, head_rounds: int
) -> None:
    rows = [{"round": number} | ({} if cell is None else {"val_accuracy": cell[0] / 3, "val_loss": cell[1]})
            for number, cell in enumerate(cells)]  # fmt: skip
    config = Config(num_rounds=20, evaluate_every=every, head_rounds=head_rounds, early_stopping_patience=patience)
    best = watched = None
    since = None
    for number, cell in enumerate(cells):
        if cell is None:
            since = None
            continue
        if best is None or (cell[0], -cell[1]) > (cells[best][0], -cells[best][1]):  # type: ignore[index]
            best = number
        since = None
        if number >= head_rounds and number % every == 0:
            if watched is None or (cell[0], -cell[1]) > (cells[watched][0], -cells[watched][1]):  # type: ignore[index]
                watched = number
            since = number - watched
    found = best_row(rows)
    assert (None if found is None else found["round"]) == best
    assert rounds_since_best(rows, config) == since
    assert stops_early(rows, config) == (patience > 0 and since is not None and since >= patience)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(COLLAPSING, marks=pytest.mark.slow)], ids=["federated", "centralized"]
)
def test_a_run_stops_after_so_many_rounds_without_a_better_one(wavering: Config, settings: dict[str, Any]) -> None:
    whole = simulate(wavering, run_name="whole", **settings)
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in whole.rows]
    last = next(at for at in range(9) if at - scores.index(max(scores[: at + 1])) >= 3)
    assert last < 8
    stopped = simulate(wavering, run_name="stopped", early_stopping_patience=3, **settings)
    rows = numbers(stopped.folder)
    assert [row | {WAITING: None} for row in rows] == numbers(whole.folder)[: last + 1]
    with open(stopped.folder / "rounds.csv", encoding="utf-8", newline="") as file:
        waited = [row[WAITING] for row in csv.DictReader(file)]
    assert waited[:2] == ["", "0" if scores[1] > scores[0] else "1"] and waited[-1] == "3"
    short = simulate(wavering, run_name="short", **(settings | {"num_rounds": last}))
    assert same_bits(final_weights(stopped.folder), final_weights(short.folder))
    record = json.loads((stopped.folder / "run.json").read_text())
    assert record["status"] == "finished" and record["stopped_early"]["round"] == last
    assert "no better validation accuracy for 3 rounds" in record["stopped_early"]["cause"]
    assert record["best"]["round"] == last - 3
    assert simulate(wavering, run_name="stopped", early_stopping_patience=3, **settings).folder == stopped.folder
    assert "stopped_early" not in json.loads((whole.folder / "run.json").read_text())
    assert (whole.folder / "rounds.csv").read_text().splitlines()[0] == ",".join(COLUMNS[:-1])


@pytest.mark.parametrize(
    ("cut_after", "settings"),
    [(2, COLLAPSING), *(pytest.param(after, {}, marks=pytest.mark.slow) for after in (1, 2, 3, 4))],
    ids=str,
)
def test_a_run_that_was_cut_stops_at_the_same_round_with_the_same_models(
    wavering: Config, cut_after: int, settings: dict[str, Any]
) -> None:
    config = dataclasses.replace(wavering, early_stopping_patience=3, **settings)
    whole = simulate(config, run_name="whole")
    assert 3 <= whole.rows[-1]["round"] < config.num_rounds
    with power_cut(cut_after):
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut")
    assert resumed.folder.name == "cut" and numbers(resumed.folder) == numbers(whole.folder)
    assert same_bits(final_weights(resumed.folder), final_weights(whole.folder))
    assert same_bits(best_weights(resumed.folder), best_weights(whole.folder))
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole.folder, resumed.folder)]
    assert records[0]["best"] == records[1]["best"] and records[0]["stopped_early"] == records[1]["stopped_early"]


@pytest.mark.slow
def test_the_best_model_is_that_of_its_round_and_everything_says_so(wavering: Config) -> None:
    run = simulate(wavering, run_name="run", test_subset=0, num_rounds=6)
    best = best_row(run.rows)
    assert best is not None and best["round"] not in (0, 6)
    until_then = simulate(wavering, run_name="until-then", test_subset=0, num_rounds=best["round"])
    assert same_bits(best_weights(run.folder), final_weights(until_then.folder))
    assert not same_bits(best_weights(run.folder), final_weights(run.folder))
    with safetensors.safe_open(run.folder / "model-best.safetensors", "pt") as file:
        facts = file.metadata()
    assert (int(facts["round"]), float(facts["val_accuracy"])) == (best["round"], best["val_accuracy"])
    noted = json.loads((run.folder / "run.json").read_text())["best"]
    assert noted == {name: best[name] for name in ("round", "val_accuracy", "val_loss")}
    assert {"model.safetensors", "model-best.safetensors"} <= read_checksums(run.folder).keys()
    loaded = dict(run.model(best=True).model.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in best_weights(run.folder).items() if name in loaded)
    for source, named in ((run.folder, True), (run.folder / "model-best.safetensors", False)):
        folder = evaluate_run(source, features=False, best=named, overwrite=True)
        assert folder.name == "evaluation-best"
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["test_accuracy"] == pytest.approx(best["test_accuracy"])
    with pytest.raises(ConfigError, match="name its folder"):
        evaluate_run(run.folder / "model.safetensors", best=True)


def test_a_round_zero_that_stays_the_best_is_the_best_model(quick_config: Config) -> None:
    run = simulate(quick_config, learning_rate=0.0, run_name="still")
    assert json.loads((run.folder / "run.json").read_text())["best"]["round"] == 0
    assert same_bits(best_weights(run.folder), final_weights(run.folder)), "nothing was trained"


def test_an_unfinished_run_is_evaluated_at_the_best_round_of_its_last_sound_checkpoint(wavering: Config) -> None:
    with power_cut(5):
        simulate(wavering, run_name="cut", test_subset=0, checkpoint_every=1)
    folder = Path(wavering.results_dir) / "cut"
    rows = History.load(folder).rows
    for expected in (5, 1):
        found = json.loads((evaluate_run(folder, features=False, best=True) / "evaluation.json").read_text())
        assert found["test_accuracy"] == pytest.approx(rows[expected]["test_accuracy"])
        assert f"round {expected}" in found["model"]
        newest = list_checkpoints(folder / "checkpoints")[0][1]
        newest.write_bytes(newest.read_bytes()[:-1])
    for _, path in list_checkpoints(folder / "checkpoints", BEST):
        path.unlink()
    with pytest.raises(CheckpointError):
        evaluate_run(folder, features=False, best=True)


def test_a_kill_between_the_best_model_and_its_checkpoint_leaves_the_best_of_the_rows(
    wavering: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of round 5, where evaluation is rarer from then on: the file that was written is not the best of the rows."""
    saved = run_folder.save_checkpoint

    def cut_at_five(folder: Path, checkpoint: Any) -> Path:
        if checkpoint.round == 5:
            raise PowerCutError
        return saved(folder, checkpoint)

    config = dataclasses.replace(wavering, num_rounds=6, checkpoint_every=1)
    with monkeypatch.context() as patched, pytest.raises(PowerCutError):
        patched.setattr(run_folder, "save_checkpoint", cut_at_five)
        simulate(config, run_name="cut")
    checkpoints = Path(config.results_dir) / "cut" / "checkpoints"
    assert 5 in [number for number, _ in list_checkpoints(checkpoints, BEST)]
    resumed = simulate(config, run_name="cut", evaluate_every=4)
    best = best_row(resumed.rows)
    assert best is not None and best["round"] != 5
    until_then = simulate(config, run_name="until-then", num_rounds=best["round"])
    assert same_bits(best_weights(resumed.folder), final_weights(until_then.folder))


def test_no_more_best_models_are_kept_than_checkpoints_refer_to(
    wavering: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    written: Callable[..., None] = run_folder.Logbook.save_checkpoint

    def count(self: run_folder.Logbook, checkpoint: Any) -> None:
        written(self, checkpoint)
        counts.append(len(list_checkpoints(self.checkpoints, BEST)))

    monkeypatch.setattr(run_folder.Logbook, "save_checkpoint", count)
    simulate(wavering, checkpoint_every=1)
    assert len(counts) == 9 and max(counts) <= 2
    counts.clear()
    folder = simulate(wavering, save_model=False, run_name="none", num_rounds=1).folder
    assert max(counts) == 0 and not list(folder.glob("model*")) and read_rounds(folder)
    with pytest.raises(WeightsError, match="save-model"):
        History.load(folder).model(best=True)


def test_more_rounds_go_on_from_the_best_model_so_far(wavering: Config) -> None:
    whole = simulate(wavering, run_name="whole", num_rounds=4)
    simulate(wavering, run_name="first", num_rounds=2)
    longer = simulate(wavering, run_name="first", num_rounds=4)
    best = best_row(longer.rows)
    assert best is not None and best["round"] == 1
    assert json.loads((longer.folder / "run.json").read_text())["continued_from"] == "first"
    assert same_bits(best_weights(longer.folder), best_weights(whole.folder))


@pytest.mark.parametrize("problem", ["damaged", "another run's"])
def test_where_the_best_model_is_gone_the_run_says_so_and_ends(
    wavering: Config, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    config = dataclasses.replace(wavering, num_rounds=3, checkpoint_every=1)
    with power_cut(2):
        simulate(config, run_name="cut")
    checkpoints = Path(config.results_dir) / "cut" / "checkpoints"
    ((number, path),) = list_checkpoints(checkpoints, BEST)
    if problem == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        other = simulate(config, run_name="other", num_rounds=number, batch_size=8).folder
        foreign = load_latest_checkpoint(other / "checkpoints")
        assert foreign is not None
        save_best(checkpoints, foreign)
        assert [each for each, _ in list_checkpoints(checkpoints, BEST)] == [number]
    folder = simulate(config, run_name="cut").folder
    assert "model of round 1, the best on validation, is not exported" in caplog.text
    assert not (folder / "model-best.safetensors").exists() and (folder / "model.safetensors").exists()


def test_the_setting_is_off_where_it_cannot_work_and_changes_no_name() -> None:
    assert Config().fingerprint() == "44136fa3", "as before there was one"
    with pytest.raises(ConfigError, match="validation-size above 0"):
        load(overrides={"early-stopping-patience": 3, "validation-size": 0, "ridge-lambda": 1.0, "logit-scale": 1.0})
    with pytest.raises(ConfigError, match="early-stopping-patience"):
        load(overrides={"patience": 3})
    watched = Config(early_stopping_patience=3)
    other = watched.to_run_config() | {"evaluate-every": 1}
    assert watched.differing_keys(other) == ["evaluate-every"], "it decides where the run stops"
    assert Config().differing_keys(other | {"early-stopping-patience": 0}) == []


STUDY = """
name = "tiny"
seeds = [0, 1]
[settings]
num-clients = 10
train-subset = 200
validation-size = 60
test-subset = 60
num-rounds = 3
evaluate-every = 1
local-steps = 1
mask-rule = "none"
[[arm]]
name = "stops"
settings = { learning-rate = 0.0, early-stopping-patience = 2 }
[[arm]]
name = "goes on"
settings = { learning-rate = 0.0 }
"""


@pytest.mark.usefixtures("no_table_figures")
def test_a_studys_tables_say_which_runs_stopped_early(tmp_path: Path) -> None:
    run_studies([study_of(STUDY, tmp_path)], tmp_path)
    written = (tmp_path / "tiny" / "README.md").read_text()
    assert "| stopped early after round |" in written and "| 2, 2 |" in written
    assert "not one at equal work" in written
    rows = table(tmp_path / "tiny" / "table.csv")
    assert {row["arm"]: row["stopped_early"] for row in rows} == {"stops": "2, 2", "goes on": "–"}
    pack_runs(tmp_path / "tiny" / "runs")
    write_tables(StudyResults(study_of(STUDY, tmp_path), tmp_path))
    assert "| 2, 2 |" in (tmp_path / "tiny" / "README.md").read_text()
    run_studies([study_of(STUDY.replace(", early-stopping-patience = 2", ""), tmp_path)], tmp_path)
    assert "stopped" not in (tmp_path / "tiny" / "README.md").read_text()
