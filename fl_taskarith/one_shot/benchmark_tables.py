"""Tables of a one-shot benchmark: README.md to read, runs.csv and table.csv to compute with, and figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes

from fl_taskarith.figures.markdown import (
    BLANK,
    markdown_table,
    mean_with_interval,
    mean_with_sd,
    number,
    render_markdown,
)
from fl_taskarith.figures.panels import MOST, Row, draw_bars, match, seeds_note, spread
from fl_taskarith.figures.plots import draw_rows, line_look, save_figure
from fl_taskarith.merging.merge_rules import find_rule
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.cell_results import OneShotResults, Place, ends
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.record_files import read_words

LEVELS = (("own_test_accuracy", "own models", "-."), ("pretrained_test_accuracy", "θ₀", ":"))
"""What every panel shows beside the methods: a column of the records, in words, and its line."""
SHIFT = 0.05  # of a level's width between two methods' points, so that none hides another
OF_THIS_MACHINE = ("data-dir", "learning-rate")  # of the settings: this machine's, and what has its own sentence


def write_tables(one_shot: OneShot, folder: Path) -> None:
    """Write README.md, runs.csv, table.csv and the figures from the cells that are done.

    The text of a file FINDINGS.md in the folder stands at the head of the README, so that hand-written words survive.

    Raises:
        CheckpointError: a file cannot be written.
    """
    make_folder(folder)
    results = OneShotResults(one_shot, folder)
    findings = folder / "FINDINGS.md"
    records = [record for cells in results.records.values() for record in cells.values()]
    text = render_markdown(
        Path(__file__).with_name("README.md.j2"),
        one_shot=one_shot,
        findings=read_words(findings),
        tables={
            "Test accuracy": accuracy_table(results),
            f"Difference to {one_shot.reference}": difference_table(results),
            "Where the loss comes from": attribution_table(results),
            "What was chosen on validation": chosen_table(results),
            "The cells": cell_table(results),
        },
        figures=[path.stem for path in plot_sources(results, folder) if path.suffix == ".png"],
        left=len(one_shot.cells) - len(records),
        settings={key: value for key, value in one_shot.settings.items() if key not in OF_THIS_MACHINE},
        rates=sorted({record["learning_rate"] for record in records}),
        processors=sorted({record["environment"]["machine"]["processor"] for record in records}),
        minutes=sum(record["seconds"] for record in records) / 60,
    )
    write_atomically(folder / "README.md", text)
    write_atomically(folder / "runs.csv", csv_text(results.runs()))
    write_atomically(folder / "table.csv", csv_text(results.table()))


def place_name(place: Place) -> str:
    """Return for example "data high, training low"."""
    return f"data {place[0]}, training {place[1]}"


def _at_corners(results: OneShotResults, cell: Callable[[Place, str], str]) -> list[tuple[str, ...]]:
    """Return a row per method with one cell per corner."""
    return [(method, *(cell(place, method) for place in results.corners)) for method in results.one_shot.methods]


def accuracy_table(results: OneShotResults) -> str:
    """Show methods × corners: the mean over tasks of test accuracy in percent, and normalised."""

    def cell(place: Place, method: str) -> str:
        normalised = results.summary(place, method, "test_normalised")
        return f"{mean_with_sd(results.summary(place, method))} ({number(normalised.mean)})"

    rows = _at_corners(results, cell)
    for name, label in (("own_test_accuracy", "each task's own model"), ("pretrained_test_accuracy", "θ₀, not merged")):
        rows.append((label, *(mean_with_sd(results.fact(place, name, 100)) for place in results.corners)))
    return markdown_table(("merged by", *map(place_name, results.corners)), rows)


def difference_table(results: OneShotResults) -> str:
    """Show methods × corners: paired differences in points, with 95 % intervals."""
    rows = _at_corners(results, lambda place, method: mean_with_interval(results.difference(place, method)))
    others = [row for row in rows if row[0] != results.one_shot.reference]
    return markdown_table(("merged by", *map(place_name, results.corners)), others)


def attribution_table(results: OneShotResults) -> str:
    """Show methods × sources: the change in points against both heterogeneities lowest."""
    losses = {method: results.attribution(method) for method in results.one_shot.methods}
    rows = [(method, *map(mean_with_interval, loss.values())) for method, loss in losses.items()]
    return markdown_table(("merged by", *losses[results.one_shot.reference]), rows)


def chosen_table(results: OneShotResults) -> str:
    """Show methods × corners: λ, and the rule's own parameter, median over seeds; * where λ is at an end."""

    def cell(place: Place, method: str) -> str:
        rule, edge = find_rule(method), any(results.chosen(place, method, "edge"))
        scales, values = (results.chosen(place, method, name) for name in ("scale", "value"))
        words = [f"λ {median(scales):.3g}{'*' * edge}"] if scales and rule.scaled else []
        words += [f"{rule.parameter} {median(values):.3g}"] if values and rule.parameter else []
        return ", ".join(words) or BLANK

    return markdown_table(("merged by", *map(place_name, results.corners)), _at_corners(results, cell))


def cell_table(results: OneShotResults) -> str:
    """Show one row per cell: accuracies without merging, and how far the task vectors agree."""
    rows = []
    for place in results.records:
        cosine = results.fact(place, "mean_cosine")
        accuracies = (results.fact(place, name, 100) for name in ("pretrained_test_accuracy", "own_test_accuracy"))
        rows.append((place_name(place), str(cosine.n), *map(mean_with_sd, accuracies), number(cosine.mean, 3)))
    header = ("cell", "n", "θ₀ test %", "own models, test %", "mean cosine of two task vectors")
    return markdown_table(header, rows)


def plot_sources(results: OneShotResults, folder: Path) -> list[Path]:
    """Draw against-data and against-training, PNG and PDF: a panel with the other heterogeneity lowest, one highest.

    Nothing is drawn, and no path returned, for a source with one level or while no cell is done.
    """
    data, training = results.one_shot.data, results.one_shot.training
    paths: list[Path] = []
    if not any(results.records.values()):
        return paths
    if len(data) > 1:
        panels = {f"training heterogeneity: {held}": [(level, held) for level in data] for held in ends(training)}
        paths += _plot(results, panels, list(data), "data heterogeneity", folder / "against-data")
    if len(training) > 1:
        panels = {f"data heterogeneity: {held}": [(held, level) for level in training] for held in ends(data)}
        paths += _plot(results, panels, list(training), "training heterogeneity", folder / "against-training")
    return paths


def _plot(
    results: OneShotResults, panels: dict[str, list[Place]], levels: Sequence[str], label: str, output: Path
) -> list[Path]:
    methods = list(results.one_shot.methods)
    counts = [results.summary(place, method).n for places in panels.values() for place in places for method in methods]

    def draw(row: Row, axes_of_row: Sequence[Axes]) -> None:
        for axes, (title, places) in zip(axes_of_row, panels.items(), strict=True):
            _draw(axes, results, places, [methods[place] for place in row.places])
            axes.set_xticks(range(len(levels)), levels)
            axes.set_xlabel(label)
            axes.set_title(title, fontsize=9)
        axes_of_row[0].set_ylabel("mean test accuracy\nover tasks (%)")

    rows, always = spread(len(methods), most=MOST - len(LEVELS)), [name for _, name, _ in LEVELS]
    note = seeds_note((count for count in counts if count), "bars")
    figure = draw_rows(rows, methods, draw, (len(panels), 3.6, 2.9), note, always)
    match((axes for part in figure.subfigs for axes in part.axes), "x", "y")
    return save_figure(figure, output)


def _draw(axes: Axes, results: OneShotResults, places: Sequence[Place], methods: Sequence[str]) -> None:
    for index, method in enumerate(methods):
        summaries = {at: results.summary(place, method) for at, place in enumerate(places)}
        done = {at: summary for at, summary in summaries.items() if summary.n}
        shift = SHIFT * (index - (len(methods) - 1) / 2)
        if done:
            look = {**line_look(index), "label": method}
            draw_bars(axes, [at + shift for at in done], list(done.values()), (0.0, 100.0), **look)
    for name, label, style in LEVELS:
        means = [results.fact(place, name, 100).mean for place in places]
        axes.plot(range(len(places)), means, color="grey", linestyle=style, marker="|", linewidth=1.1, label=label)
