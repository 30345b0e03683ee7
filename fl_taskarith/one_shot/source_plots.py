"""Merged accuracy against one source of heterogeneity while the other is held fixed, a line per method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib import pyplot
from matplotlib.axes import Axes

from fl_taskarith.figures.panels import MOST, draw_bars, legend_below, match, open_rows, seeds_note, spread
from fl_taskarith.figures.plots import STYLE, line_look, save_figure
from fl_taskarith.one_shot.cell_results import OneShotResults, Place, ends

LEVELS = (("own_test_accuracy", "own models", "-."), ("pretrained_test_accuracy", "θ₀", ":"))
"""What every panel shows beside the methods: a column of the records, in words, and its line."""
SHIFT = 0.05  # of a level's width between two methods' points, so that none hides another


def plot_sources(results: OneShotResults, folder: Path) -> list[Path]:
    """Draw against-data and against-training, PNG and PDF: a panel with the other heterogeneity lowest, one highest.

    Nothing is drawn, and no path returned, for a source with one level or while no cell is done.
    """
    data, training = results.one_shot.data, results.one_shot.training
    paths: list[Path] = []
    if not any(results.records.values()):
        return paths
    if len(data) > 1:
        panels = {f"training heterogeneity: {held}": [(level, held) for level in data] for held in ends(training)}
        paths += _plot(results, panels, list(data), "data heterogeneity", folder / "against-data")
    if len(training) > 1:
        panels = {f"data heterogeneity: {held}": [(held, level) for level in training] for held in ends(data)}
        paths += _plot(results, panels, list(training), "training heterogeneity", folder / "against-training")
    return paths


def _plot(
    results: OneShotResults, panels: dict[str, list[Place]], levels: Sequence[str], label: str, output: Path
) -> list[Path]:
    methods, width = list(results.one_shot.methods), 3.6 * len(panels)
    rows = spread(len(methods), most=MOST - len(LEVELS))
    names = [[*(methods[place] for place in row.places), *(name for _, name, _ in LEVELS)] for row in rows]
    counts = [results.summary(place, method).n for places in panels.values() for place in places for method in methods]
    note = seeds_note((count for count in counts if count), "bars")
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, parts, grid = open_rows(names, len(panels), width, 2.9, note)
        for row, part, panels_of_row in zip(rows, parts, grid, strict=True):
            for axes, (title, places) in zip(panels_of_row, panels.items(), strict=True):
                _draw(axes, results, places, [methods[place] for place in row.places])
                axes.set_xticks(range(len(levels)), levels)
                axes.set_xlabel(label)
                axes.set_title(title, fontsize=9)
            panels_of_row[0].set_ylabel("mean test accuracy\nover tasks (%)")
            legend_below(part, panels_of_row[0], width)
        match((axes for row in grid for axes in row), "x", "y")
        return save_figure(figure, output)


def _draw(axes: Axes, results: OneShotResults, places: Sequence[Place], methods: Sequence[str]) -> None:
    for index, method in enumerate(methods):
        summaries = {at: results.summary(place, method) for at, place in enumerate(places)}
        done = {at: summary for at, summary in summaries.items() if summary.n}
        shift = SHIFT * (index - (len(methods) - 1) / 2)
        if done:
            look = {**line_look(index), "label": method}
            draw_bars(axes, [at + shift for at in done], list(done.values()), (0.0, 100.0), **look)
    for name, label, style in LEVELS:
        means = [results.fact(place, name, 100).mean for place in places]
        axes.plot(range(len(places)), means, color="grey", linestyle=style, marker="|", linewidth=1.1, label=label)
