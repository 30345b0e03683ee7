"""The figure of how many clients share an input direction, from whole runs under covariance aggregation."""

import csv
import dataclasses
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import numbers, power_cut

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.figures import layer_plots
from fl_taskarith.figures.layer_plots import KINDS, plot_overlap
from fl_taskarith.figures.panels import draw_bars
from fl_taskarith.figures.run_groups import find_runs, members


@pytest.fixture
def config(quick_config: Config) -> Config:
    return dataclasses.replace(quick_config, strategy="covariance", num_rounds=3, participation=0.3)


def test_a_run_writes_what_it_measured_of_every_matrix_and_draws_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = simulate(config).folder
    with open(folder / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {row["tensor"] for row in rows}
    assert {row["round"] for row in rows} == {"1", "2", "3"}
    assert len(rows) == 3 * len(names)
    assert "patch_embed.proj.weight" in names
    assert not any("norm" in name or "bias" in name or "head" in name for name in names)
    assert all(1 - 1e-5 <= float(row["overlap"]) <= 3 + 1e-5 for row in rows), "three clients a round"
    kept = json.loads((folder / "run.json").read_text())["layers"]["overlap"]
    own = [float(row["overlap"]) for row in rows if row["tensor"] == "blocks.0.attn.qkv.weight"]
    assert kept["blocks.0.attn.qkv.weight"] == pytest.approx(sum(own) / 3)
    assert "layers.csv" in (folder / "SHA256SUMS").read_text()
    drawn = Mock(wraps=draw_bars)
    monkeypatch.setattr(layer_plots, "draw_bars", drawn)
    (png, _) = plot_overlap(members(find_runs([folder])), tmp_path / "overlap")
    assert png.stat().st_size > 1000
    assert [call.args[3] for call in drawn.call_args_list] == [(1.0, 3)] * len(KINDS), "bars end at all three clients"


@pytest.mark.slow
def test_a_resumed_run_measured_the_same(config: Config) -> None:
    config = dataclasses.replace(config, checkpoint_every=1)
    whole = simulate(config, run_name="whole").folder
    with power_cut(3):
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut").folder
    assert numbers(whole) == numbers(resumed)
    assert (whole / "layers.csv").read_bytes() == (resumed / "layers.csv").read_bytes()


def test_rounds_are_those_that_were_run_where_a_run_stops_early(config: Config) -> None:
    folder = simulate(config, num_rounds=9, early_stopping_patience=1, evaluate_every=1, learning_rate=1e-9).folder
    with open(folder / "rounds.csv", encoding="utf-8") as file:
        run = [row["round"] for row in csv.DictReader(file)]
    with open(folder / "layers.csv", encoding="utf-8") as file:
        assert list(dict.fromkeys(row["round"] for row in csv.DictReader(file))) == run[1:]
    assert len(run) < 9


def test_a_matrix_that_never_moves_has_no_overlap_and_run_json_stays_json(config: Config) -> None:
    folder = simulate(config, learning_rate=0.0, num_rounds=1).folder
    text = (folder / "run.json").read_text()
    assert json.loads(text)["layers"] == {"overlap": {}, "step": {}}
    assert "NaN" not in text


def test_other_strategies_measure_nothing_and_nothing_is_drawn(quick_config: Config, tmp_path: Path) -> None:
    folder = simulate(quick_config, num_rounds=1).folder
    assert not (folder / "layers.csv").exists()
    assert plot_overlap(members(find_runs([folder])), tmp_path / "overlap") == []
