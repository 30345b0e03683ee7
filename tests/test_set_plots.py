"""Runs put together by their settings, and the figures over a set of them."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure

from fl_taskarith.cli import main
from fl_taskarith.config import Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.logbook import Logbook
from fl_taskarith.study import set_plots
from fl_taskarith.study.plots import HIDING, off_scale
from fl_taskarith.study.run_set import find_runs, last_test_accuracy, members
from fl_taskarith.study.set_plots import plot_bands, plot_set

pytestmark = pytest.mark.figures


def write_run(root: Path, value: float, **settings: object) -> Path:
    """A finished run of two rounds that ends on the accuracy `value`, through the real logbook."""
    config = Config(results_dir=str(root), **settings)  # type: ignore[arg-type]
    with Logbook(config) as logbook:
        for number in range(3):
            accuracy = value - 0.1 * (2 - number)
            logbook.write_round(
                {"round": number, "test_accuracy": accuracy, "test_loss": 1 - accuracy,
                 "val_accuracy": accuracy, "uplink_bytes": 10**6,
                 "downlink_bytes": 10**6, "client_update_norm": 0.1 + number, "client_cosine": 0.5 - accuracy / 10}
            )  # fmt: skip
    return logbook.folder


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two masks x two shardings x two J, three seeds each."""
    for rule in ("none", "least-sensitive"):
        for classes in (1, 2):
            for steps in (4, 8):
                for seed in (0, 1, 2):
                    write_run(
                        tmp_path, 0.5 + 0.1 * classes + 0.01 * seed, mask_rule=rule, classes_per_client=classes,
                        local_steps=steps, seed=seed, shard_seed=seed, learning_rate=0.1 * steps,
                    )  # fmt: skip
    return tmp_path


def test_runs_are_put_together_but_for_their_seeds(grid: Path) -> None:
    found = members(find_runs([grid]))
    assert len(found) == 8
    assert {len(member.runs) for member in found} == {3}
    assert "Nc = 2, all weights, J = 8" in {member.label for member in found}
    one = next(member for member in found if member.label == "Nc = 2, all weights, J = 8")
    assert one.over_runs(last_test_accuracy).mean == pytest.approx(71.0)
    assert one.over_runs(last_test_accuracy).sd == pytest.approx(1.0)
    assert [(number, round(point.mean, 6)) for number, point in one.curve("test_accuracy")] == [
        (0, 0.51), (1, 0.61), (2, 0.71),
    ]  # fmt: skip


def test_a_folder_without_runs_and_one_of_an_unreadable_run_are_named(tmp_path: Path, grid: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        find_runs([empty])
    damaged = find_runs([grid])[0]
    (damaged / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        members([damaged])


def test_every_figure_shows_the_numbers_of_the_runs(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Figure] = {}

    def keep(figure: Figure, output: Path) -> list[Path]:
        shown[output.name] = figure
        return [output]

    monkeypatch.setattr(set_plots, "save_figure", keep)
    plot_set(members(find_runs([grid])), grid / "all")
    assert set(shown) == {"all", "all-heat-map", "all-drift"}
    rounds, loss, traffic = shown["all"].axes
    assert len(rounds.lines) == len(loss.lines) == len(traffic.lines) == len(rounds.collections) == 8
    assert sorted(line.get_ydata()[-1] for line in rounds.lines) == pytest.approx([61.0] * 4 + [71.0] * 4)
    assert list(traffic.lines[0].get_xdata()) == [2.0, 4.0, 6.0]
    texts = [text.get_text() for axes in shown["all-heat-map"].axes[:2] for text in axes.texts]
    assert sorted(texts) == ["61.0 ± 1.0"] * 4 + ["71.0 ± 1.0"] * 4
    norms, cosines = shown["all-drift"].axes
    assert {round(value, 3) for line in norms.lines for value in line.get_ydata()} >= {1.6}
    assert len(cosines.containers) == 4
    pyplot.close("all")


def test_bytes_are_shown_from_the_first_message_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, 0.5, seed=0)
    shown: list[Figure] = []
    monkeypatch.setattr(set_plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    traffic = shown[0].axes[2]
    assert traffic.get_xscale() == "log"
    assert 1.0 < traffic.get_xlim()[0] < 2.0
    pyplot.close("all")


def test_of_many_settings_the_best_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_run(tmp_path, 0.5 + 0.01 * number if number else 0.3, momentum=number / 100)
    shown: list[Figure] = []
    monkeypatch.setattr(set_plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    rounds = shown[0].axes[0]
    assert len(rounds.lines) == 12
    labels = [text.get_text() for text in shown[0].legends[0].get_texts()]
    assert labels.pop() == "5 others"
    assert set(labels) == {f"momentum = {number / 100}" for number in range(5, 12)}
    assert rounds.get_ylim()[0] > 30.0, "a grey line does not move the axes"
    pyplot.close("all")


def test_a_sweep_is_drawn_of_what_was_swept_and_nothing_else(tmp_path: Path) -> None:
    for density in (0.01, 0.1, 0.5):
        for seed in (0, 1):
            write_run(tmp_path, 0.5 + density / 10, density=density, seed=seed)
    write_run(tmp_path, 0.9, mask_rule="none")
    written = {path.name for path in plot_set(members(find_runs([tmp_path])), tmp_path / "swept")}
    assert written == {f"swept{part}.{kind}" for part in ("", "-density") for kind in ("png", "pdf")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in written)


def test_plot_takes_one_run_or_many(grid: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = find_runs([grid])[0]
    assert main(["plot", str(first), "--output", str(tmp_path / "one")]) == 0
    assert main(["plot", str(grid), "--output", str(tmp_path / "many")]) == 0
    printed = capsys.readouterr().out
    assert "one.png" in printed and "many-heat-map.pdf" in printed


def test_labels_fall_back_to_folder_names_where_settings_do_not_tell(tmp_path: Path) -> None:
    base = Config(results_dir=str(tmp_path), run_name="a", seed=0)
    folders = []
    for config in (base, dataclasses.replace(base, run_name="b", num_rounds=7)):
        with Logbook(config) as logbook:
            logbook.write_round({"round": 0, "test_accuracy": 0.5})
        folders.append(logbook.folder)
    assert [member.label for member in members(folders)] == ["num-rounds = 24", "num-rounds = 7"]


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, 0.5), write_run(tmp_path, 0.5)]
    assert folders[0] != folders[1]
    (member,) = members(find_runs([tmp_path, folders[0]]))
    assert len(member.runs) == 1


def test_members_that_a_figure_cannot_tell_apart_are_not_drawn_over_one_another(grid: Path) -> None:
    write_run(grid, 0.99, strategy="centralized", mask_rule="none", local_steps=4, classes_per_client=2)
    drawn = {path.name for path in plot_set(members(find_runs([grid])), grid / "mixed")}
    assert "mixed-heat-map.png" in drawn, "centralized runs have no place in it, and take none"
    write_run(grid, 0.2, strategy="fedgma", mask_rule="none", local_steps=4, classes_per_client=2)
    drawn = {path.name for path in plot_set(members(find_runs([grid])), grid / "strategies")}
    assert "strategies-heat-map.png" not in drawn and "strategies.png" in drawn


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_only_a_few_that_would_hide_the_rest_are_off_the_scale(accuracies: list[float]) -> None:
    lost = off_scale(accuracies)
    assert 4 * len(lost) <= len(accuracies)
    if lost:
        rest = [value for place, value in enumerate(accuracies) if place not in lost]
        highest = max(accuracies[place] for place in lost)
        assert highest < min(rest)
        assert max(rest) - highest > HIDING * (max(rest) - min(rest))


def test_one_that_fell_apart_is_off_the_scale_and_a_worse_one_is_not() -> None:
    assert off_scale([97.3, 97.5, 54.9, 98.2]) == {2}
    assert off_scale([97.3, 97.5, 94.9, 98.2]) == set()
    assert off_scale([97.3, 97.3, 97.3, 93.0]) == set(), "equal others do not make a small difference a large one"


def test_curves_keep_their_axis_where_one_fell_apart_and_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for classes in (1, 2, 5):
        write_run(tmp_path, 0.97 + 0.001 * classes, classes_per_client=classes)
    write_run(tmp_path, 0.3, classes_per_client=10)
    shown: list[Figure] = []
    monkeypatch.setattr(set_plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    set_plots.plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    rounds = shown[0].axes[0]
    assert rounds.get_ylim()[0] > 70 and len(rounds.lines) == 4
    assert [line.get_label() for line in rounds.lines][-1] == "Nc = 10 (ends at 30.0 %, off the scale)"
    pyplot.close("all")


def test_no_two_lines_look_alike() -> None:
    looks = {(set_plots.COLOURS[index % len(set_plots.COLOURS)], set_plots._style(index)) for index in range(28)}
    assert len(looks) == 28
