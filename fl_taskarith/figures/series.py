"""Charts of studies with many cells, written down as tables: panels of lines with error bars, from a frame of runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas
from matplotlib import pyplot
from matplotlib.axes import Axes
from scipy.stats import binomtest
from scipy.stats import t as student

from fl_taskarith.figures.markdown import three_digits
from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLE, STYLES, save_figure
from fl_taskarith.figures.statistics import CONFIDENCE, FEWEST, paired, summarise

Where = Mapping[str, object]
"""The value that each of these columns of a frame must have."""


@dataclass(frozen=True)
class Panel:
    """The mean of column `y` against `x`, one line for each of `lines`: its label, and the rows it is about.

    where: the rows that the panel is about. look: the number of the first line's colour, style and marker. options: of
    matplotlib's Axes.set. ticks: on the x axis, all of them named. log: the base of a logarithmic x axis; 0 is a linear
    one. share: whether `y` is a success, 0 or 1. draw: draws what lines cannot, from the panel's rows.
    """

    x: str = ""
    y: str = ""
    lines: Sequence[tuple[str, Where]] = ()
    where: Where = field(default_factory=dict)
    look: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    ticks: Sequence[float] = ()
    log: int = 0
    share: bool = False
    draw: Callable[[Axes, pandas.DataFrame], None] | None = None


@dataclass(frozen=True)
class Chart:
    """A figure: its file's name, its rows of panels, its size in inches (height per row), its legend and its titles."""

    name: str
    panels: Sequence[Sequence[Panel]]
    legend_columns: int
    width: float = 7.2
    height: float = 2.8
    sharex: bool = False
    sharey: bool | str = False
    title: str = ""
    ylabel: str = ""


def draw_chart(chart: Chart, frame: pandas.DataFrame, folder: Path) -> str:
    """Write the chart's PNG and PDF into `folder`; return the Markdown that shows it. Empty panels say "not run"."""
    rows, columns = len(chart.panels), len(chart.panels[0])
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(chart.width, chart.height * rows), layout="constrained", squeeze=False,
            sharex=chart.sharex, sharey=cast(Any, chart.sharey),
        )  # fmt: skip
    panels = list(zip(axes.flat, (panel for row in chart.panels for panel in row), strict=True))
    for part, panel in panels:
        shown = select(frame, panel.where)
        for index, (label, where) in enumerate(panel.lines, start=panel.look):
            draw_line(part, select(shown, where), panel.x, panel.y, index, label, panel.share)
        if panel.draw is not None:
            panel.draw(part, shown)
    labels: dict[str, Any] = {}
    for part, panel in panels:  # once all are drawn, for panels may share an axis and its limits
        _set_axes(part, panel)
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
        if not part.has_data():
            part.annotate("not run", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", alpha=0.6)
    if chart.title:
        figure.suptitle(chart.title, fontsize=9)
    if chart.ylabel:
        figure.supylabel(chart.ylabel, fontsize=9)
    if labels:
        figure.legend(
            labels.values(), labels.keys(), loc="outside lower center", ncols=chart.legend_columns, fontsize=8,
            frameon=False,
        )  # fmt: skip
    with pyplot.rc_context(cast(Any, STYLE)):
        save_figure(figure, folder / chart.name)
    return f"![{chart.name}]({chart.name}.png)"


def _set_axes(axes: Axes, panel: Panel) -> None:
    if panel.log:
        axes.set_xscale("log", base=panel.log)
    if panel.ticks:
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.minorticks_off()
    axes.set(**panel.options)
    axes.title.set_fontsize(9)


def draw_line(axes: Axes, frame: pandas.DataFrame, x: str, y: str, index: int, label: str, share: bool = False) -> None:
    """Draw the mean of `y` against `x` with 95 % intervals, in colour, style and marker number `index`.

    Intervals are Student's t, or Wilson's where `y` is a `share` of successes, 0 or 1 each. They end at 0, below which
    no error, distance or count lies; a mean of one or two runs has no t interval.
    """
    if frame.empty:
        return
    means = summary_by(frame, x, y)
    bottom, top = means["mean"] - means["half"], means["mean"] + means["half"]
    if share:
        counts = zip(means["mean"] * means["count"], means["count"], strict=True)
        wilson = [binomtest(round(hits), int(runs)).proportion_ci(CONFIDENCE, method="wilson") for hits, runs in counts]
        bottom, top = (pandas.Series(ends, means.index) for ends in zip(*wilson, strict=True))
    low = (means["mean"] - bottom.clip(lower=0.0)).clip(lower=0.0)
    high = (top - means["mean"]).clip(lower=0.0)
    styles = (("color", COLOURS), ("linestyle", STYLES), ("marker", MARKERS))
    look: dict[str, Any] = {name: values[index % len(values)] for name, values in styles}
    axes.errorbar(
        means.index.to_numpy(dtype=float), means["mean"], yerr=None if low.isna().all() else [low, high],
        markersize=3.5, linewidth=1.3, elinewidth=0.9, capsize=2, label=label, **look,
    )  # fmt: skip


def select(frame: pandas.DataFrame, where: Where) -> pandas.DataFrame:
    """Return the rows whose columns have the values `where` gives."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def summary_by(frame: pandas.DataFrame, keys: str | list[str], value: str) -> pandas.DataFrame:
    """Return mean, sd, n and half the width of the 95 % t interval (nan for n < 3) of `value` for each of `keys`."""
    summary = frame.groupby(keys)[value].agg(["mean", "std", "count", "sem"])
    half = summary["sem"] * student.ppf(0.5 + CONFIDENCE / 2, summary["count"] - 1)
    return summary.assign(half=half.where(summary["count"] >= FEWEST))


def mean_and_sd(runs: pandas.DataFrame, column: str) -> str:
    """Return a column's mean ± sd and n, for a table; "not run" without any."""
    summary = summarise(runs[column].tolist())
    if not summary.n:
        return "not run"
    spread = "" if math.isnan(summary.sd) else f" ± {three_digits(summary.sd)}"
    return f"{three_digits(summary.mean)}{spread} (n = {summary.n})"


def mean_difference(runs: pandas.DataFrame, reference: pandas.DataFrame, column: str) -> str:
    """Return the mean difference over common seeds with its 95 % interval or, of two seeds, with both differences.

    The runs differ in the seed alone.
    """
    values, others = (dict(zip(each["seed"], each[column], strict=True)) for each in (runs, reference))
    difference = paired(values, others)
    if difference.n < 2:
        return "not run"
    mean, low, high, *each = (
        three_digits(value, "+") for value in (difference.mean, difference.low, difference.high, *difference.values)
    )
    return f"{mean} [{low}, {high}]" if difference.over else f"{mean} ({', '.join(each)})"
