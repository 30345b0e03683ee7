"""A run that goes on with more rounds, or with other settings that decide no number."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import final_weights, numbers, power_cut

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config


def folders(config: Config) -> list[str]:
    return sorted(path.name for path in Path(config.results_dir).iterdir())


def without_evaluation(folder: Path) -> list[tuple[object, ...]]:
    from fl_taskarith.storage.run_folder import read_rounds

    names = ("round", "learning_rate", "train_loss", "update_norm", "uplink_bytes", "downlink_bytes")
    return [tuple(row[name] for name in names) for row in read_rounds(folder)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"strategy": "scaffold"}, marks=pytest.mark.slow),
        {"strategy": "fedavgm", "sampling": "cyclic"},
        {"mask_rule": "least-sensitive", "density": 0.2},
        pytest.param({"strategy": "centralized", "num_clients": 10}, marks=pytest.mark.slow),
        pytest.param({"schedule": "plateau", "evaluate_every": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "fedavg",
)
def test_a_finished_run_goes_on_exactly_with_more_rounds(quick_config: Config, settings: dict[str, object]) -> None:
    short = dataclasses.replace(quick_config, **settings)
    longer = dataclasses.replace(short, num_rounds=5)
    finished = simulate(short)
    extended = simulate(longer)
    assert extended.folder != finished.folder, "the finished run stays as it is"
    assert json.loads((finished.folder / "run.json").read_text())["status"] == "finished"
    assert json.loads((extended.folder / "run.json").read_text())["continued_from"] == finished.folder.name
    straight = simulate(longer, resume=False)
    assert without_evaluation(extended.folder) == without_evaluation(straight.folder)
    mine, theirs = final_weights(extended.folder), final_weights(straight.folder)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_named_run_goes_on_beside_itself(quick_config: Config) -> None:
    simulate(quick_config, run_name="mine")
    longer = simulate(quick_config, run_name="mine", num_rounds=4)
    assert longer.folder.name == "mine-2" and longer.rows[-1]["round"] == 4
    assert json.loads((longer.folder / "run.json").read_text())["continued_from"] == "mine"


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine"},
        pytest.param({"schedule": "exponential"}, marks=pytest.mark.slow),
        pytest.param({"seed": 3}, marks=pytest.mark.slow),
        {"learning_rate": 0.02},
    ],
)
def test_what_could_not_go_on_exactly_begins_anew(quick_config: Config, settings: dict[str, object]) -> None:
    simulate(quick_config, **({} if "schedule" not in settings else settings))
    again = simulate(quick_config, num_rounds=4, **settings)
    assert "continued_from" not in json.loads((again.folder / "run.json").read_text())


def test_a_head_that_was_solved_for_the_last_round_alone_is_not_gone_on_from(quick_config: Config) -> None:
    settings = {"num_rounds": 3, "ridge_refresh": 2}
    simulate(quick_config, **settings)
    again = simulate(quick_config, **{**settings, "num_rounds": 5})
    assert "continued_from" not in json.loads((again.folder / "run.json").read_text())
    assert Config(ridge_refresh=2, num_rounds=8, schedule="constant").extends(
        Config(ridge_refresh=2, num_rounds=4, schedule="constant").to_run_config(), done=4
    )


@pytest.mark.parametrize("change", [{"evaluate_every": 2}, {"device": "cpu"}])
def test_a_cut_run_goes_on_in_its_folder_under_settings_that_decide_no_weight(
    quick_config: Config, change: dict[str, object]
) -> None:
    with power_cut(after_round=2):
        simulate(quick_config)
    (name,) = folders(quick_config)
    history = simulate(quick_config, **change)
    assert folders(quick_config) == [name] and history.folder.name == name
    straight = simulate(quick_config, **change, results_dir=f"{quick_config.results_dir}-straight")
    assert without_evaluation(history.folder) == without_evaluation(straight.folder)
    assert numbers(history.folder)[-1] == numbers(straight.folder)[-1]


def test_a_run_that_another_process_is_writing_is_left_alone(quick_config: Config) -> None:
    from fl_taskarith.storage.run_folder import Logbook

    with power_cut(after_round=2):
        simulate(quick_config)
    with Logbook(quick_config) as writing:
        other = simulate(quick_config, evaluate_every=3)
        assert other.folder != writing.folder


def test_a_cut_run_lends_its_rounds_to_a_longer_one_and_can_still_go_on_itself(quick_config: Config) -> None:
    with power_cut(after_round=2):
        simulate(quick_config)
    longer = simulate(quick_config, num_rounds=5)
    assert len(folders(quick_config)) == 2
    assert json.loads((longer.folder / "run.json").read_text())["continued_from"] in folders(quick_config)
    itself = simulate(quick_config)
    assert itself.rows[-1]["round"] == 3 and len(folders(quick_config)) == 2
    assert without_evaluation(longer.folder)[:4] == without_evaluation(itself.folder)


def test_an_extension_that_is_cut_while_its_beginning_is_copied_starts_from_there_again(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(quick_config)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            "fl_taskarith.storage.run_folder._copy_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        simulate(quick_config, num_rounds=5)
    assert len(folders(quick_config)) == 1, "nothing of the half copy is left"
    again = simulate(quick_config, num_rounds=5)
    assert "continued_from" in json.loads((again.folder / "run.json").read_text())
