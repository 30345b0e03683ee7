"""Spreads lines of many runs over rows of panels, few enough in each to be told apart, on axes that are comparable."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from fl_taskarith.figures.run_groups import Member
from fl_taskarith.figures.statistics import Summary

MOST = 6  # lines of a panel
ROWS = 5  # of a figure that fits a page
EXCESS = 1.5  # times as many rows as needed may be drawn for the sake of rows that have something in common
LEGEND_COLUMNS = 4  # at most
CHARACTER, HANDLE, LINE = 0.065, 0.6, 0.17  # inches that a legend's characters, samples and lines take, about
TITLE = 0.2  # inches


@dataclass(frozen=True)
class Row:
    """Lines that share panels: what they have in common, if anything, their places, and the one in every row."""

    title: str
    places: tuple[int, ...]
    reference: int | None = None


def spread(
    count: int, features: Sequence[Sequence[str]] = (), reference: int | None = None, most: int = MOST
) -> list[Row]:
    """Spread `count` lines over as many rows as they need, at most `most` in each, the reference first in every one.

    Args:
        features: what lines may be grouped by, in words, a value per line; the first that needs fewest rows, and
            splits fewest groups, is taken. Without one that suits, the lines are grouped in their order.
        reference: the line that is repeated in every row.
    """
    if count <= most:
        return [Row("", tuple(range(count)))] if count else []
    again = () if reference is None else (reference,)
    others = [place for place in range(count) if place != reference]
    room = most - len(again)
    plain = _evenly({"": others}, room)
    candidates: list[tuple[int, int, list[Row]]] = []  # rows, groups that are split, ...
    for values in features:
        groups: dict[str, list[int]] = {}
        for place in others:
            groups.setdefault(values[place], []).append(place)
        rows = _evenly(groups, room)
        if len(groups) > 1 and len(rows) <= EXCESS * len(plain):
            candidates.append((len(rows), sum(len(group) > room for group in groups.values()), rows))
    *_, best = min(candidates, key=lambda each: each[:2], default=(0, 0, plain))
    return [Row(row.title, again + row.places, reference) for row in best]


def _evenly(groups: dict[str, list[int]], room: int) -> list[Row]:
    """Return rows of about equal length for each group."""
    return [
        Row(title, tuple(part.tolist()))
        for title, places in groups.items()
        for part in np.array_split(places, ceil(len(places) / room))
    ]


def pages(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each figure, at most `ROWS` and about as many in each."""
    return [[rows[place] for place in part] for part in np.array_split(range(len(rows)), ceil(len(rows) / ROWS))]


def open_rows(
    labels: Sequence[Sequence[str]], columns: int, width: float, height: float, note: str
) -> tuple[Figure, list[SubFigure], list[list[Axes]]]:
    """Open a figure with a row of panels for each entry of `labels`, those of its lines; return it, its parts, panels.

    Args:
        columns: panels in a row.
        width, height: inches of the figure, and of a row without its legend.
        note: stands above all rows.
    """
    heights = [height + LINE * ceil(len(row) / legend_columns(row, width)) for row in labels]
    figure = pyplot.figure(figsize=(width, sum(heights) + TITLE), layout="constrained")
    figure.suptitle(note, fontsize=8)
    parts = figure.subfigures(len(labels), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
    return figure, parts, [part.subplots(1, columns, squeeze=False)[0].tolist() for part in parts]


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns a legend of `labels` has below a figure that is `width` inches wide."""
    longest = max(map(len, labels), default=0)
    return max(1, min(LEGEND_COLUMNS, len(labels), int(width / (HANDLE + CHARACTER * longest))))


def legend_below(part: Figure | SubFigure, axes: Axes, width: float, **options: Any) -> None:
    """Draw the legend of `axes` below all panels of its row."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = legend_columns(labels, width)
        part.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, title_fontsize=8, **options)


def match(panels: Iterable[Axes], *directions: str) -> None:
    """Give panels the same limits, which hold all that each of them shows; later lines do not move them."""
    panels = [axes for axes in panels if axes.has_data()]
    for direction in directions:
        ends = [getattr(axes, f"get_{direction}lim")() for axes in panels]
        for axes in panels:
            getattr(axes, f"set_{direction}lim")(min(low for low, _ in ends), max(high for _, high in ends))


def draw_bars(
    axes: Axes, places: Sequence[float], points: Sequence[Summary], limits: tuple[float, float], **look: Any
) -> None:
    """Draw means with bars of one sd that end where no value can be; no bar where n = 1."""
    means = np.array([point.mean for point in points])
    low, high = np.array([point.band(*limits) for point in points]).T
    error = None if np.isnan(low).all() else np.array([means - low, high - means])
    axes.errorbar(places, means, yerr=error, capsize=2.5, linewidth=1.3, elinewidth=0.9, markersize=4.5, **look)


def seeds_note(counts: Iterable[int], spread_as: str, divisions: Iterable[int] = ()) -> str:
    """Say how many seeds means are over, and what shows their spread ("bands" or "bars").

    Args:
        divisions: how many divisions of the data the runs share, where they do.
    """
    seeds = sorted(set(counts)) or [1]
    if seeds == [1]:
        return f"one seed (n = 1), no {spread_as}"
    shared = sorted(set(divisions))
    over = f"runs on {_range(shared)} divisions of the data" if shared else "seeds"
    none = ", none where n = 1" if seeds[0] == 1 else ""
    return f"means over n = {_range(seeds)} {over}; {spread_as}: ± 1 sd{none}"


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def runs_note(members: Iterable[Member], spread_as: str) -> str:
    """Say over how many seeds, or runs on shared divisions of the data, the members' means are."""
    found = list(members)
    divisions = (each.divisions for each in found if each.divisions)
    return seeds_note((len(each.runs) for each in found), spread_as, divisions)


def numbered(labels: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the labels, with n where it is not the same for all."""
    if len(set(counts)) < 2:
        return list(labels)
    return [f"{label} (n = {count})" for label, count in zip(labels, counts, strict=True)]
