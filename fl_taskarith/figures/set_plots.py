"""Figures over a set of runs: curves with a band over seeds, Nc against J, sweeps of a setting, clients' drift."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

from fl_taskarith.figures.panels import draw_bars, legend_below, match, open_rows, seeds_note, spread
from fl_taskarith.figures.plots import COLOURS, MARKERS, STYLE, STYLES, line_look, save_figure
from fl_taskarith.figures.run_groups import (
    Member,
    last_test_accuracy,
    mask_words,
    mean_local_steps,
    mean_of,
    sharding_words,
)
from fl_taskarith.figures.set_curves import is_idle, plot_bands
from fl_taskarith.figures.statistics import Summary

SWEPT = {"density": "density (share of weights updated)", "calibration-rounds": "calibration rounds R"}
DRIFT = (
    ("client_update_norm", "‖τ$_k$‖₂\nmean over clients and rounds", (0.0, float("inf"))),
    ("client_cosine", "cosine between clients' τ$_k$\nmean over rounds", (-1.0, 1.0)),
)
COLOURED = "colour: mask; line: local steps J"
TICKS = (1.0, 2.0, 5.0)  # of a decade of norms
SHIFT = 0.03  # of the distance between two shardings
MAPS = 3  # heat maps side by side
CELL = (0.75, 0.42)  # inches of a heat map's cell


def possible_figures(output: Path) -> list[Path]:
    """Every file that `plot_set`, or a figure of a single run, may write for `output`."""
    names = (output.name, *(f"{output.name}-{suffix}" for suffix in ("heat-map", "drift", *SWEPT)))
    return [output.with_name(name + ending) for name in names for ending in (".png", ".pdf")]


def plot_set(members: Sequence[Member], output: Path) -> list[Path]:
    """Every figure for which the members differ in the right settings; OUTPUT.png and .pdf, OUTPUT-heat-map.png, ...

    Raises:
        CheckpointError: a figure cannot be written.
    """
    paths = plot_bands(members, output)
    for suffix, draw in (("heat-map", plot_heat_map), ("drift", plot_drift)):
        paths += draw(members, output.with_name(f"{output.name}-{suffix}"))
    for key in SWEPT:
        paths += plot_sweep(members, key, output.with_name(f"{output.name}-{key}"))
    return paths


def plot_heat_map(members: Sequence[Member], output: Path) -> list[Path]:
    """Mean test accuracy for sharding x local steps, a panel per mask; nothing unless both differ.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    if _collide(_trained(members)):
        return []
    members = [each for each in _trained(members) if each.over_runs(last_test_accuracy).n]
    shardings, steps, masks = _axes_of(members)
    if len(shardings) < 2 or len(steps) < 2:
        return []
    cells = {(mask_words(each.settings), sharding_words(each.settings), _steps(each)): each for each in members}
    means = {place: member.over_runs(last_test_accuracy) for place, member in cells.items()}
    columns = min(len(masks), MAPS)
    lines = ceil(len(masks) / columns)
    size = (1.2 + (0.5 + CELL[0] * len(steps)) * columns, (0.75 + CELL[1] * len(shardings)) * lines + 0.2)
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        shown = {mean.mean for mean in means.values()}
        for axes, mask in zip(grid.flat, masks, strict=False):
            own = {(sharding, each): point for (rule, sharding, each), point in means.items() if rule == mask}
            image = _draw_map(axes, own, shardings, steps, (min(shown), max(shown)))
            axes.set_title(mask, fontsize=9)
        for axes in grid.flat[len(masks) :]:
            axes.set_axis_off()
        figure.suptitle(seeds_note((point.n for point in means.values()), "cells"), fontsize=8)
        figure.colorbar(image, ax=list(grid.flat), label="test accuracy (%)")
        return save_figure(figure, output)


def _draw_map(
    axes: Axes,
    points: Mapping[tuple[str, float], Summary],
    shardings: Sequence[str],
    steps: Sequence[float],
    limits: tuple[float, float],
) -> AxesImage:
    table = np.full((len(shardings), len(steps)), np.nan)
    for row, sharding in enumerate(shardings):
        for column, local_steps in enumerate(steps):
            point = points.get((sharding, local_steps))
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
    return image


def plot_drift(members: Sequence[Member], output: Path) -> list[Path]:
    """‖τ_k‖ and the pairwise cosine of task vectors, means over all rounds, against sharding; a line per mask and J.

    The colour is that of the mask, or of J where all masks are equal. Nothing unless shardings differ and cosines were
    logged.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    if _collide(_trained(members)):
        return []
    members = [each for each in _trained(members) if each.over_runs(mean_of("client_cosine")).n]
    shardings, steps, masks = _axes_of(members)
    if len(shardings) < 2:
        return []
    lines: dict[tuple[str, float], dict[str, Member]] = {}
    for member in members:
        lines.setdefault((mask_words(member.settings), _steps(member)), {})[sharding_words(member.settings)] = member
    keys = sorted(lines, key=lambda key: (steps.index(key[1]), masks.index(key[0])))
    labels = [mask + (f", J = {local_steps:g}" if len(steps) > 1 else "") for mask, local_steps in keys]
    features = ([f"J = {local_steps:g}" for _, local_steps in keys], [mask for mask, _ in keys])
    rows = spread(len(keys), features, _first_of_all_weights(keys))
    width = 7.2
    note = seeds_note((len(member.runs) for member in members), "bars")
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, parts, panels = open_rows(
            [[labels[place] for place in row.places] for row in rows], 2, width, 2.6, note
        )
        for row, part, axes in zip(rows, parts, panels, strict=True):
            part.suptitle(row.title, fontsize=9)
            looks = _looks([keys[place] for place in row.places])
            for place, look in zip(row.places, looks, strict=True):
                shift = SHIFT * (row.places.index(place) - (len(row.places) - 1) / 2)
                _draw_drift(axes, lines[keys[place]], shardings, shift, {**look, "label": labels[place]})
            legend_below(part, axes[0], width, title="colour: local steps J" if len(masks) == 1 else COLOURED)
        for column in range(2):
            match((axes[column] for axes in panels), "x", "y")
        return save_figure(figure, output)


def _first_of_all_weights(keys: Sequence[tuple[str, float]]) -> int:
    return next((place for place, (mask, _) in enumerate(keys) if mask == "all weights"), 0)


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
    panels: Sequence[Axes], line: Mapping[str, Member], shardings: Sequence[str], shift: float, look: Mapping[str, Any]
) -> None:
    """One line of both panels, `shift` to the right so that bars of several do not hide one another."""
    for axes, (column, name, limits) in zip(panels, DRIFT, strict=True):
        found = {
            place: line[sharding].over_runs(mean_of(column))
            for place, sharding in enumerate(shardings)
            if sharding in line
        }
        points = {place: point for place, point in found.items() if point.n}
        if points:
            draw_bars(axes, [place + shift for place in points], list(points.values()), limits, **look)
        axes.set_xticks(range(len(shardings)), shardings)
        axes.set_xlabel("division of the data")
        axes.set_ylabel(name)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=TICKS))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())


def plot_sweep(members: Sequence[Member], key: str, output: Path) -> list[Path]:
    """Final test accuracy against a numeric setting, a line per sharding; nothing unless it differs under one rule.

    Raises:
        CheckpointError: the figure cannot be written.
    """
    lines: dict[str, dict[float, Member]] = {}
    drawn = [each for each in _trained(members) if each.over_runs(last_test_accuracy).n
             and each.settings["mask-rule"] == "least-sensitive" and _usual(each, members, key)]  # fmt: skip
    for member in drawn:
        lines.setdefault(sharding_words(member.settings), {})[float(member.settings[key])] = member
    if sum(map(len, lines.values())) < len(drawn):  # they differ in something else too, and would hide one another
        return []
    if max((len(line) for line in lines.values()), default=0) < 2:
        return []
    shardings, width = list(lines), 4.4
    ticks = sorted({value for line in lines.values() for value in line})
    note = seeds_note((len(member.runs) for member in drawn), "bars")
    rows = spread(len(shardings), reference=0)
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, parts, panels = open_rows(
            [[shardings[place] for place in row.places] for row in rows], 1, width, 2.8, note
        )
        for row, part, (axes,) in zip(rows, parts, panels, strict=True):
            for turn, place in enumerate(row.places):
                line = lines[shardings[place]]
                points = [line[value].over_runs(last_test_accuracy) for value in sorted(line)]
                draw_bars(axes, sorted(line), points, (0.0, 100.0), label=shardings[place], **line_look(turn))
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel(SWEPT[key])
            axes.set_ylabel("test accuracy (%)")
            legend_below(part, axes, width)
        match((axes for (axes,) in panels), "x", "y")
        return save_figure(figure, output)


def _usual(member: Member, members: Sequence[Member], key: str) -> bool:
    """Whether `member` has the most common values of the other swept settings."""
    for other in SWEPT:
        values = [each.settings[other] for each in members if each.settings["mask-rule"] == "least-sensitive"]
        if other != key and member.settings[other] != max(values, key=values.count):
            return False
    return True


def _axes_of(members: Sequence[Member]) -> tuple[list[str], list[float], list[str]]:
    """Shardings (from few classes per client to iid), local steps and masks of members."""

    def evenness(member: Member) -> tuple[int, float]:
        kind = str(member.settings["sharding"])
        by = {"classes": "classes-per-client", "dirichlet": "dirichlet-alpha"}
        return (2, 0.0) if kind == "iid" else (int(kind == "classes"), float(member.settings[by[kind]]))

    ordered = sorted(members, key=evenness)
    shardings = list(dict.fromkeys(sharding_words(each.settings) for each in ordered))
    masks = list(dict.fromkeys(mask_words(each.settings) for each in members))
    return shardings, sorted(set(map(_steps, members))), masks


def _trained(members: Sequence[Member]) -> list[Member]:
    """Those whose clients trained."""
    return [each for each in members if each.settings["strategy"] != "centralized" and not is_idle(each.settings)]


def _steps(member: Member) -> float:
    return mean_local_steps(member.settings)


def _collide(members: Sequence[Member]) -> bool:
    """Whether two members differ in something that these figures have no place for, and would hide one another."""
    places = [(mask_words(each.settings), sharding_words(each.settings), _steps(each)) for each in members]
    return len(set(places)) < len(places)
