"""The style of all figures (colour-blind safe, readable in print, PNG and PDF), and the curves of single runs."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, cast

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.figures.panels import Row, legend_below, match, open_rows, spread
from fl_taskarith.figures.run_groups import RunRecord
from fl_taskarith.storage.files import write_atomically

# Okabe & Ito (2008): told apart by every common form of colour blindness; line styles tell them apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FEW_POINTS = 15  # up to here each point is marked, for the line between says nothing
MARKS = 8  # of a longer line, about
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE = {"color": "#000000", "linestyle": "-", "marker": "X"}  # of the line that is repeated in every panel
TITLE_CHARACTERS = 100  # of a line
HIDING = 5.0  # times the range of the others: so far below them a value would hide what tells them apart
VISIBLE = 1.0  # points, of accuracy: a range that small is shown with whatever lies within HIDING of it
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, so that text in the PDF stays text
}


def line_look(turn: int) -> dict[str, str]:
    """Return colour, line and marker of line number `turn` of a panel; none of them that of `REFERENCE`."""
    colour = turn % (len(COLOURS) - 1)
    return {"color": COLOURS[colour], "linestyle": STYLES[turn % len(STYLES)], "marker": MARKERS[colour]}


def draw_rows(
    rows: Sequence[Row], labels: Sequence[str], draw: Callable[[Row, Sequence[Axes]], None],
    size: tuple[int, float, float], note: str, always: Sequence[str] = (), **legend: Any,
) -> Figure:  # fmt: skip
    """Draw rows of panels with equal axes per column, a title and a legend per row.

    Args:
        labels: of all lines, to leave room for the legends; always: of those that every row has beside its own.
        draw: draws one row into its panels.
        size: panels in a row, and the width and height of one in inches.
        note: stands above all rows.
        legend: further options of the legends.
    """
    columns, width, height = size
    with pyplot.rc_context(cast(Any, STYLE)):
        names = [[*(labels[place] for place in row.places), *always] for row in rows]
        figure, parts, panels = open_rows(names, columns, columns * width, height, note)
        for row, part, axes in zip(rows, parts, panels, strict=True):
            if row.title:
                part.suptitle(row.title, fontsize=9)
            draw(row, axes)
            legend_below(part, axes[0], columns * width, **legend)
        for column in range(columns):
            match((axes[column] for axes in panels), "x", "y")
    return figure


def course_figure(run: RunRecord) -> Figure:
    """Draw accuracy and losses of a run, or on regression data distances to the truth, against rounds."""
    return distances([run]) if run.settings["dataset"] == REGRESSION else curves(run)


def curves(run: RunRecord) -> Figure:
    """Draw test accuracy and the losses of one run against rounds.

    Round 0 is the head on the frozen backbone, before any training: a dotted line marks its accuracy. Where clients
    minimise another loss than the cross-entropy, it has a panel of its own.
    """
    epochs = all(row.get("clients") in (None, 0) for row in run.rows)
    number = 2 if run.training_loss == "cross-entropy" else 3
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, panels = pyplot.subplots(1, number, figsize=(3.6 * number, 3.0), layout="constrained")
        accuracy, loss = panels[:2]
        _draw(accuracy, run, "test_accuracy", "test", {"color": COLOURS[0], "linestyle": "-"}, 100)
        if run.rows and run.rows[0]["round"] == 0 and run.rows[0]["test_accuracy"] is not None:
            before = 100 * run.rows[0]["test_accuracy"]
            accuracy.axhline(before, color=COLOURS[0], linewidth=0.8, linestyle=":", label="before training")
        training = "training" if epochs else "training (mean of clients)"
        _draw(panels[-1], run, "train_loss", training, {"color": COLOURS[1], "linestyle": "--"})
        _draw(loss, run, "val_loss", "validation", {"color": COLOURS[2], "linestyle": "-."})
        _draw(loss, run, "test_loss", "test", {"color": COLOURS[0], "linestyle": "-"})
        names = ("test accuracy (%)", "cross-entropy (nats)", f"{run.training_loss} loss")
        for axes, name in zip(panels, names, strict=False):
            axes.set_ylabel(name)
            axes.set_xlabel("epoch" if epochs else "communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=1.0)
        figure.suptitle(fill(run.title, TITLE_CHARACTERS), fontsize=9)
    return figure


def distances(runs: Sequence[RunRecord]) -> Figure:
    """Draw, for runs on regression data, distances to the true parameters, and clients in their cluster."""
    labels = [run.title for run in runs]
    alone = len(runs) == 1

    def draw(row: Row, panels: Sequence[Axes]) -> None:
        distance, accuracy = panels
        for turn, place in enumerate(row.places):
            if alone:
                look = {"color": COLOURS[1], "linestyle": "--", "marker": "s"}
                _draw(distance, runs[0], "largest_distance", "largest, matched", look)
                look = {"color": COLOURS[2], "linestyle": ":", "marker": "^"}
                _draw(distance, runs[0], "nearest_distance", "mean, to the nearest", look)
            label = "mean, matched" if alone else labels[place]
            _draw(distance, runs[place], "matched_distance", label, line_look(turn))
            _draw(accuracy, runs[place], "cluster_accuracy", label, line_look(turn), 100)
        distance.set_yscale("log")
        distance.set_ylabel("distance to the true parameters")
        accuracy.set_ylabel("honest clients in their cluster (%)")
        for axes in panels:
            axes.set_xlabel("communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return draw_rows(spread(len(runs), reference=0), labels, draw, (2, 3.6, 2.7), labels[0] if alone else "")


def off_scale(accuracies: Sequence[float]) -> set[int]:
    """Return which of `accuracies` (%) lie so far below the rest that an axis with them would hide how the rest differ.

    At most a quarter of them; figures name them with their number at the edge instead.
    """
    order = sorted(range(len(accuracies)), key=accuracies.__getitem__)
    below = [accuracies[order[-1]] - accuracies[place] for place in order]
    for cut in range(len(order) // 4, 0, -1):
        if below[cut - 1] > HIDING * max(below[cut], VISIBLE):
            return set(order[:cut])
    return set()


def mark_every(points: int) -> int:
    """Return every how many points of a line one is marked."""
    return 1 if points <= FEW_POINTS else points // MARKS


def _draw(axes: Axes, run: RunRecord, column: str, label: str, look: Mapping[str, Any], scale: float = 1.0) -> None:
    points = [(row["round"], scale * row[column]) for row in run.rows if row[column] is not None]
    if points:
        shown = {"marker": "o", "markersize": 3, "linewidth": 1.4, "markevery": mark_every(len(points)), **look}
        axes.plot(*zip(*points, strict=True), label=label, **shown)


def _is_maths(words: str) -> bool:
    """Whether matplotlib can set what stands between dollar signs as mathematics, line by line as it draws them.

    An arm may have any name.
    """
    try:
        return all("$" not in line or MathTextParser("path").parse(line) is not None for line in words.split("\n"))
    except ValueError:
        return False


def save_figure(figure: Figure, output: Path) -> list[Path]:
    """Write output.png and output.pdf and close the figure; equal figures give equal bytes.

    Raises:
        CheckpointError: a file cannot be written.
    """
    paths = []
    for text in figure.findobj(Text):
        text.set_parse_math(_is_maths(text.get_text()))
    try:
        for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
            content = io.BytesIO()
            with pyplot.rc_context(cast(Any, STYLE)):  # ticks are made, and fonts chosen, when a figure is saved
                figure.savefig(content, format=suffix[1:], dpi=200, metadata=metadata)
            paths.append(output.with_name(output.name + suffix))
            write_atomically(paths[-1], content.getvalue())
    finally:
        pyplot.close(figure)
    return paths
