"""Lines with error bars from a table of runs, for figures of studies with many cells."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm
from scipy.stats import t as student

from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLE, STYLES, save_figure
from fl_taskarith.figures.statistics import CONFIDENCE, Paired, Summary


def summary_by(frame: pandas.DataFrame, keys: str | list[str], value: str) -> pandas.DataFrame:
    """Mean, sd, n and half the width of the 95 % t interval (nan for n = 1) of `value` for each of `keys`."""
    summary = frame.groupby(keys)[value].agg(["mean", "std", "count"])
    quantiles = [student.ppf(0.5 + CONFIDENCE / 2, n - 1) if n > 1 else math.nan for n in summary["count"]]
    summary["half"] = summary["std"] / summary["count"] ** 0.5 * quantiles
    return summary


def draw_line(axes: Axes, frame: pandas.DataFrame, x: str, y: str, index: int, label: str, share: bool = False) -> None:
    """Mean of `y` against `x` with 95 % intervals, in the colour, line and marker number `index`; nothing if empty.

    Intervals are Student's t, or Wilson's where `y` is a `share` of successes, 0 or 1 each. They end at 0, below which
    no error, distance or count lies; a mean of one run has none.
    """
    if frame.empty:
        return
    means = summary_by(frame, x, y)
    middle, half = _wilson(means["mean"], means["count"]) if share else (means["mean"], means["half"])
    low = (means["mean"] - (middle - half).clip(lower=0.0)).clip(lower=0.0)
    high = (middle + half - means["mean"]).clip(lower=0.0)
    axes.errorbar(
        means.index.to_numpy(dtype=float),
        means["mean"],
        yerr=None if low.isna().all() else [low, high],
        color=COLOURS[index % len(COLOURS)],
        linestyle=STYLES[index % len(STYLES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=3.5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
        label=label,
    )


def _wilson(rates: pandas.Series, counts: pandas.Series) -> tuple[pandas.Series, pandas.Series]:
    """Middle and half width of the 95 % score interval of a proportion (Wilson 1927)."""
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    scale = 1 + z**2 / counts
    middle = (rates + z**2 / (2 * counts)) / scale
    return middle, z / scale * (rates * (1 - rates) / counts + z**2 / (4 * counts**2)) ** 0.5


def subplots(rows: int, columns: int, width: float = 7.2, height: float = 2.8, **options: Any) -> tuple[Figure, Any]:
    """A figure in our style and its axes, always a 2-D array; `height` in inches per row."""
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False, **options
        )
    return figure, axes


def share_legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One legend below the figure with every label of `axes` once; says so where there is nothing to show."""
    shown: dict[str, Any] = {}
    for part in axes:
        for handle, label in zip(*part.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
        if not part.has_data():
            part.annotate("not run", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", alpha=0.6)
    if shown:
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
        )


def save(figure: Figure, output: Path) -> str:
    """Write output.png and output.pdf; returns the Markdown that shows the figure."""
    with pyplot.rc_context(cast(Any, STYLE)):
        save_figure(figure, output)
    return f"![{output.name}]({output.name}.png)"


def with_sd(summary: Summary, digits: int = 3) -> str:
    """Mean ± sd with n, for a table; "not run" without any."""
    if not summary.n:
        return "not run"
    spread = "" if math.isnan(summary.sd) else f" ± {summary.sd:.{digits}g}"
    return f"{summary.mean:.{digits}g}{spread} (n = {summary.n})"


def with_interval(difference: Paired, digits: int = 3) -> str:
    """A mean difference with its 95 % interval."""
    if difference.n < 2:
        return "not run"
    return f"{difference.mean:+.{digits}g} [{difference.low:+.{digits}g}, {difference.high:+.{digits}g}]"


def by_seed(runs: pandas.DataFrame, column: str) -> dict[int, float]:
    """`column` of runs that differ in nothing but the seed."""
    return dict(zip(runs["seed"].tolist(), runs[column].tolist(), strict=True))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
