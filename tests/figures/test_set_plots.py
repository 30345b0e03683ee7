"""Runs put together by their settings, and the figures over a set of them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.figures import plots, set_curves, set_plots
from fl_taskarith.figures.panels import MOST, ROWS, draw_bars, pages, spread
from fl_taskarith.figures.plots import HIDING, off_scale
from fl_taskarith.figures.run_groups import find_runs, members, read_run
from fl_taskarith.figures.series import draw_line
from fl_taskarith.figures.set_curves import plot_bands
from fl_taskarith.figures.set_plots import plot_set
from fl_taskarith.figures.statistics import Summary
from fl_taskarith.storage.run_folder import Logbook

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
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Figure]]:
    """What `plot_set` and its parts draw, by file name, in place of files."""
    shown: dict[str, Figure] = {}

    def keep(figure: Figure, output: Path) -> list[Path]:
        shown[output.name] = figure
        return [output]

    for module in (plots, set_plots, set_curves):
        monkeypatch.setattr(module, "save_figure", keep)
    yield shown
    pyplot.close("all")


def panels_of(figure: Figure) -> list[list[Axes]]:
    """The panels of each row."""
    return [list(part.axes) for part in figure.subfigs] if figure.subfigs else [list(figure.axes)]


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
    assert one.last_percent().mean == pytest.approx(71.0)
    assert one.last_percent().sd == pytest.approx(1.0)
    assert [(number, round(point.mean, 6)) for number, point in one.curve("test_accuracy").items()] == [
        (0, 0.51), (1, 0.61), (2, 0.71),
    ]  # fmt: skip


def test_a_folder_without_runs_and_one_of_an_unreadable_run_are_named(tmp_path: Path, grid: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        find_runs([empty])
    (damaged, *_) = find_runs([grid])
    (damaged.folder / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        members([read_run(damaged.folder)])


def test_every_figure_shows_the_numbers_of_the_runs(grid: Path, figures: dict[str, Figure]) -> None:
    shown = figures
    plot_set(members(find_runs([grid])), grid / "all")
    assert set(shown) == {"all", "all-heat-map", "all-drift"}
    rows = panels_of(shown["all"])
    lines = {line.get_label(): line for rounds, _, _ in rows for line in rounds.lines}
    assert len(lines) == 8, "every member has a line"
    assert sorted(line.get_ydata()[-1] for line in lines.values()) == pytest.approx([61.0] * 4 + [71.0] * 4)
    for rounds, loss, traffic in rows:
        assert len(rounds.lines) == len(loss.lines) == len(traffic.lines) == len(rounds.collections)
        assert list(traffic.lines[0].get_xdata()) == [2.0, 4.0, 6.0]
    texts = [text.get_text() for axes in shown["all-heat-map"].axes[:2] for text in axes.texts]
    assert sorted(texts) == ["61.0 ± 1.0"] * 4 + ["71.0 ± 1.0"] * 4
    norms, cosines = shown["all-drift"].axes
    assert {round(value, 3) for line in norms.lines for value in line.get_ydata()} >= {1.6}
    assert len(cosines.containers) == 4


def test_bytes_are_shown_from_the_first_message_on(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_run(tmp_path, 0.5, seed=0)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    traffic = figures["all"].axes[2]
    assert traffic.get_xscale() == "log"
    assert 1.0 < traffic.get_xlim()[0] < 2.0


def test_many_members_are_spread_over_rows_and_pages_with_equal_axes(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    for number in range(32):
        write_run(tmp_path, 0.5 + 0.01 * number, momentum=number / 100)
    found = members(find_runs([tmp_path]))
    plot_bands(found, tmp_path / "all", found[4].label)
    assert set(figures) == {"all", "all-2"}
    rows = [row for figure in figures.values() for row in panels_of(figure)]
    labels = [[line.get_label() for line in rounds.lines] for rounds, _, _ in rows]
    assert {label for row in labels for label in row} == {member.label for member in found}
    assert all(len(row) <= MOST and row[0] == found[4].label for row in labels)
    for column in zip(*rows, strict=True):
        assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in column}) == 1
    for figure in figures.values():
        assert all(not axes.get_legend() for axes in figure.axes), "legends are outside the data"


@given(st.integers(1, 40), st.data())
def test_no_row_has_too_many_lines_and_none_is_lost(count: int, data: st.DataObject) -> None:
    reference = data.draw(st.none() | st.integers(0, count - 1))
    features = [data.draw(st.lists(st.sampled_from("abcd"), min_size=count, max_size=count)) for _ in range(2)]
    rows = spread(count, features, reference)
    assert all(1 <= len(row.places) <= MOST for row in rows)
    assert {place for row in rows for place in row.places} == set(range(count))
    others = [place for row in rows for place in row.places if place != reference]
    assert len(others) == len(set(others)), "only the reference is repeated"
    if reference is not None:
        assert all(reference in row.places for row in rows)
    assert sum(map(len, pages(rows))) == len(rows) and max(map(len, pages(rows))) <= ROWS


def test_rows_have_a_setting_in_common_where_that_takes_no_more_of_them() -> None:
    rows = spread(9, [["x"] * 8 + ["y"], ["iid"] * 3 + ["Nc = 1"] * 3 + ["Nc = 2"] * 3], reference=0)
    assert [(row.title, row.places) for row in rows] == [
        ("iid", (0, 1, 2)), ("Nc = 1", (0, 3, 4, 5)), ("Nc = 2", (0, 6, 7, 8)),
    ]  # fmt: skip
    assert {row.title for row in spread(12, [[str(number) for number in range(12)]])} == {""}


def test_bands_end_where_no_value_can_be_and_one_seed_has_none(tmp_path: Path, figures: dict[str, Figure]) -> None:
    for seed, value in enumerate((0.6, 0.99, 1.0)):
        write_run(tmp_path, value, seed=seed)
    write_run(tmp_path, 0.9, momentum=0.5)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    accuracy, loss, traffic = figures["all"].axes
    for axes, lowest, highest in ((accuracy, 0, 100), (loss, 0, math.inf), (traffic, 0, 100)):
        (band,) = axes.collections  # of the member with three seeds
        ends = band.get_paths()[0].vertices[:, 1]
        assert lowest <= ends.min() and ends.max() <= highest
        assert min(abs(ends.max() - highest), abs(ends.min() - lowest)) < 1e-9, "one sd would go beyond"
    assert [line.get_label().split()[-1] for line in accuracy.lines] == ["3)", "1)"], "the legend says n"


def test_runs_that_share_divisions_of_the_data_are_not_called_seeds(tmp_path: Path, figures: dict[str, Figure]) -> None:
    for seed in (0, 1):
        for shards in (0, 1, 2):
            write_run(tmp_path, 0.6, seed=seed, shard_seed=shards)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "shared")
    assert figures["shared"].get_suptitle() == "means over n = 6 runs on 3 divisions of the data; bands: ± 1 sd"
    for seed in (0, 1, 2):
        write_run(tmp_path / "own", 0.6, seed=seed, shard_seed=seed)
    plot_bands(members(find_runs([tmp_path / "own"])), tmp_path / "own")
    assert figures["own"].get_suptitle() == "means over n = 3 seeds; bands: ± 1 sd"


@given(st.floats(-1, 1), st.floats(0, 3), st.integers(1, 3))
def test_a_band_holds_the_mean_and_nothing_impossible(mean: float, sd: float, n: int) -> None:
    low, high = Summary(mean, sd if n > 1 else math.nan, n).band(-1.0, 1.0)
    assert math.isnan(low) and math.isnan(high) if n == 1 else -1.0 <= low <= mean <= high <= 1.0


def test_work_is_compared_by_local_steps_where_they_differ(tmp_path: Path, figures: dict[str, Figure]) -> None:
    for steps in (4, 16):
        write_run(tmp_path, 0.5, local_steps=steps)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    accuracy = figures["all"].axes[0]
    assert "local steps" in accuracy.get_xlabel() and "J" in accuracy.get_xlabel()
    assert {line.get_label(): list(line.get_xdata()) for line in accuracy.lines} == {
        "J = 4": [0, 4, 8], "J = 16": [0, 16, 32],
    }  # fmt: skip
    plot_bands(members(find_runs([tmp_path]))[:1], tmp_path / "one")
    assert figures["one"].axes[0].get_xlabel() == "round"


def test_epochs_have_panels_of_their_own(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_run(tmp_path, 0.6)
    write_run(tmp_path, 0.7, strategy="centralized", mask_rule="none")
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    federated, centralised = panels_of(figures["all"])
    assert [federated[0].get_xlabel(), centralised[0].get_xlabel()] == ["round", "epoch"]
    assert federated[0].get_ylim() == centralised[0].get_ylim()
    assert len(federated[0].lines) == len(centralised[0].lines) == 1


def test_what_was_not_trained_is_a_level_and_sends_nothing(tmp_path: Path, figures: dict[str, Figure]) -> None:
    write_run(tmp_path, 0.5, learning_rate=0.0, mask_rule="none")
    assert plot_bands(members(find_runs([tmp_path])), tmp_path / "idle") == []
    write_run(tmp_path, 0.6, local_steps=8)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    accuracy, _, traffic = figures["all"].axes
    assert accuracy.get_xlabel() == "round", "J of a run that takes no step is no difference"
    level = next(line for line in accuracy.lines if len(line.get_xdata()) == 2)
    assert set(level.get_ydata()) == {50.0}
    assert len(traffic.lines) == 1


def test_drift_is_coloured_by_mask_and_reads_in_grey(grid: Path, figures: dict[str, Figure]) -> None:
    write_run(grid, 0.6, mask_rule="random", classes_per_client=1, local_steps=4)
    set_plots.plot_drift(members(find_runs([grid])), grid / "drift")
    for axes in figures["drift"].axes:
        lines = {bars.get_label(): bars.lines[0] for bars in axes.containers}
        colours: dict[str, set[str]] = {}
        for label, line in lines.items():
            colours.setdefault(label.rsplit(", J", 1)[0], set()).add(line.get_color())
        assert len(colours) == 3 and len({colour for (colour,) in colours.values()}) == 3
        assert len({line.get_marker() for line in lines.values()}) == len(lines) == 5
    (legend,) = [part.legends[0] for part in figures["drift"].subfigs]
    assert {text.get_text() for text in legend.get_texts()} == set(lines)
    assert "mask" in legend.get_title().get_text()


def test_drift_of_many_lines_has_rows_by_local_steps(tmp_path: Path, figures: dict[str, Figure]) -> None:
    for rule in ("none", "least-sensitive", "random", "most-sensitive"):
        for steps in (4, 8, 16):
            for classes in (1, 2):
                write_run(tmp_path, 0.6, mask_rule=rule, classes_per_client=classes, local_steps=steps)
    set_plots.plot_drift(members(find_runs([tmp_path])), tmp_path / "drift")
    assert all(len(axes.containers) <= MOST for axes in figures["drift"].axes)
    assert len(figures["drift"].axes) == 6


def test_bars_end_where_no_value_can_be_and_one_seed_has_none() -> None:
    axes = Figure().subplots()
    draw_bars(axes, [0, 1, 2], [Summary(0.95, 0.2, 3), Summary(-0.95, 0.2, 3), Summary(0.0, math.nan, 1)], (-1.0, 1.0))
    (bars,) = axes.containers[0].lines[2]
    drawn = [
        float(value)
        for segment in bars.get_segments()
        for value in segment.reshape(-1, 2)[:, 1]
        if not math.isnan(value)
    ]
    assert drawn == pytest.approx([0.75, 1.0, -1.0, -0.75])


def test_many_runs_on_regression_data_are_spread_over_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for seed in range(8):
        with Logbook(Config(results_dir=str(tmp_path), run_name=f"run-{seed}")) as logbook:
            for number in range(3):
                logbook.write_round({"round": number, "matched_distance": 0.5 / (1 + number), "cluster_accuracy": 0.9})
        folders.append(logbook.folder)
    shown: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    plots.save_figure(plots.distances([read_run(folder) for folder in folders]), tmp_path / "distances")
    assert [len(axes.lines) for axes in shown[0].axes] == [5, 5, 4, 4], "seven others, and the first in both rows"
    assert {line.get_label() for line in shown[0].axes[0].lines} | {
        line.get_label() for line in shown[0].axes[2].lines
    } == {f"run-{seed}" for seed in range(8)}
    pyplot.close("all")


def test_a_squared_loss_is_not_drawn_as_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Logbook(Config(results_dir=str(tmp_path), local_loss="squared")) as logbook:
        logbook.write_round({"round": 1, "test_accuracy": 0.5, "train_loss": 0.2, "test_loss": 1.0, "clients": 2})
    shown: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, output: shown.append(figure) or [output])
    plots.save_figure(plots.course_figure(read_run(logbook.folder)), tmp_path / "curves")
    _, cross_entropy, squared = shown[0].axes
    assert [line.get_label() for line in cross_entropy.lines] == ["test"]
    assert [line.get_label() for line in squared.lines] == ["training (mean of clients)"]
    assert squared.get_ylabel() == "squared loss"
    pyplot.close("all")


def test_a_sweep_is_drawn_of_what_was_swept_and_nothing_else(tmp_path: Path) -> None:
    for density in (0.01, 0.1, 0.5):
        for seed in (0, 1):
            write_run(tmp_path, 0.5 + density / 10, density=density, seed=seed)
    write_run(tmp_path, 0.9, mask_rule="none")
    written = {path.name for path in plot_set(members(find_runs([tmp_path])), tmp_path / "swept")}
    assert written == {f"swept{part}.{kind}" for part in ("", "-density") for kind in ("png", "pdf")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in written)


def test_plot_takes_one_run_or_many(
    grid: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_taskarith.cli.command.MANY_LINES", 2)
    first = find_runs([grid])[0].folder
    assert main(["plot", str(first), "--output", str(tmp_path / "one")]) == 0
    assert main(["plot", str(grid), "--output", str(tmp_path / "many")]) == 0
    for wrong in (".", "..", "/"):
        assert main(["plot", str(grid), "--output", wrong]) == 1
    printed, warned = capsys.readouterr()
    assert "one.png" in printed and "many-heat-map.pdf" in printed
    assert warned.count("hard to read") == 1


def test_labels_fall_back_to_folder_names_where_settings_do_not_tell(tmp_path: Path) -> None:
    base = Config(results_dir=str(tmp_path), run_name="a", seed=0)
    folders = []
    for config in (base, dataclasses.replace(base, run_name="b", num_rounds=7)):
        with Logbook(config) as logbook:
            logbook.write_round({"round": 0, "test_accuracy": 0.5})
        folders.append(logbook.folder)
    assert [member.label for member in members([read_run(folder) for folder in folders])] == [
        "num-rounds = 24",
        "num-rounds = 7",
    ]


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, 0.5), write_run(tmp_path, 0.5)]
    assert folders[0] != folders[1]
    (member,) = members(find_runs([tmp_path, folders[0]]))
    assert len(member.runs) == 1


def test_members_that_a_figure_cannot_tell_apart_are_not_drawn_over_one_another(
    grid: Path, figures: dict[str, Figure]
) -> None:
    write_run(grid, 0.99, strategy="centralized", mask_rule="none", local_steps=4, classes_per_client=2)
    plot_set(members(find_runs([grid])), grid / "mixed")
    assert "mixed-heat-map" in figures, "centralized runs have no place in it, and take none"
    write_run(grid, 0.2, strategy="fedgma", mask_rule="none", local_steps=4, classes_per_client=2)
    plot_set(members(find_runs([grid])), grid / "strategies")
    assert "strategies-heat-map" not in figures and "strategies" in figures


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


def test_curves_keep_their_axis_where_one_fell_apart_and_name_it(tmp_path: Path, figures: dict[str, Figure]) -> None:
    for classes in (1, 2, 5):
        write_run(tmp_path, 0.97 + 0.001 * classes, classes_per_client=classes)
    write_run(tmp_path, 0.3, classes_per_client=10)
    plot_bands(members(find_runs([tmp_path])), tmp_path / "all")
    rounds = figures["all"].axes[0]
    assert rounds.get_ylim()[0] > 70 and len(rounds.lines) == 4
    assert [line.get_label() for line in rounds.lines][-1] == "Nc = 10 (ends at 30.0 %, off the scale)"


def test_no_two_lines_of_a_panel_look_alike() -> None:
    looks = [plots.REFERENCE, *(plots.line_look(turn) for turn in range(MOST))]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == MOST + 1


def test_intervals_of_a_series_end_at_zero_and_one_run_or_two_have_none() -> None:
    axes = Figure().subplots()
    frame = pandas.DataFrame({"x": [1, 1, 1, 2, 3, 3], "error": [0.1, 0.9, 0.5, 0.5, 0.1, 0.2]})
    draw_line(axes, frame, "x", "error", 0, "error")
    (bars,) = axes.containers[0].lines[2]
    drawn = [float(value) for segment in bars.get_segments() for value in segment.reshape(-1, 2)[:, 1]]
    assert drawn[0] == pytest.approx(0.0) and drawn[1] > 1.0 and len(drawn) == 2


def test_a_band_is_one_sd_on_each_side() -> None:
    assert Summary(0.0, 1.0, 3).band(-9.0, 9.0) == (-1.0, 1.0)
    assert Summary(0.0, 1.0, 3).band(-0.5, 9.0) == (-0.5, 1.0)
