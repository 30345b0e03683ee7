"""The figures of a study's tables: accuracy per arm, each seed visible, and accuracy across tables."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, cast

from matplotlib import pyplot
from matplotlib.axes import Axes

from fl_taskarith.figures.panels import Row, draw_bars, seeds_note, spread
from fl_taskarith.figures.plots import COLOURS, STYLE, TITLE_CHARACTERS, draw_rows, line_look, off_scale, save_figure
from fl_taskarith.figures.setting_words import evenness
from fl_taskarith.figures.statistics import summarise
from fl_taskarith.study.comparison import Comparison, head_words

ROW_HEIGHT = 0.36  # inches per arm
LEFTMOST, HIGHEST = -0.4, 100.4  # %, of the axis: a mark at 0 or 100 is whole
ABOVE, BELOW, LOWEST = -0.16, 0.04, 0.3  # of an arm's line: the mean, the first and the last seed, so none is hidden


def plot_arms(rows: Sequence[Comparison], title: str, output: Path) -> list[Path]:
    """Test accuracy of the arms of one table: mean ± sd, every seed a point, the solved head a mark.

    An arm that fell apart stands as a number at the left edge, where the axis does not reach; one that is not tuned has
    a dagger.

    Writes output.png and output.pdf; draws nothing, and returns no path, while no run is done.

    Raises:
        CheckpointError: the output cannot be written.
    """
    if not any(row.test.n for row in rows):
        return []
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(figsize=(6.3, 1.3 + ROW_HEIGHT * len(rows)), layout="constrained")
        places = [place for place, row in enumerate(rows) if row.test.n]
        lost = {places[index] for index in off_scale([rows[place].test.mean for place in places])}
        for place, row in enumerate(rows):
            _draw_arm(axes, place, row, place in lost, head_words(rows))
        untuned = [row.results.choice is not None and row.results.choice.edge for row in rows]
        names = [row.results.arm.label + " †" * edge for row, edge in zip(rows, untuned, strict=True)]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, LEFTMOST), min(right, HIGHEST))
        axes.set_xlabel("test accuracy (%)" + "; †: rate at an end of its grid, not tuned" * any(untuned))
        axes.set_title(fill(title, TITLE_CHARACTERS // 2), fontsize=9, loc="left")
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))  # every arm brings the same three
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
        return save_figure(figure, output)


def plot_groups(rows: Sequence[Comparison], output: Path) -> list[Path]:
    """Draw test accuracy against the study's groups, from few classes per client to iid: mean ± sd, a line per arm.

    It has the tuned arms with finished runs in two groups or more; nothing is drawn, and no path returned, without two.
    A dotted line marks the solved head before training, where all groups have the same.

    Raises:
        CheckpointError: the output cannot be written.
    """
    tuned = [row for row in rows if row.test.n and row.results.choice is not None and not row.results.choice.edge]
    divisions = {row.results.arm.group: evenness(row.results.settings) for row in rows}
    groups = list(divisions)
    if len(set(divisions.values())) == len(groups):
        groups.sort(key=lambda group: divisions[group])
    lines: dict[str, list[Comparison]] = {}
    for row in tuned:
        lines.setdefault(row.results.arm.label, []).append(row)
    lines = {label: own for label, own in lines.items() if len(own) > 1}
    heads = {round(row.ridge.mean, 2) for own in lines.values() for row in own if row.ridge.n}
    if len(lines) < 2:
        return []

    def draw(each: Row, panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for turn, place in enumerate(each.places):
            label = list(lines)[place]
            found = {row.results.arm.group: row.test for row in lines[label]}
            points = [found.get(group, summarise([])) for group in groups]  # a gap where it was not run
            draw_bars(axes, range(len(groups)), points, (0.0, 100.0), label=label, **line_look(turn))
        if len(heads) == 1:
            axes.axhline(*heads, color="black", linewidth=0.8, linestyle=":", label=f"{head_words(rows)}, no training")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.3, len(groups) - 0.7)
        axes.set_ylabel("test accuracy (%)")

    note = seeds_note((row.test.n for own in lines.values() for row in own), "bars")
    return save_figure(draw_rows(spread(len(lines)), list(lines), draw, (1, 6.3, 3.0), note), output)


def _draw_arm(axes: Axes, place: int, row: Comparison, lost: bool, head: str) -> None:
    values = list(row.accuracies.values())
    one = "one run" if any(isinstance(key, tuple) for key in row.accuracies) else "one seed"
    if not values:
        _at_the_edge(axes, place, "not run", alpha=0.6)
        return
    if lost:
        spread = f" ± {row.test.sd:.1f}" if len(values) > 1 else ""
        _at_the_edge(axes, place, f"← {row.test.mean:.1f}{spread}, off the scale", color=COLOURS[1])
        return
    if row.ridge.n:
        axes.plot(row.ridge.mean, place, marker="|", color="black", markersize=11, markeredgewidth=1.2, linestyle="",
                  label=f"{head}, no training")  # fmt: skip
    step = (LOWEST - BELOW) / max(1, len(values) - 1)
    heights = [place + BELOW + step * index for index in range(len(values))]
    axes.plot(values, heights, marker="o", linestyle="", markersize=4, markerfacecolor="none", color=COLOURS[0],
              label=one)  # fmt: skip
    if len(values) > 1:
        low, high = row.test.band(0.0, 100.0)
        ends = [[row.test.mean - low], [high - row.test.mean]]
        axes.errorbar(row.test.mean, place + ABOVE, xerr=ends, fmt="D", markersize=4.5, capsize=3, linewidth=1.4,
                      color=COLOURS[1], label="mean ± sd")  # fmt: skip


def _at_the_edge(axes: Axes, place: int, text: str, **look: Any) -> None:
    axes.annotate(text, (0.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, **look)
