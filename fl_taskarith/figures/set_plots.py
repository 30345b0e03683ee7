"""Figures over a set of runs: curves with a band over seeds, Nc against J, sweeps of a setting, clients' drift."""

from collections.abc import Mapping, Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

from fl_taskarith.figures.layer_plots import plot_overlap
from fl_taskarith.figures.panels import Row, draw_bars, runs_note, spread
from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLE, STYLES, draw_rows, line_look, save_figure
from fl_taskarith.figures.run_groups import Member
from fl_taskarith.figures.set_curves import is_idle, plot_bands
from fl_taskarith.figures.setting_words import evenness, mask_words, mean_local_steps, sharding_words
from fl_taskarith.figures.statistics import Summary

SWEPT = {"density": "density (share of weights updated)", "calibration-rounds": "calibration rounds R"}
DRIFT = (
    ("client_update_norm", "‖τ$_k$‖₂\nmean over clients and rounds", (0.0, inf)),
    ("client_cosine", "cosine between clients' τ$_k$\nmean over rounds", (-1.0, 1.0)),
)
TICKS = (1.0, 2.0, 5.0)  # of a decade of norms
SHIFT = 0.03  # of the distance between two shardings
MAPS = 3  # heat maps side by side
CELL = (0.75, 0.42)  # inches of a heat map's cell


def possible_figures(output: Path) -> list[Path]:
    """Return every file that `plot_set`, or a figure of a single run, may write for `output`."""
    names = (output.name, *(f"{output.name}-{suffix}" for suffix in ("heat-map", "drift", "overlap", *SWEPT)))
    return [output.with_name(name + ending) for name in names for ending in (".png", ".pdf")]


def plot_set(members: Sequence[Member], output: Path) -> list[Path]:
    """Draw every figure for which the members differ in the right settings: OUTPUT.png, OUTPUT-heat-map.png, ...

    Raises:
        CheckpointError: a figure cannot be written.
    """
    paths = plot_bands(members, output)
    for suffix, draw in (("heat-map", plot_heat_map), ("drift", plot_drift), ("overlap", plot_overlap)):
        paths += draw(members, output.with_name(f"{output.name}-{suffix}"))
    for key in SWEPT:
        paths += plot_sweep(members, key, output.with_name(f"{output.name}-{key}"))
    return paths


class Place(NamedTuple):
    """Where a member stands in a heat map or a figure of drift."""

    mask: str
    sharding: str
    steps: float


def plot_heat_map(members: Sequence[Member], output: Path) -> list[Path]:
    """Draw mean test accuracy for sharding x local steps, a panel per mask; nothing unless both differ.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    places = {place: each for place, each in _places(members).items() if each.last_percent().n}
    shardings, steps, masks = _axes_of(places)
    if len(shardings) < 2 or len(steps) < 2:
        return []
    cells = {place: member.last_percent() for place, member in places.items()}
    columns = min(len(masks), MAPS)
    lines = ceil(len(masks) / columns)
    size = (1.2 + (0.5 + CELL[0] * len(steps)) * columns, (0.75 + CELL[1] * len(shardings)) * lines + 0.2)
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        means = [point.mean for point in cells.values()]
        for axes, mask in zip(grid.flat, masks, strict=False):
            image = _draw_map(axes, cells, mask, shardings, steps, (min(means), max(means)))
        for axes in grid.flat[len(masks) :]:
            axes.set_axis_off()
        figure.suptitle(runs_note(places.values(), "cells"), fontsize=8)
        figure.colorbar(image, ax=list(grid.flat), label="test accuracy (%)")
        return save_figure(figure, output)


def _draw_map(
    axes: Axes, cells: Mapping[Place, Summary], mask: str, shardings: Sequence[str], steps: Sequence[float],
    limits: tuple[float, float],
) -> AxesImage:  # fmt: skip
    table = np.full((len(shardings), len(steps)), np.nan)
    for row, column in np.ndindex(table.shape):
        point = cells.get(Place(mask, shardings[row], steps[column]))
        if point is None:
            axes.text(column, row, "not run", ha="center", va="center", fontsize=7)
            continue
        table[row, column] = point.mean
        text = f"{point.mean:.1f}" + (f" ± {point.sd:.1f}" if point.n > 1 else "")
        colour = "w" if point.mean < sum(limits) / 2 else "k"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    image = axes.imshow(table, vmin=limits[0], vmax=limits[1], cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(steps)), [f"{each:g}" for each in steps])
    axes.set_yticks(range(len(shardings)), shardings)
    axes.set_xlabel("local steps J")
    axes.set_title(mask, fontsize=9)
    return image


def plot_drift(members: Sequence[Member], output: Path) -> list[Path]:
    """Draw ‖τ_k‖ and the pairwise cosine of task vectors, means over all rounds, against sharding.

    A line per mask and J, in the colour of the mask, or of J where all masks are equal. Nothing is drawn unless
    shardings differ and cosines were logged.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    places = {place: each for place, each in _places(members).items() if each.mean_of("client_cosine").n}
    shardings, steps, masks = _axes_of(places)
    if len(shardings) < 2:
        return []
    lines = sorted({(place.steps, masks.index(place.mask)) for place in places})
    keys = [(masks[mask], each) for each, mask in lines]
    labels = [mask + (f", J = {each:g}" if len(steps) > 1 else "") for mask, each in keys]
    features = ([f"J = {each:g}" for _, each in keys], [mask for mask, _ in keys])
    first = next((place for place, (mask, _) in enumerate(keys) if mask == "all weights"), 0)

    def draw(row: Row, panels: Sequence[Axes]) -> None:
        looks = _looks([keys[place] for place in row.places])
        for turn, (place, look) in enumerate(zip(row.places, looks, strict=True)):
            mask, each = keys[place]
            line = {sharding: places.get(Place(mask, sharding, each)) for sharding in shardings}
            shift = SHIFT * (turn - (len(row.places) - 1) / 2)  # so that bars of several lines do not hide one another
            _draw_drift(panels, line, shift, {**look, "label": labels[place]})

    note = runs_note(places.values(), "bars")
    varied = [name for name, values in (("mask", masks), ("local steps J", steps)) if len(values) > 1]
    title = "; ".join(map(": ".join, zip(("colour", "line"), varied, strict=False)))
    figure = draw_rows(spread(len(keys), features, first), labels, draw, (2, 3.6, 2.6), note, title=title)
    return save_figure(figure, output)


def _looks(keys: Sequence[tuple[str, float]]) -> list[dict[str, str]]:
    """Colours by mask and line styles by J, or colours by J where masks are equal; every line has its own marker."""
    masks, steps = (list(dict.fromkeys(values)) for values in zip(*keys, strict=True))
    return [
        {
            "color": COLOURS[(masks.index(mask) if len(masks) > 1 else steps.index(local_steps)) % len(COLOURS)],
            "linestyle": STYLES[steps.index(local_steps) % len(STYLES)],
            "marker": MARKERS[turn % len(MARKERS)],
        }
        for turn, (mask, local_steps) in enumerate(keys)
    ]


def _draw_drift(
    panels: Sequence[Axes], line: Mapping[str, Member | None], shift: float, look: Mapping[str, Any]
) -> None:
    """Draw one line of both panels, `shift` to the right."""
    for axes, (column, name, limits) in zip(panels, DRIFT, strict=True):
        found = {place: each.mean_of(column) for place, each in enumerate(line.values()) if each is not None}
        points = {place + shift: point for place, point in found.items() if point.n}
        if points:
            draw_bars(axes, list(points), list(points.values()), limits, **look)
        axes.set_xticks(range(len(line)), list(line))
        axes.set_xlabel("division of the data")
        axes.set_ylabel(name)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=TICKS))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())


def plot_sweep(members: Sequence[Member], key: str, output: Path) -> list[Path]:
    """Draw final test accuracy against a numeric setting, a line per sharding; nothing unless it differs.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    scored = [each for each in members if each.settings["mask-rule"] == "least-sensitive"]
    drawn = [each for each in _trained(scored) if each.last_percent().n and _usual(each, scored, key)]
    lines: dict[str, dict[float, Member]] = {}
    for member in drawn:
        lines.setdefault(sharding_words(member.settings), {})[float(member.settings[key])] = member
    if sum(map(len, lines.values())) < len(drawn):  # they differ in something else too, and would hide one another
        return []
    if max((len(line) for line in lines.values()), default=0) < 2:
        return []
    shardings = list(lines)
    ticks = sorted({value for line in lines.values() for value in line})

    def draw(row: Row, panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for turn, place in enumerate(row.places):
            line = dict(sorted(lines[shardings[place]].items()))
            points = [member.last_percent() for member in line.values()]
            draw_bars(axes, list(line), points, (0.0, 100.0), label=shardings[place], **line_look(turn))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(SWEPT[key])
        axes.set_ylabel("test accuracy (%)")

    note = runs_note(drawn, "bars")
    return save_figure(draw_rows(spread(len(shardings), reference=0), shardings, draw, (1, 4.4, 2.8), note), output)


def _usual(member: Member, members: Sequence[Member], key: str) -> bool:
    """Return whether `member` has the most common values of the other swept settings."""
    others = {other: [each.settings[other] for each in members] for other in SWEPT if other != key}
    return all(member.settings[other] == max(values, key=values.count) for other, values in others.items())


def _trained(members: Sequence[Member]) -> list[Member]:
    """Return those whose clients trained."""
    return [each for each in members if each.settings["strategy"] != "centralized" and not is_idle(each.settings)]


def _places(members: Sequence[Member]) -> dict[Place, Member]:
    """Return the trained members by their place; none where two have one place and would hide one another."""
    trained = _trained(members)
    found = {
        Place(mask_words(each.settings), sharding_words(each.settings), mean_local_steps(each.settings)): each
        for each in trained
    }
    return found if len(found) == len(trained) else {}


def _axes_of(places: Mapping[Place, Member]) -> tuple[list[str], list[float], list[str]]:
    """Return shardings (from few classes per client to iid), local steps and masks."""
    by_evenness = sorted(places, key=lambda place: evenness(places[place].settings))
    shardings = list(dict.fromkeys(place.sharding for place in by_evenness))
    return shardings, sorted({place.steps for place in places}), list(dict.fromkeys(place.mask for place in places))
