"""Tables of a one-shot benchmark: README.md to read, runs.csv and table.csv to compute with, and figures."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fl_taskarith.figures.statistics import Paired, Summary
from fl_taskarith.merging.merge_rules import MERGE_RULES
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.cell_results import OneShotResults, Place
from fl_taskarith.one_shot.source_plots import plot_sources
from fl_taskarith.storage.files import make_folder, write_atomically

BLANK = "–"
HIDDEN = ("data-dir", "learning-rate")  # of the settings: this machine's, and what has a sentence of its own
CHOSEN = ("value", "scale", "edge", "val_normalised", "test_normalised", "test_accuracy")


def write_tables(one_shot: OneShot, folder: Path) -> None:
    """Write README.md, runs.csv, table.csv and the figures from the cells that are done.

    What a file FINDINGS.md in the folder says stands at the head of the README: the words are not the program's.

    Raises:
        CheckpointError: a file cannot be written.
    """
    make_folder(folder)
    results = OneShotResults(one_shot, folder)
    findings = folder / "FINDINGS.md"
    parts = [f"# {one_shot.title}"]
    parts += [findings.read_text(encoding="utf-8").strip()] if findings.exists() else []
    parts += [
        "## Test accuracy", accuracy_table(results),
        f"## Difference to {one_shot.reference}", difference_table(results),
        "## Where the loss comes from", attribution_table(results),
        "## What was chosen on validation", chosen_table(results),
        "## The cells", cell_table(results),
    ]  # fmt: skip
    parts += [f"![{path.stem}]({path.name})" for path in plot_sources(results, folder) if path.suffix == ".png"]
    parts.append(footnote(results))
    write_atomically(folder / "README.md", "\n\n".join(parts) + "\n")
    write_atomically(folder / "runs.csv", _csv(run_records(results)))
    write_atomically(folder / "table.csv", _csv(table_records(results)))


def place_name(place: Place) -> str:
    """For example "data high, training low"."""
    return f"data {place[0]}, training {place[1]}"


def accuracy_table(results: OneShotResults) -> str:
    """Methods × corners: mean over tasks of test accuracy in percent, and normalised."""
    corners, one_shot = results.corners, results.one_shot
    lines = [("merged by", *map(place_name, corners))]
    for method in one_shot.methods:
        cells = []
        for place in corners:
            normalised = results.summary(place, method, "test_normalised")
            cells.append(f"{_spread(results.summary(place, method))} ({_number(normalised.mean)})")
        lines.append((method, *cells))
    for name, label in (("own_test_accuracy", "each task's own model"), ("pretrained_test_accuracy", "θ₀, not merged")):
        lines.append((label, *(_spread(results.fact(place, name, 100)) for place in corners)))
    return _table(lines)


def difference_table(results: OneShotResults) -> str:
    """Methods × corners: paired differences in points, with 95 % intervals."""
    others = [method for method in results.one_shot.methods if method != results.one_shot.reference]
    lines = [("merged by", *map(place_name, results.corners))]
    lines += [(method, *(_interval(results.difference(place, method)) for place in results.corners))
              for method in others]  # fmt: skip
    return _table(lines)


def attribution_table(results: OneShotResults) -> str:
    """Methods × sources: change in points against both heterogeneities lowest."""
    lines: list[tuple[str, ...]] = [
        ("merged by", "data heterogeneity", "training heterogeneity", "both", "interaction")
    ]
    for method in results.one_shot.methods:
        loss = results.attribution(method)
        sources = (_interval(source) for source in (loss.data, loss.training, loss.both, loss.interaction))
        lines.append((method, *sources))
    return _table(lines)


def chosen_table(results: OneShotResults) -> str:
    """Methods × corners: λ, and the rule's own hyper-parameter, median over seeds; * where λ is at an end."""
    lines = [("merged by", *map(place_name, results.corners))]
    for method in results.one_shot.methods:
        rule, cells = MERGE_RULES[method], []
        for place in results.corners:
            scales, values = (results.chosen(place, method, name) for name in ("scale", "value"))
            words = [f"λ {median(scales):.3g}" + ("*" if any(results.chosen(place, method, "edge")) else "")] if (
                scales and rule.scaled) else []  # fmt: skip
            words += [f"{rule.parameter} {median(values):.3g}"] if rule.parameter and values else []
            cells.append(", ".join(words) or BLANK)
        lines.append((method, *cells))
    return _table(lines)


def cell_table(results: OneShotResults) -> str:
    """One row per cell: accuracies without merging, and how far the task vectors agree."""
    lines = [("cell", "n", "θ₀ test %", "own models, test %", "mean cosine of two task vectors")]
    for place in results.records:
        cosine = results.fact(place, "mean_cosine")
        lines.append((
            place_name(place), str(cosine.n), _spread(results.fact(place, "pretrained_test_accuracy", 100)),
            _spread(results.fact(place, "own_test_accuracy", 100)), _number(cosine.mean, 3),
        ))  # fmt: skip
    return _table(lines)


def footnote(results: OneShotResults) -> str:
    """What the numbers are, the settings, time and machine."""
    one_shot = results.one_shot
    records = [record for cells in results.records.values() for record in cells.values()]
    left = len(one_shot.cells) - len(records)
    seconds = sum(record["seconds"] for record in records)
    processors = sorted({record["environment"]["machine"]["processor"] for record in records})
    settings = ", ".join(
        f"`{key}={value}`" for key, value in one_shot.settings.items() if key not in ("data-dir", "learning-rate")
    )
    rates = sorted({record["learning_rate"] for record in records})
    data = ", ".join(f"{name} (overlap {overlap:g})" for name, overlap in one_shot.data.items())
    training = ", ".join(
        f"{name} (steps × {spread.steps:g}, learning rate × {spread.learning_rate:g}, batch × {spread.batch_size:g})"
        for name, spread in one_shot.training.items()
    )
    heads = "shared" if one_shot.shared_head else "of their own"
    undone = f"{left} of {len(one_shot.cells)} cells are not done. " if left else ""
    return (
        f"{undone}Accuracy is the mean over {one_shot.number} tasks in percent, in brackets normalised by each task's "
        f"own fine-tuned model; ± is the sample standard deviation over the seeds "
        f"{', '.join(map(str, one_shot.seeds))}. Differences are in points, matched by seed, with 95 % t intervals, "
        f"not corrected for their number. Data levels: {data}. Training levels, the largest over the smallest among "
        f"the tasks: {training}. λ and each rule's hyper-parameter: chosen on validation by mean normalised accuracy; "
        f"* λ at an end of the range for a seed.\n\n"
        f"Tasks: {one_shot.family}, heads {heads}. Settings: {settings}. Learning rate: "
        f"{', '.join(f'{rate:g}' for rate in rates)}"
        f"{' (chosen on validation, search.csv)' if one_shot.rates else ''}.\n\n"
        f"Hardware: {', '.join(processors)}; the cells took {seconds / 60:.1f} minutes, one thread each. "
        f"Command: `fl-taskarith one-shot {one_shot.source}`"
    )


def run_records(results: OneShotResults) -> list[dict[str, Any]]:
    """Lines of runs.csv: every cell, seed and method."""
    return [
        {"data": place[0], "training": place[1], "seed": seed, "method": method}
        | {
            name: found[name]
            for name in ("value", "scale", "edge", "val_normalised", "test_normalised", "test_accuracy")
        }
        | {name: record[name] for name in ("own_test_accuracy", "pretrained_test_accuracy", "mean_cosine")}
        for place, cells in results.records.items()
        for seed, record in sorted(cells.items())
        for method, found in record["methods"].items()
    ]


def table_records(results: OneShotResults) -> list[dict[str, Any]]:
    """Lines of table.csv: every cell and method over seeds, in percent and points."""
    lines = []
    for place in results.records:
        for method in results.one_shot.methods:
            accuracy, difference = results.summary(place, method), results.difference(place, method)
            normalised = results.summary(place, method, "test_normalised")
            lines.append({
                "data": place[0], "training": place[1], "method": method, "n": accuracy.n,
                "test_percent": accuracy.mean, "test_percent_sd": accuracy.sd,
                "test_normalised_percent": normalised.mean, "test_normalised_percent_sd": normalised.sd,
                "difference": difference.mean, "difference_low": difference.low, "difference_high": difference.high,
                "detectable": difference.detectable,
            })  # fmt: skip
    return lines


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def _spread(summary: Summary) -> str:
    mean = _number(summary.mean)
    return mean if math.isnan(summary.sd) else f"{mean} ± {summary.sd:.2f}"


def _number(value: float, digits: int = 2) -> str:
    return BLANK if math.isnan(value) else f"{value:.{digits}f}"


def _interval(difference: Paired) -> str:
    if math.isnan(difference.mean):
        return BLANK
    mean = f"{difference.mean:+.2f}"
    return mean if math.isnan(difference.low) else f"{mean} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _csv(records: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({name: "" if value is None or value != value else value for name, value in record.items()})
    return text.getvalue()
