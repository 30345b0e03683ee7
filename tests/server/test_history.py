"""A run as Python and a notebook meet it: loaded when finished, shown, drawn, and its model used."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import power_cut
from matplotlib.figure import Figure

import fl_taskarith
from fl_taskarith import History, simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError, ConfigError, WeightsError
from fl_taskarith.storage.run_folder import Row


@pytest.fixture
def run(quick_config: Config) -> History:
    return simulate(dataclasses.replace(quick_config, num_rounds=1))


def without_empty_cells(run: History) -> list[Row]:
    return [{name: cell for name, cell in row.items() if cell is not None} for row in run.rows]


def test_the_same_settings_load_the_finished_run(run: History, quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, num_rounds=1)
    again = simulate(config)
    assert (again.folder, again.rows) == (run.folder, without_empty_cells(run))
    with pytest.raises(ConfigError, match="is finished"):
        simulate(config, if_finished="error")
    new = simulate(config, if_finished="new")
    assert new.folder.name == run.folder.name + "-2"
    assert simulate(config).folder == new.folder, "the last one"
    assert simulate(config, seed=1).folder not in (run.folder, new.folder)
    assert simulate(config, num_rounds=2).rows[-1]["round"] == 2


def test_a_named_run_of_other_settings_is_not_loaded(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, num_rounds=1, run_name="mine")
    first = simulate(config)
    assert simulate(config, local_steps=3).folder.name == "mine-2"
    assert simulate(config, evaluate_every=2).folder.name != "mine", "rows that the finished run lacks"
    assert simulate(config).folder == first.folder


def test_a_history_loads_by_folder_and_by_name(run: History, quick_config: Config) -> None:
    for loaded in (History.load(run.folder), History.load(run.folder.name, quick_config.results_dir)):
        assert loaded.rows == without_empty_cells(run)
        assert loaded.settings["num-clients"] == 10
    with pytest.raises(CheckpointError, match="nothing"):
        History.load("nothing", quick_config.results_dir)


def test_it_shows_itself(run: History) -> None:
    accuracy = run.rows[-1]["test_accuracy"]
    assert run.gain == pytest.approx(100 * (accuracy - run.rows[0]["test_accuracy"]))
    assert repr(run) == (
        f"History({run.folder.name}, round 1, test accuracy {accuracy:.4f}, "
        f"{run.gain:+.2f} points over the head before training)"
    )
    page = run._repr_html_()
    assert "<table" in page and "data:image/png;base64," in page and run.folder.name in page
    frame = run.frame()
    assert list(frame["round"]) == [0, 1] and not frame.isna().all().any() and "matched_distance" not in frame
    assert isinstance(run.plot(), Figure)
    (run.folder / "run.json").unlink()
    assert "<table" in run._repr_html_(), "rows are shown without run.json"


def test_its_model_is_the_one_that_was_trained(run: History) -> None:
    exported = run.model()
    assert exported.classes == tuple(map(str, range(10)))
    with torch.no_grad():
        scores = exported.model(exported.transform(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))
    assert scores.shape == (2, 10)
    (run.folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="save-model"):
        run.model()


def test_regression_runs_draw_distances(tmp_path: Path) -> None:
    run = simulate(strategy="fed-em", dataset="linear-regression", num_rounds=2, num_clients=6, mask_rule="none",
                   results_dir=str(tmp_path), draw_curves=False)  # fmt: skip
    assert "distance to the truth" in repr(run) and run.gain is None
    assert isinstance(run.plot(), Figure)


def test_files_in_conf_go_by_name() -> None:
    from fl_taskarith.storage.paths import conf_file

    assert conf_file("fedavg-noniid").name == "fedavg-noniid.toml"
    assert conf_file("digits/six-models").parent.name == "digits"
    assert conf_file("conf/fedavg-iid.toml").is_file()
    assert conf_file("nothing") == Path("nothing")


def test_the_public_names_are_there_and_typed() -> None:
    stub = (Path(fl_taskarith.__file__).parent / "__init__.pyi").read_text()
    for name in fl_taskarith.__all__:
        assert callable(getattr(fl_taskarith, name)) and f'"{name}"' in stub
    with pytest.raises(AttributeError, match="nothing"):
        fl_taskarith.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("given", "named"),
    [({"if_finished": "reload"}, "if_finished"), ({"deadline": "5m"}, "deadline"),
     ({"deadline": float("nan")}, "deadline"), ({"conf": 5}, "5"), ({"conf": {"seed": 1}}, "seed")],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_an_error_of_ours(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        simulate(**given)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "nothing"])
def test_a_name_of_no_run_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no run"):
        History.load(name, str(tmp_path))


def test_in_a_notebook_a_run_says_how_long_it_takes_and_draws_a_bar(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(quick_config, run_name="plain")
    assert "take about" not in capsys.readouterr().out, "a short one, on a terminal"
    monkeypatch.setattr("fl_taskarith.server.launch.in_notebook", lambda: True)
    monkeypatch.setattr("fl_taskarith.server.simulate.is_watched", lambda: True)
    with power_cut(after_round=1):
        simulate(quick_config, run_name="cut")
    assert "All 3 rounds take about" in capsys.readouterr().out
    simulate(quick_config, run_name="cut")
    printed = capsys.readouterr()
    assert "The 2 rounds that are left take about" in printed.out
    assert "3/3 [" in printed.err and "test_accuracy=" in printed.err
