"""What a search of one rate leaves behind: the table, the figure, and a settings file with the choice."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest
from small_studies import FakeTraining

from fl_taskarith.config.effects import idle_reason
from fl_taskarith.config.settings import load
from fl_taskarith.errors import StudyError
from fl_taskarith.study.one_search import search_rate, settings_file
from fl_taskarith.study.search import Choice, Search

CONF = Path(__file__).parents[2] / "conf"
SEARCH = Search(1e-3, 10.0, 1, (1, 2), 2, (0,))
PLAIN = load(overrides={"mask_rule": "none"})


@pytest.mark.figures
def test_the_settings_file_is_the_configuration_at_the_chosen_rate(tmp_path: Path, training: FakeTraining) -> None:
    config = load(overrides={"mask_rule": "random", "density": 0.25, "num_clients": 10, "learning_rate": 0.5})
    path, choice = search_rate(config, SEARCH, tmp_path)
    assert choice is not None and (choice.rate, choice.edge) == (0.1, False)
    chosen = load(path.with_name("chosen.toml"))
    assert (chosen.mask_rule, chosen.density, chosen.num_clients, chosen.learning_rate) == ("random", 0.25, 10, 0.1)
    assert (chosen.results_dir, chosen.run_name) == ("", "")
    with open(path, encoding="utf-8", newline="") as file:
        tried = [float(row["learning_rate"]) for row in csv.DictReader(file) if row["rounds"] == "2"]
    assert len(tried) == 2 and 0.1 in tried
    assert path.with_name("search.png").stat().st_size > 5000


@pytest.mark.figures
def test_a_rate_at_the_edge_is_told_in_the_file(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.5 + 0.01 * run.learning_rate
    path, _ = search_rate(PLAIN, SEARCH, tmp_path)
    assert "not tuned" in path.with_name("chosen.toml").read_text()


@pytest.mark.parametrize(
    ("file", "changes"),
    [("fedavg-noniid.toml", {"sharding": "iid"}), ("fedavg-noniid-sparse.toml", {"strategy": "centralized"}),
     ("scaffold-one-class.toml", {"participation": 1.0}), ("density/0.05.toml", {"mask_rule": "none"}),
     ("fedavg-iid.toml", {"data_dir": r"C:\Users\ann", "weights": 'a "b" é.pth'})],
)  # fmt: skip
def test_the_settings_file_of_any_configuration_can_be_run(
    file: str, changes: dict[str, object], tmp_path: Path
) -> None:
    config = load(CONF / file, overrides=changes)
    (tmp_path / "chosen.toml").write_text(settings_file(config, SEARCH, Choice(0.03)), encoding="utf-8")
    found = load(tmp_path / "chosen.toml")
    for key, value in dataclasses.replace(config, learning_rate=0.03).to_run_config().items():
        assert found.to_run_config()[key] == value or idle_reason(config, key) is not None, key
    assert (found.data_dir, found.weights) == (config.data_dir, config.weights)


def test_several_seeds_decide_by_their_mean(tmp_path: Path, training: FakeTraining) -> None:
    """Seed 0 is best at 0.01 and seed 1 at 1; their mean is best between the two."""
    training.accuracy = lambda run: 0.9 - 0.1 * (math.log10(run.learning_rate) + 2 - 2 * run.seed) ** 2
    for seeds, rate, told in (((0,), 0.01, "seed 0"), ((1,), 1.0, "seed 1"), ((0, 1), 0.1, "seeds 0, 1")):
        path, choice = search_rate(PLAIN, dataclasses.replace(SEARCH, seeds=seeds), tmp_path / told)
        assert choice is not None and choice.rate == rate
        assert f"chosen by validation accuracy, {told} (" in path.with_name("chosen.toml").read_text()


@pytest.mark.figures
def test_the_loss_decides_where_it_is_asked_to(tmp_path: Path, training: FakeTraining) -> None:
    training.accuracy = lambda run: 0.5 + 0.01 * math.log10(run.learning_rate)
    training.loss = lambda accuracy: abs(accuracy - 0.5)
    path, choice = search_rate(PLAIN, dataclasses.replace(SEARCH, by="loss"), tmp_path)
    assert choice is not None and choice.rate == 1.0, "the most accurate is 10"
    assert "chosen by validation loss, seed 0 (" in path.with_name("chosen.toml").read_text()
    assert path.with_name("search.png").stat().st_size > 5000


def test_nothing_is_chosen_where_runs_fail(tmp_path: Path, training: FakeTraining) -> None:
    def fail(run: object) -> float:
        raise RuntimeError("no")

    training.accuracy = fail
    with pytest.raises(StudyError):
        search_rate(PLAIN, SEARCH, tmp_path)
    assert not list(tmp_path.rglob("chosen.toml"))
