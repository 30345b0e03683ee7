"""Curves of a set of runs against rounds or local steps, and against bytes: means with bands over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fl_taskarith.figures.panels import Row, legend_below, match, numbered, open_rows, pages, runs_note, spread
from fl_taskarith.figures.plots import REFERENCE, STYLE, line_look, mark_every, off_scale, save_figure
from fl_taskarith.figures.run_groups import Member
from fl_taskarith.figures.setting_words import Settings, mask_words, mean_local_steps, sharding_words
from fl_taskarith.figures.statistics import Summary

PERCENT = (0.0, 100.0)
POSITIVE = (0.0, inf)
TICKS = (1.0, 3.0)  # of a decade of bytes
WIDTH, HEIGHT = 3.0, 2.3  # inches of a panel


def plot_bands(members: Sequence[Member], output: Path, reference: str = "") -> list[Path]:
    """Draw test accuracy and loss against rounds, accuracy against bytes if any were sent: means, and bands of one sd.

    Local steps take the place of rounds where members differ in J. Centralised runs, whose rounds are epochs, have
    panels of their own. Runs at a learning rate of 0 are levels, and no curves. Of many members a row of panels shows
    six at most, and what does not fit a page stands in OUTPUT-2, ...; all have the same axes.

    Args:
        output: path without ending.
        reference: the label of the member that every row shows, if it is there; without a label the first one of all
            weights, else the first.

    Returns:
        The files; none where nothing was trained.

    Raises:
        CheckpointError: a figure cannot be written.
    """
    if all(is_idle(member.settings) for member in members):
        return []
    lines = _lines(members)
    rows = [row for epochs in (False, True) for row in _rows(members, epochs, reference)]
    columns = 3 if any(line.sent for line in lines) else 2
    note = runs_note(members, "bands")
    figures: list[Figure] = []
    drawn: list[_Drawn] = []
    with pyplot.rc_context(cast(Any, STYLE)):
        for page in pages(rows):
            labels = [[lines[place].label for place in row.places] for row in page]
            figure, parts, panels = open_rows(labels, columns, WIDTH * columns, HEIGHT, note)
            figures.append(figure)
            drawn += zip(page, parts, panels, strict=True)
        _draw(drawn, lines, lost=False)
        for row, part, panels_of_row in drawn:
            part.suptitle(row.title, fontsize=9)
            _name_axes(panels_of_row, lines[row.places[0]].x)
        _match(drawn, lines)
        _draw(drawn, lines, lost=True)
        for _, part, panels_of_row in drawn:
            legend_below(part, panels_of_row[0], WIDTH * columns)
        names = [output, *(output.with_name(f"{output.name}-{number}") for number in range(2, len(figures) + 1))]
        return [path for name, figure in zip(names, figures, strict=True) for path in save_figure(figure, name)]


def is_idle(settings: Settings) -> bool:
    """Return whether nothing is trained: a learning rate of 0."""
    return settings["learning-rate"] == 0.0


def _is_centralized(member: Member) -> bool:
    return member.settings["strategy"] == "centralized"


def _rows(members: Sequence[Member], epochs: bool, reference: str) -> list[Row]:
    """Spread over rows the members whose rounds are epochs, or the others: they share no axis."""
    places = [place for place, member in enumerate(members) if _is_centralized(member) is epochs]
    settings = [members[place].settings for place in places]
    if reference:
        repeated = next((turn for turn, place in enumerate(places) if members[place].label == reference), None)
    else:
        repeated = next((turn for turn, each in enumerate(settings) if each["mask-rule"] == "none"), 0)
    words = (sharding_words, mask_words, lambda each: f"J = {mean_local_steps(each):g}", lambda each: each["strategy"])
    rows = spread(len(places), [[str(say(each)) for each in settings] for say in words], repeated)
    return [
        Row(row.title, tuple(places[turn] for turn in row.places),
            None if row.reference is None else places[row.reference])
        for row in rows
    ]  # fmt: skip


@dataclass(frozen=True)
class _Line:
    """A member as it is drawn.

    sent: 10⁶ bytes until the end of each round; empty if none were. x: the name of the axis, and `unit` what a round
    takes of it. lost: whether it ends off the scale.
    """

    member: Member
    label: str
    sent: Mapping[int, float]
    x: str
    unit: float
    lost: bool


_Drawn = tuple[Row, SubFigure, list[Axes]]


def _lines(members: Sequence[Member]) -> list[_Line]:
    labels = numbered([member.label for member in members], [len(member.runs) for member in members])
    ends = {place: end.mean for place, member in enumerate(members) if (end := member.last_percent()).n}
    lost = {list(ends)[place] for place in off_scale(list(ends.values()))}
    trained = [member for member in members if not _is_centralized(member) and not is_idle(member.settings)]
    work = {mean_local_steps(member.settings) for member in trained}
    lines = []
    for place, (member, label) in enumerate(zip(members, labels, strict=True)):
        x, unit = "round", 1.0
        if _is_centralized(member):
            x = "epoch"
        elif len(work) > 1:
            x, unit = "local steps so far (rounds × J)", mean_local_steps(member.settings)
        if place in lost:
            label += f" (ends at {ends[place]:.1f} %, off the scale)"
        lines.append(_Line(member, label, sent_megabytes(member), x, unit, place in lost))
    return lines


def _draw(drawn: Sequence[_Drawn], lines: Sequence[_Line], *, lost: bool) -> None:
    """Draw the lines that are, or are not, off the scale."""
    for row, _, panels in drawn:
        others = [place for place in row.places if place != row.reference]
        for place in row.places:
            if lines[place].lost is lost:
                look = REFERENCE if place == row.reference else line_look(others.index(place))
                _draw_line(lines[place], panels, look)


def _draw_line(line: _Line, panels: Sequence[Axes], look: Mapping[str, Any]) -> None:
    accuracy, loss = line.member.curve("test_accuracy", 100.0), line.member.curve("test_loss")
    if is_idle(line.member.settings):
        for axes, points in zip(panels, (accuracy, loss), strict=False):
            if points:
                level = list(points.values())[-1].mean
                axes.axhline(level, color=look["color"], linestyle=look["linestyle"], label=line.label)
        return
    draw_band(panels[0], {line.unit * number: point for number, point in accuracy.items()}, look, line.label, PERCENT)
    draw_band(panels[1], {line.unit * number: point for number, point in loss.items()}, look, line.label, POSITIVE)
    for axes in panels[2:]:
        sent = {number: point for number, point in accuracy.items() if line.sent.get(number, 0.0) > 0}
        draw_band(axes, {line.sent[number]: point for number, point in sent.items()}, look, "", PERCENT)


def draw_band(
    axes: Axes, points: Mapping[float, Summary], look: Mapping[str, Any], label: str, limits: tuple[float, float]
) -> None:
    """Draw means with a band of one sd that ends where no value can be; no band where n = 1."""
    if not points:
        return
    means = [point.mean for point in points.values()]
    every = mark_every(len(points))
    axes.plot(list(points), means, label=label, markevery=every, markersize=3.5, linewidth=1.3, **cast(Any, look))
    if all(point.n > 1 for point in points.values()):
        low, high = np.array([point.band(*limits) for point in points.values()]).T
        axes.fill_between(list(points), low, high, color=look["color"], alpha=0.15, linewidth=0)


def _name_axes(panels: Sequence[Axes], x: str) -> None:
    for axes, name in zip(panels, ("test accuracy (%)", "test cross-entropy (nats)"), strict=False):
        axes.set_xlabel(x)
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[2:]:
        if not axes.has_data():  # nothing was sent
            axes.set_axis_off()
            continue
        axes.set_xlabel("sent so far, both ways (MB)")
        axes.set_ylabel("test accuracy (%)")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _match(drawn: Sequence[_Drawn], lines: Sequence[_Line]) -> None:
    """Give all rows equal axes; accuracies have one axis in both panels of a row."""
    match((axes for _, _, panels in drawn for axes in (panels[0], *panels[2:])), "y")
    match((panels[1] for _, _, panels in drawn), "y")
    for x in dict.fromkeys(line.x for line in lines):
        alike = [panels for row, _, panels in drawn if lines[row.places[0]].x == x]
        match((axes for panels in alike for axes in panels[:2]), "x")
        match((axes for panels in alike for axes in panels[2:]), "x")


def sent_megabytes(member: Member) -> dict[int, float]:
    """Return 10⁶ bytes sent and received until the end of each round, mean over runs; empty if nothing was sent."""
    means = {number: point.mean for number, point in member.curve("sent_megabytes").items()}
    return means if max(means.values(), default=0.0) > 0 and not is_idle(member.settings) else {}
