"""Draws which layers and which kinds of tensor a mask lets be updated."""

from pathlib import Path
from textwrap import fill
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from fl_taskarith.describe.mask_report import DescribedMask
from fl_taskarith.figures.plots import COLOURS, STYLE, TITLE_CHARACTERS, save_figure
from fl_taskarith.masking.anatomy import KINDS, density_by_kind, density_by_layer, parts

Limits = tuple[float, float]

DECADES = 1.5  # from here on between the smallest and the largest density, the scale is logarithmic


def plot_anatomy(described: DescribedMask, output: Path) -> list[Path]:
    """Draw density by layer and kind as a heat map, and by kind below it; writes output.png and output.pdf.

    Hatched: the layer has no such tensor. White: it has, and nothing of it is updated. The scale is logarithmic where
    densities span decades, with points in place of bars.

    Raises:
        CheckpointError: a file cannot be written.
    """
    by_layer, by_kind = density_by_layer(described.mask), density_by_kind(described.mask)
    kinds = [kind for kind in KINDS if kind in by_kind]
    cells = np.full((len(by_layer), len(kinds)), np.nan)
    for (layer, kind), part in parts(described.mask).items():
        cells[list(by_layer).index(layer), kinds.index(kind)] = 100 * part.density
    bars = [100 * by_kind[kind].density for kind in kinds]
    limits = _limits(np.array([*cells[np.isfinite(cells)], *bars]))
    height = 0.21 * len(by_layer)
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, grid = pyplot.subplots(
            2, 2, figsize=(0.9 + 0.58 * max(len(kinds), 6), 2.6 + height), layout="constrained", sharex="col",
            width_ratios=(32, 1), height_ratios=(max(height, 1.2), 1.3),
        )  # fmt: skip
        _draw_cells(grid[0, 0], cells, list(by_layer), kinds, limits)
        colours = figure.colorbar(grid[0, 0].images[0], cax=grid[0, 1], label="updated weights (%)")
        colours.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _draw_bars(grid[1, 0], bars, kinds, 100 * described.mask.density, limits)
        grid[1, 1].set_axis_off()
        figure.suptitle(fill(described.title, TITLE_CHARACTERS // 2), fontsize=9, parse_math=False)
        return save_figure(figure, output)


def _limits(percents: np.ndarray) -> Limits:
    """Return the ends of the colours: 0, or the smallest positive one on a logarithmic scale, and the largest."""
    positive = percents[percents > 0]
    largest = positive.max(initial=1e-9)
    smallest = positive.min(initial=largest)
    return (float(smallest) if largest / smallest >= 10**DECADES else 0.0), float(largest)


def _draw_cells(axes: Axes, cells: np.ndarray, layers: list[str], kinds: list[str], limits: Limits) -> None:
    image = axes.imshow(
        np.where(cells > 0, cells, np.nan),
        cmap="cividis",
        norm=LogNorm(*limits) if limits[0] else Normalize(*limits),
        aspect="auto",
    )
    for (row, column), value in np.ndenumerate(cells):
        if np.isnan(value) or value == 0:
            hatch = "////" if np.isnan(value) else None
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch=hatch, edgecolor="0.8", linewidth=0.5))
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(value) if value else (1, 1, 1, 1)
            colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            axes.text(column, row, _short(value), ha="center", va="center", fontsize=6.5, color=colour)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.tick_params(labelbottom=True, length=0)
    axes.spines[:].set_visible(False)


def _draw_bars(axes: Axes, bars: list[float], kinds: list[str], whole: float, limits: Limits) -> None:
    if limits[0]:  # a bar's length says nothing on a logarithmic axis
        positive = [(place, value) for place, value in enumerate(bars) if value > 0]
        axes.plot(*zip(*positive, strict=True), marker="D", markersize=5, linestyle="", color=COLOURS[0])
    else:
        axes.bar(range(len(kinds)), bars, width=0.7, color=COLOURS[0])
    axes.axhline(whole, color=COLOURS[1], linewidth=1.2, linestyle="--", label=f"all weights: {_short(whole)} %")
    if limits[0]:
        axes.set_yscale("log")
        axes.set_ylim(limits[0] / 2, min(5 * limits[1], 300))  # room for the numbers
        axes.set_yticks([tick for tick in axes.get_yticks() if limits[0] / 2 <= tick <= 100])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, limits[1] * 1.35)
    bottom = axes.get_ylim()[0]
    for column, value in enumerate(bars):
        axes.annotate(
            _short(value),
            (column, max(value, bottom)),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},  # readable where the line crosses it
        )
    axes.set_ylabel("updated (%)")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _short(percent: float) -> str:
    """Return three significant digits; only 0 reads as 0, and only 100 as 100."""
    if not percent or percent == 100:
        return f"{percent:.0f}"
    return "<0.01" if percent < 0.01 else ">99.9" if percent >= 99.95 else f"{percent:#.3g}"
