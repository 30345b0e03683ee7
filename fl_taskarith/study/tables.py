"""The tables of a study: README.md to read, the CSVs and settings.json to compute with, and figures."""

import csv
import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_taskarith.config.fields import snake
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.figures.run_groups import Member, members, read_run
from fl_taskarith.figures.set_curves import plot_bands
from fl_taskarith.figures.set_plots import SWEPT, plot_drift, plot_heat_map, plot_sweep
from fl_taskarith.figures.statistics import Paired, Summary
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.study.comparison import Comparison, compare
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.footnote import footnote
from fl_taskarith.study.results import Outcome, State, StudyResults
from fl_taskarith.study.search import DIVERGED
from fl_taskarith.study.shipped import origin_words
from fl_taskarith.study.table_plots import plot_arms
from fl_taskarith.study.table_records import curve_records, settings_record, speed

BLANK = "–"

log = logging.getLogger("fl_taskarith")


@dataclass(frozen=True)
class _Column:
    """Of the Markdown tables; left out of a group's table where every cell is blank, unless `always`."""

    title: str
    cell: Callable[[Comparison], str]
    always: bool = False


def write_tables(results: StudyResults) -> None:
    """Write README.md, the CSVs and a figure per group into the study's folder, from what its runs left there.

    Raises:
        CheckpointError: a file cannot be written.
    """
    study, rows = results.study, compare(results)
    if not any(row.test.n for row in rows) and _has_results(results.folder / "table.csv"):
        log.warning(
            "%s is left as it is: it has tables of finished runs, and no run of this study is finished in %s.",
            results.folder, results.runs,
        )  # fmt: skip
        return
    make_folder(results.folder)
    parts = [f"# {study.title}", _origin(rows)]
    for group in study.groups:
        in_group = [row for row in rows if row.results.arm.group == group]
        parts += [f"## {group}"] if group else []
        parts += [markdown_table(study, in_group), _failures(in_group)]
        figure = "accuracy" + (f"-{re.sub(r'[^a-z0-9.]+', '-', group.lower()).strip('-.')}" if group else "")
        if plot_arms(in_group, group or study.title, results.folder / figure):
            parts.append(f"![test accuracy]({figure}.png)")
        parts += _figures(results, in_group, figure.replace("accuracy", "curves", 1), plot_bands)
    for draw, figure in ((plot_heat_map, "heat-map"), (plot_drift, "drift"), *((_sweep(key), key) for key in SWEPT)):
        parts += _figures(results, rows, figure, draw)
    parts.append(footnote(results, rows))
    write_atomically(results.folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    write_atomically(results.folder / "table.csv", _csv([_arm_record(study, row) for row in rows]))
    write_atomically(results.folder / "runs.csv", _csv([record for row in rows for record in _run_records(study, row)]))
    arms = [row.results for row in rows]
    write_atomically(results.folder / "settings.json", settings_record(study, arms))
    curves = curve_records(arms)
    if curves:
        write_atomically(results.folder / "curves.csv", _csv(curves))
    if study.search is not None:
        write_atomically(results.folder / "search.csv", trials_csv(results))


def _origin(rows: Sequence[Comparison]) -> str:
    """On the runs that were shipped with the project; an arm may stand in two tables, and its runs count once."""
    found = [outcome for row in rows for outcome in row.results.outcomes.values() if outcome.state is State.DONE]
    shipped = {outcome.name: outcome.shipped for outcome in found}
    return origin_words(sum(shipped.values()), len(shipped))


def _has_results(path: Path) -> bool:
    """Whether there is a table.csv that counts finished runs."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return any(line.get("n") not in (None, "", "0") for line in csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _figures(
    results: StudyResults, rows: Sequence[Comparison], name: str, draw: Callable[[Sequence[Member], Path], list[Path]]
) -> list[str]:
    """A figure over the finished final runs of these arms, as Markdown; nothing where it does not apply."""
    labelled = [
        (results.runs / outcome.name, row.results.arm.label)
        for row in rows
        for outcome in row.results.outcomes.values()
        if outcome.state is State.DONE and outcome.record
    ]
    if not labelled:
        return []
    if draw is plot_bands:
        found = members([read_run(folder) for folder, _ in labelled], [label for _, label in labelled])
        reference = next((row.results.arm.label for row in rows if row.is_reference), "")
        drawn = plot_bands(found, results.folder / name, reference)
    else:  # over all tables, where an arm may stand twice, and two arms may have one name
        drawn = draw(
            members([read_run(folder) for folder in dict.fromkeys(folder for folder, _ in labelled)]),
            results.folder / name,
        )
    return [f"![{path.stem}]({path.name})" for path in drawn if path.suffix == ".png"]


def _sweep(key: str) -> Callable[[Sequence[Member], Path], list[Path]]:
    return lambda arms, output: plot_sweep(arms, key, output)


def markdown_table(study: Study, rows: Sequence[Comparison]) -> str:
    """One table; a run that was not done is said to be "not run", never left out."""
    group = rows[0].results.arm.group if rows else ""
    reference = study.references.get(group, study.reference)
    columns = [
        _Column("arm", lambda row: row.results.arm.label, always=True),
        _Column("density", lambda row: BLANK if row.results.density is None else f"{row.results.density:.3g}"),
        _Column("learning rate", _rate, always=True),
        _Column("ridge head, test %", lambda row: _spread(row.ridge, with_sd=row.ridge.sd > 0)),
        _Column("test accuracy %", _accuracy, always=True),
        _Column("n", lambda row: _count(row, len(study.seeds)), always=True),
        _Column("val accuracy %", lambda row: _spread(row.val)),
        _Column("gain over ridge head [95 % CI]", lambda row: _interval(row.gain)),
        _Column(f"difference to {reference or 'reference'} [95 % CI]", _difference),
        _Column("detectable", lambda row: _detectable(row.difference)),
        _Column("‖τ‖, last round", lambda row: _spread(row.norm, digits=3)),
        _Column("uplink MB per round", lambda row: _number(row.uplink.mean)),
    ]
    shown = [
        (column, [column.cell(row) for row in rows])
        for column in columns
        if column.always or any(column.cell(row) != BLANK for row in rows)
    ]
    lines = ["| " + " | ".join(column.title for column, _ in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*(cells for _, cells in shown), strict=True)]
    return "\n".join(line.replace("\n", " ") for line in lines)


def _failures(rows: Sequence[Comparison]) -> str:
    lines = [f"- {row.results.arm.label}: {row.results.problem}" for row in rows if row.results.problem]
    lines += [f"- {row.results.arm.label}, seed {seed}: {cause}"
              for row in rows for seed, cause in row.results.causes.items()]  # fmt: skip
    return "\n".join(line.replace("\n", " ") for line in lines)


def _rate(row: Comparison) -> str:
    choice, arm = row.results.choice, row.results.arm
    if choice is None:
        return BLANK
    notes = [f"that of {arm.same_rate_as}"] if arm.same_rate_as else []
    notes += ["edge: not tuned"] if choice.edge else []
    return f"{choice.rate:g}" + (f" ({'; '.join(notes)})" if notes else "")


def _accuracy(row: Comparison) -> str:
    if row.test.n:
        return _spread(row.test)
    return "failed" if row.results.problem or row.results.causes else "not run"


def _count(row: Comparison, seeds: int) -> str:
    return str(row.test.n) if row.test.n in (0, seeds) else f"{row.test.n} of {seeds}"


def _difference(row: Comparison) -> str:
    return BLANK if row.is_reference or row.difference is None else _interval(row.difference)


def _number(value: float, form: str = ".2f") -> str:
    return BLANK if math.isnan(value) else format(value, form)


def _spread(summary: Summary, digits: int = 2, *, with_sd: bool = True) -> str:
    mean = _number(summary.mean, f".{digits}f")
    return mean if math.isnan(summary.sd) or not with_sd else f"{mean} ± {summary.sd:.{digits}f}"


def _interval(paired: Paired) -> str:
    mean = _number(paired.mean, "+.2f")
    return mean if math.isnan(paired.low) else f"{mean} [{paired.low:+.2f}, {paired.high:+.2f}]"


def _detectable(paired: Paired | None) -> str:
    return BLANK if paired is None else _number(paired.detectable)


def _arm_record(study: Study, row: Comparison) -> dict[str, object]:
    """One line of table.csv; what is not known is empty."""
    this, difference = row.results, row.difference
    record: dict[str, object] = {
        "group": this.arm.group,
        "arm": this.arm.label,
        **_varied(study, this.arm),
        "density": this.density,
        "learning_rate": None if this.choice is None else this.choice.rate,
        "edge": None if this.choice is None else this.choice.edge,
        "n": row.test.n,
        "ridge_test_percent": row.ridge.mean,
    }
    for name, summary in (("test_percent", row.test), ("val_percent", row.val), ("task_vector_norm", row.norm)):
        record |= {name: summary.mean, f"{name}_sd": summary.sd}
    for name, pairs in (("gain", row.gain), ("difference", difference)):
        parts = ("mean", "sd", "low", "high", "detectable", "n")
        record |= {f"{name}_{part}": None if pairs is None else getattr(pairs, part) for part in parts}
    return record | {"uplink_megabytes": row.uplink.mean}


def _varied(study: Study, arm: Arm) -> dict[str, object]:
    """The settings of an arm in which those of the study differ, as columns; the density stands in its own."""
    values = Config().to_run_config() | dict(arm.settings)
    return {snake(key): values[key] for key in study.varied if key not in ("density", "learning-rate")}


def _run_records(study: Study, row: Comparison) -> list[dict[str, object]]:
    """Lines of runs.csv: every final run of an arm, so that each number can be made again from the file."""
    this = row.results
    return [
        {
            "group": this.arm.group,
            "arm": this.arm.label,
            **_varied(study, this.arm),
            "run": outcome.name,
            "seed": seed,
            "learning_rate": None if this.choice is None else this.choice.rate,
            "state": str(outcome.state),
            "ridge_test_percent": this.ridge.get(seed),
            "test_percent": this.test.get(seed),
            "val_percent": this.val.get(seed),
            "task_vector_norm": this.norm.get(seed),
            "uplink_megabytes": this.uplink.get(seed),
            **_time(outcome),
        }
        for seed, outcome in this.outcomes.items()
    ]


def _time(outcome: Outcome) -> dict[str, float | None]:
    """Of a run that is done: seconds of all work on it, and its speed."""
    times = (outcome.seconds, *speed(outcome)) if outcome.state is State.DONE else (None, None, None)
    return dict(zip(("seconds", "round_seconds", "images_per_second"), times, strict=True))


def trials_csv(results: StudyResults) -> str:
    """search.csv: everything the searches tried so far, and what they chose."""
    records: list[dict[str, object]] = []
    for arm in results.study.arms:
        if results.study.rate_arm(arm) is not arm:
            continue
        try:
            choice = results.choice(arm)
        except FlTaskarithError:  # told where the tables are made
            choice = None
        records += [
            {
                "group": arm.group,
                "arm": arm.label,
                "learning_rate": rate,
                "rounds": rounds,
                "val_accuracy": None if score == DIVERGED else score[0],
                "val_loss": None if score == DIVERGED else -score[1],
                "diverged": score == DIVERGED,
                "chosen": choice is not None and choice.rate == rate,
            }
            for (rate, rounds), score in results.scores(arm).items()
        ]
    return _csv(records)


def _csv(records: Sequence[dict[str, object]]) -> str:
    """Floats by repr, so that they read back to the same bits; nan and None as empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if records:
        writer.writerow(records[0])
    for record in records:
        writer.writerow("" if value is None or value != value else value for value in record.values())
    return text.getvalue()
