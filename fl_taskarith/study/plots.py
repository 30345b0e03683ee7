"""Figures from results folders: colour-blind safe, readable in print, PNG and PDF. Plots read CSVs and never train."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fl_taskarith.config import REGRESSION, from_mapping
from fl_taskarith.config_rule import Scalar
from fl_taskarith.errors import ConfigError
from fl_taskarith.files import write_atomically
from fl_taskarith.logbook import Row, read_rounds

Settings = dict[str, Scalar]

# Okabe & Ito (2008): told apart by every common form of colour blindness; line styles tell them apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHARDING_WORDS = {"iid": "iid", "classes": "Nc = {classes-per-client}", "dirichlet": "Dir({dirichlet-alpha})"}
FEW_POINTS = 15  # up to here each point is marked, for the line between says nothing
STYLES = ("-", "--", "-.", ":")
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, so that text in the PDF stays text
}


def plot_curves(folders: Sequence[Path], output: Path) -> list[Path]:
    """Test accuracy and losses against rounds for one or more run folders; writes output.png and output.pdf.

    Round 0 is the head on the frozen backbone, before any training: a dotted line marks its accuracy.

    Raises:
        CheckpointError: a folder holds no readable rounds.csv, or the output cannot be written.
    """
    configs = [_settings(folder) for folder in folders]
    if all(config.get("dataset") == REGRESSION for config in configs):
        return plot_distances(folders, output)
    tables = [(label, read_rounds(folder)) for label, folder in zip(_labels(folders, configs), folders, strict=True)]
    epochs = [config.get("strategy") == "centralized" for config in configs]
    with pyplot.rc_context(cast(Any, STYLE)):
        figure, (accuracy, loss) = pyplot.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for index, (label, rows) in enumerate(tables):
            colour = COLOURS[index % len(COLOURS)]
            style = STYLES[index % len(STYLES)] if len(tables) > 1 else "-"
            _draw(accuracy, rows, "test_accuracy", colour, style, "test" if len(tables) == 1 else label, scale=100)
            if rows and rows[0]["round"] == 0 and rows[0]["test_accuracy"] is not None:
                before = "before training" if index == 0 else None
                accuracy.axhline(
                    100 * rows[0]["test_accuracy"], color=colour, linewidth=0.8, linestyle=":", label=before
                )
            if len(tables) == 1:
                _draw(
                    loss,
                    rows,
                    "train_loss",
                    COLOURS[1],
                    "--",
                    "training" if epochs[0] else "training (mean of clients)",
                )
                _draw(loss, rows, "val_loss", COLOURS[2], "-.", "validation")
                _draw(loss, rows, "test_loss", colour, "-", "test")
            else:
                _draw(loss, rows, "test_loss", colour, style, label)
        accuracy.set_ylabel("test accuracy (%)")
        loss.set_ylabel("cross-entropy (nats)" if len(tables) == 1 else "test cross-entropy (nats)")
        for axes in (accuracy, loss):
            axes.set_xlabel("epoch" if all(epochs) else "round or epoch" if any(epochs) else "communication round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        accuracy.legend(fontsize=8)
        loss.legend(fontsize=8)
        if len(tables) == 1:
            figure.suptitle(tables[0][0], fontsize=9)
        return save_figure(figure, output)


def plot_distances(folders: Sequence[Path], output: Path) -> list[Path]:
    """The same for runs on regression data: distances to the true parameters, and clients in their cluster."""
    tables = [read_rounds(folder) for folder in folders]
    labels = _labels(folders, [_settings(folder) for folder in folders])
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


def _labels(folders: Sequence[Path], configs: Sequence[Settings]) -> list[str]:
    """What was run, in words, where that tells the runs apart; else the folders' names."""
    names = [folder.resolve().name for folder in folders]
    words = [_in_words(config) or name for config, name in zip(configs, names, strict=True)]
    return words if len(set(words)) == len(words) else names


def _in_words(config: Settings) -> str:
    """The main settings; empty for a run that was given a name, or whose run.json cannot be read."""
    if not config or config["run-name"]:
        return ""
    words = [str(config["dataset"]), str(config["strategy"])]
    if config["dataset"] == REGRESSION:
        words += [
            f"K = {config['num-clusters']}",
            f"m = {config['num-clients']}",
            f"n = {config['examples-per-client']}",
        ]
    elif config["strategy"] != "centralized":
        words += [SHARDING_WORDS[str(config["sharding"])].format(**config)]
        drawn = f"J = {config['local-steps-min']} to {config['local-steps-max']}"
        words += [drawn if config["local-steps-max"] else f"J = {config['local-steps']}"]
    return ", ".join([*words, f"seed {config['seed']}"])


def _settings(folder: Path) -> Settings:
    try:
        return from_mapping(json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]).to_run_config()
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return {}


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
