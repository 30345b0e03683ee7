"""Merged accuracy against one source of heterogeneity while the other is held fixed, a line per method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib import pyplot
from matplotlib.axes import Axes

from fl_taskarith.one_shot.comparison import OneShotResults, Place
from fl_taskarith.study.plots import COLOURS, STYLE, STYLES, save_figure

MARKERS = "osD^vP*X"
SHIFT = 0.05  # of a level's width between two methods' points, so that none hides another


def plot_sources(results: OneShotResults, folder: Path) -> list[Path]:
    """against-data and against-training, PNG and PDF: a panel with the other heterogeneity lowest, one with it highest.

    Nothing is drawn, and no path returned, for a source with one level or while no cell is done.
    """
    data, training = list(results.one_shot.data), list(results.one_shot.training)
    paths: list[Path] = []
    if not any(results.records.values()):
        return paths
    if len(data) > 1:
        panels = {f"training heterogeneity: {held}": [(level, held) for level in data] for held in _ends(training)}
        paths += _plot(results, panels, data, "data heterogeneity", folder / "against-data")
    if len(training) > 1:
        panels = {f"data heterogeneity: {held}": [(held, level) for level in training] for held in _ends(data)}
        paths += _plot(results, panels, training, "training heterogeneity", folder / "against-training")
    return paths


def _ends(levels: Sequence[str]) -> list[str]:
    return list(dict.fromkeys((levels[0], levels[-1])))


def _plot(
    results: OneShotResults, panels: dict[str, list[Place]], levels: Sequence[str], label: str, output: Path
) -> list[Path]:
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, grid = pyplot.subplots(
            1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, (title, places) in zip(grid[0], panels.items(), strict=True):
            _draw(axes, results, places)
            axes.set_xticks(range(len(levels)), levels)
            axes.set_xlabel(label)
            axes.set_title(title, fontsize=9)
        grid[0][0].set_ylabel("mean test accuracy over tasks (%)")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8)
        return save_figure(figure, output)


def _draw(axes: Axes, results: OneShotResults, places: Sequence[Place]) -> None:
    methods = results.one_shot.methods
    for index, method in enumerate(methods):
        summaries = [results.summary(place, method) for place in places]
        shift = SHIFT * (index - (len(methods) - 1) / 2)
        axes.errorbar(
            [at + shift for at in range(len(places))],
            [summary.mean for summary in summaries],
            yerr=[summary.sd if summary.n > 1 else 0.0 for summary in summaries],
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.1,
            elinewidth=0.7,
            capsize=1.5,
            label=method,
        )
    for name, label, style in (
        ("own_test_accuracy", "own models", "-."),
        ("pretrained_test_accuracy", "θ₀", ":"),
    ):
        means = [results.fact(place, name, 100).mean for place in places]
        axes.plot(range(len(places)), means, color="grey", linestyle=style, linewidth=1.1, label=label)
