"""Figures from results folders: colour-blind safe, readable in print, PNG and PDF. Plots read CSVs and never train."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fl_taskarith.files import write_atomically
from fl_taskarith.logbook import Row, read_rounds
from fl_taskarith.study.run_set import in_words

# Okabe & Ito (2008): told apart by every common form of colour blindness; line styles tell them apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FEW_POINTS = 15  # up to here each point is marked, for the line between says nothing
STYLES = ("-", "--", "-.", ":")
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


def plot_curves(folder: Path, output: Path) -> list[Path]:
    """Test accuracy and the losses of one run against rounds; writes output.png and output.pdf.

    Round 0 is the head on the frozen backbone, before any training: a dotted line marks its accuracy.

    Raises:
        CheckpointError: the folder holds no readable rounds.csv, or the output cannot be written.
    """
    rows, title = read_rounds(folder), in_words(folder) or folder.resolve().name
    epochs = all(row.get("clients") in (None, 0) for row in rows)
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, (accuracy, loss) = pyplot.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        _draw(accuracy, rows, "test_accuracy", COLOURS[0], "-", "test", scale=100)
        if rows and rows[0]["round"] == 0 and rows[0]["test_accuracy"] is not None:
            before = 100 * rows[0]["test_accuracy"]
            accuracy.axhline(before, color=COLOURS[0], linewidth=0.8, linestyle=":", label="before training")
        _draw(loss, rows, "train_loss", COLOURS[1], "--", "training" if epochs else "training (mean of clients)")
        _draw(loss, rows, "val_loss", COLOURS[2], "-.", "validation")
        _draw(loss, rows, "test_loss", COLOURS[0], "-", "test")
        accuracy.set_ylabel("test accuracy (%)")
        loss.set_ylabel("cross-entropy (nats)")
        for axes in (accuracy, loss):
            axes.set_xlabel("epoch" if epochs else "communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize=8)
        figure.suptitle(title, fontsize=9)
        return save_figure(figure, output)


def plot_distances(folders: Sequence[Path], output: Path) -> list[Path]:
    """For runs on regression data: distances to the true parameters, and clients in their cluster."""
    tables = [read_rounds(folder) for folder in folders]
    labels = [in_words(folder) or folder.resolve().name for folder in folders]
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, (distance, accuracy) = pyplot.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for index, (label, rows) in enumerate(zip(labels, tables, strict=True)):
            colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
            if len(tables) == 1:
                _draw(distance, rows, "largest_distance", COLOURS[1], "--", "largest, matched")
                _draw(distance, rows, "nearest_distance", COLOURS[2], ":", "mean, to the nearest")
            _draw(distance, rows, "matched_distance", colour, style, "mean, matched" if len(tables) == 1 else label)
            _draw(accuracy, rows, "cluster_accuracy", colour, style, label, scale=100)
        distance.set_yscale("log")
        distance.set_ylabel("distance to the true parameters")
        accuracy.set_ylabel("honest clients in their cluster (%)")
        for axes in (distance, accuracy):
            axes.set_xlabel("communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        distance.legend(fontsize=8)
        if len(tables) == 1:
            figure.suptitle(labels[0], fontsize=9)
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


def _draw(
    axes: Axes, rows: Sequence[Row], column: str, colour: str, style: str, label: str, scale: float = 1.0
) -> None:
    points = [(row["round"], scale * row[column]) for row in rows if row[column] is not None]
    if points:
        marker = "o" if len(points) <= FEW_POINTS else ""
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=style,
            marker=marker,
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
