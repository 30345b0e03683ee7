"""Figures from results folders: colour-blind safe, readable in print, PNG and PDF. Plots read CSVs and never train."""

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, cast

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fl_taskarith.figures.panels import legend_below, match, open_rows, spread
from fl_taskarith.figures.run_groups import in_words, training_loss
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.run_folder import Row, read_rounds

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
    """Colour, line and marker of line number `turn` of a panel; none of them that of `REFERENCE`."""
    colours = COLOURS[:-1]
    return {
        "color": colours[turn % len(colours)],
        "linestyle": STYLES[turn % len(STYLES)],
        "marker": MARKERS[turn % len(colours)],
    }


def plot_curves(folder: Path, output: Path) -> list[Path]:
    """Test accuracy and the losses of one run against rounds; writes output.png and output.pdf.

    Round 0 is the head on the frozen backbone, before any training: a dotted line marks its accuracy. Where clients
    minimise something else than the cross-entropy, it has a panel of its own.

    Raises:
        CheckpointError: the folder holds no readable rounds.csv, or the output cannot be written.
    """
    rows, title = read_rounds(folder), in_words(folder) or folder.resolve().name
    epochs, minimised = all(row.get("clients") in (None, 0) for row in rows), training_loss(folder)
    number = 2 if minimised == "cross-entropy" else 3
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, panels = pyplot.subplots(1, number, figsize=(3.6 * number, 3.0), layout="constrained")
        accuracy, loss = panels[:2]
        _draw(accuracy, rows, "test_accuracy", COLOURS[0], "-", "test", scale=100)
        if rows and rows[0]["round"] == 0 and rows[0]["test_accuracy"] is not None:
            before = 100 * rows[0]["test_accuracy"]
            accuracy.axhline(before, color=COLOURS[0], linewidth=0.8, linestyle=":", label="before training")
        training = "training" if epochs else "training (mean of clients)"
        _draw(panels[-1], rows, "train_loss", COLOURS[1], "--", training)
        _draw(loss, rows, "val_loss", COLOURS[2], "-.", "validation")
        _draw(loss, rows, "test_loss", COLOURS[0], "-", "test")
        for axes, name in zip(panels, ("test accuracy (%)", "cross-entropy (nats)", f"{minimised} loss"), strict=False):
            axes.set_ylabel(name)
            axes.set_xlabel("epoch" if epochs else "communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, columnspacing=1.0)
        figure.suptitle(fill(title, TITLE_CHARACTERS), fontsize=9)
        return save_figure(figure, output)


def plot_distances(folders: Sequence[Path], output: Path) -> list[Path]:
    """For runs on regression data: distances to the true parameters, and clients in their cluster.

    Raises:
        CheckpointError: a folder holds no readable rounds.csv, or the output cannot be written.
    """
    tables = [read_rounds(folder) for folder in folders]
    labels = [in_words(folder) or folder.resolve().name for folder in folders]
    with pyplot.rc_context(cast(Any, STYLE)):
        rows = spread(len(tables), reference=0)
        width = 3.6 * 2
        figure, parts, panels = open_rows(
            [[labels[place] for place in row.places] for row in rows],
            2,
            width,
            2.7,
            labels[0] if len(tables) == 1 else "",
        )
        for row, part, (distance, accuracy) in zip(rows, parts, panels, strict=True):
            for turn, place in enumerate(row.places):
                look = line_look(turn)
                colour, style, marker = look["color"], look["linestyle"], look["marker"]
                if len(tables) == 1:
                    _draw(distance, tables[0], "largest_distance", COLOURS[1], "--", "largest, matched", marker="s")
                    _draw(distance, tables[0], "nearest_distance", COLOURS[2], ":", "mean, to the nearest", marker="^")
                label = "mean, matched" if len(tables) == 1 else labels[place]
                _draw(distance, tables[place], "matched_distance", colour, style, label, marker=marker)
                _draw(accuracy, tables[place], "cluster_accuracy", colour, style, label, scale=100, marker=marker)
            distance.set_yscale("log")
            distance.set_ylabel("distance to the true parameters")
            accuracy.set_ylabel("honest clients in their cluster (%)")
            for axes in (distance, accuracy):
                axes.set_xlabel("communication round")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            legend_below(part, distance, width)
        for column in range(2):
            match((axes[column] for axes in panels), "x", "y")
        return save_figure(figure, output)


def off_scale(accuracies: Sequence[float]) -> set[int]:
    """Which of `accuracies` (%) lie so far below the rest that an axis with them would hide how the rest differ.

    At most a quarter of them; figures name them with their number at the edge instead.
    """
    order = sorted(range(len(accuracies)), key=accuracies.__getitem__)
    below = [accuracies[order[-1]] - accuracies[place] for place in order]
    for cut in range(len(order) // 4, 0, -1):
        if below[cut - 1] > HIDING * max(below[cut], VISIBLE):
            return set(order[:cut])
    return set()


def mark_every(points: int) -> int:
    """Every how many points of a line one is marked."""
    return 1 if points <= FEW_POINTS else points // MARKS


def _draw(
    axes: Axes,
    rows: Sequence[Row],
    column: str,
    colour: str,
    style: str,
    label: str,
    scale: float = 1.0,
    marker: str = "o",
) -> None:
    points = [(row["round"], scale * row[column]) for row in rows if row[column] is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=style,
            marker=marker,
            markevery=mark_every(len(points)),
            markersize=3,
            linewidth=1.4,
            label=label,
        )


def save_figure(figure: Figure, output: Path) -> list[Path]:
    """Write output.png and output.pdf and close the figure; equal figures give equal bytes.

    Raises:
        CheckpointError: a file cannot be written.
    """
    paths = []
    try:
        for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
            content = io.BytesIO()
            figure.savefig(content, format=suffix[1:], dpi=200, metadata=metadata)
            paths.append(output.with_name(output.name + suffix))
            write_atomically(paths[-1], content.getvalue())
    finally:
        pyplot.close(figure)
    return paths
