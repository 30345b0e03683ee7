"""The files of a study's folder: README.md to read, CSVs and settings.json to compute with, and figures."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from fl_taskarith.errors import CheckpointError, FlTaskarithError
from fl_taskarith.figures.layer_plots import plot_overlap
from fl_taskarith.figures.markdown import (
    BLANK,
    markdown_table,
    mean_with_interval,
    mean_with_sd,
    number,
    render_markdown,
)
from fl_taskarith.figures.run_groups import Member, members, read_run
from fl_taskarith.figures.set_curves import plot_bands
from fl_taskarith.figures.set_plots import SWEPT, plot_drift, plot_heat_map, plot_sweep
from fl_taskarith.figures.statistics import seed_words, seeds_of
from fl_taskarith.server.course import gain
from fl_taskarith.storage.correctness import KINDS
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import file_names, make_folder, write_atomically
from fl_taskarith.storage.record_files import COUNT, read_csv
from fl_taskarith.study.comparison import Comparison, PrimaryRow, compare, compare_primary, head_words
from fl_taskarith.study.definition import Study
from fl_taskarith.study.frame import StudyFrame, read_frame, seed_columns, varied_settings
from fl_taskarith.study.results import State, StudyResults
from fl_taskarith.study.search import DIVERGED, Search, also_words
from fl_taskarith.study.shipped import is_shipped, origin_words
from fl_taskarith.study.study_file import shown_setting
from fl_taskarith.study.table_plots import plot_arms, plot_groups

TEMPLATE = Path(__file__).with_name("tables.md.j2")

REMEDY = "Restore it, or move it away to write the tables from what is there."

log = logging.getLogger("fl_taskarith")

Figures = list[tuple[str, str]]  # (title, file name of the PNG)


def write_tables(results: StudyResults) -> None:
    """Write README.md, the CSVs, settings.json and a figure per group into the study's folder, from its runs.

    Raises:
        CheckpointError: a file cannot be written.
    """
    study, frame = results.study, read_frame(results)
    rows = compare(frame)
    if not any(row.test.n for row in rows) and _arms_in(results.folder):
        log.warning(
            "%s is left as it is: it has tables of finished runs, and no run of this study is finished in %s.",
            results.folder, results.runs,
        )  # fmt: skip
        return
    warn_of_other_arms(results)
    make_folder(results.folder)
    shares = not all(isnan(row.retained) for row in rows)
    files = {
        "README.md": _readme(results, frame, rows),
        "table.csv": csv_text([_arm_record(study, row, shares) for row in rows]),
        "runs.csv": csv_text(frame.runs.drop(columns="title").to_dict("records")),
        "settings.json": _settings_record(frame),
    }
    if study.primary:
        files["primary.csv"] = csv_text(list(map(_primary_record, compare_primary(frame))))
    if correct := _correct_records(frame):
        files["correct.csv"] = csv_text(correct)
    if not frame.rounds.empty:
        files["curves.csv"] = csv_text(frame.rounds.to_dict("records"))
    if study.search is not None:
        files["search.csv"] = trials_csv(results)
    for name, text in files.items():
        write_atomically(results.folder / name, text)


def warn_of_other_arms(results: StudyResults) -> None:
    """Warn if the study's folder has tables of arms that are not the study's: another study file has the same name."""
    others: list[str] = []
    with suppress(CheckpointError):  # a damaged table is written anew
        others = sorted(_arms_in(results.folder) - {arm.title for arm in results.study.arms})
    if others:
        log.warning(
            "%s has tables with arms that this study file lacks: %s%s. Its tables replace them. To keep both, change "
            "`name` in one of the files. All runs are kept: `fl-taskarith study FILE --tables` writes a file's tables "
            "again.", results.folder, "; ".join(others[:3]), f" and {len(others) - 3} more" * (len(others) > 3),
        )  # fmt: skip


def _arms_in(folder: Path) -> set[str]:
    """Return the titles of the arms of which table.csv counts finished runs; none without the file."""
    columns = {"group": (str, None), "arm": (str, None), "n": (COUNT, None)}
    lines = read_csv(folder / "table.csv", columns, REMEDY, optional=True) or ()
    return {f"{line['group']}: {line['arm']}" if line["group"] else str(line["arm"]) for line in lines if line["n"]}


def _readme(results: StudyResults, frame: StudyFrame, rows: Sequence[Comparison]) -> str:
    study, done = frame.study, frame.done
    groups, names = [], file_names(study.groups)
    for name in study.groups:
        own = [row for row in rows if row.results.arm.group == name]
        file = f"accuracy-{names[name]}" if name else "accuracy"
        figures: Figures = []
        if len(own) == 1 or sum(row.test.n > 0 for row in own) > 1:  # of one arm among others there is nothing to see
            if plot_arms(own, name or study.title, results.folder / file):
                figures.append(("test accuracy", f"{file}.png"))
            reference = next((row.results.arm.label for row in own if row.is_reference), "")
            for kind, draw in (("curves", partial(plot_bands, reference=reference)), ("overlap", plot_overlap)):
                figures += _figures(results, own, file.replace("accuracy", kind, 1), draw, True)
        groups.append({"name": name, "table": arm_table(study, own), "notes": _failures(own) + _lost(own, study),
                       "figures": figures, "stopped": any(row.results.stops for row in own)})  # fmt: skip
    whole = {"heat-map": plot_heat_map, "drift": plot_drift} | {key: partial(_plot_sweep, key) for key in SWEPT}
    across: Figures = []
    if plot_groups(rows, results.folder / "groups"):
        across.append(("test accuracy by group", "groups.png"))
    own_searches: dict[Search, list[str]] = {}
    for arm in study.arms:
        if arm.search is not None and study.searched(arm) is not None:
            own_searches.setdefault(arm.search, []).append(arm.title)
    shipped = [is_shipped(*run) for run in done[["run", "test_percent", "seconds"]].itertuples(index=False)]
    units = {"round_seconds": "s a round", "images_per_second": "training images/s"}
    speeds = {unit: done[column].dropna().astype(float) for column, unit in units.items()}
    fixed = [arm.title for arm in study.arms if study.searched(arm) is None]
    return render_markdown(
        TEMPLATE,
        study=study,
        origin=origin_words(sum(shipped), len(shipped)),
        groups=groups,
        figures=across + [each for name, draw in whole.items() for each in _figures(results, rows, name, draw)],
        primary=primary_table(study, compare_primary(frame)) if study.primary else "",
        over={
            pairs.over
            for row in rows
            for pairs in (row.gain, row.difference)
            if pairs is not None and (pairs.over or pairs.n > 1)
        },
        head=head_words(rows),
        shares=not all(isnan(row.retained) for row in rows),
        searched=len(fixed) < len(study.arms),
        own_searches=list(own_searches.items()),
        fixed=fixed,
        settings=[shown_setting(*item) for item in study.shared.items()],
        machines=frame.machines,
        final=len(done),
        final_seconds=done["seconds"].sum(),
        other_seconds=frame.other_seconds,
        speeds=[(unit, values) for unit, values in speeds.items() if len(values)],
    )


def _figures(
    results: StudyResults, rows: Sequence[Comparison], name: str, draw: Callable[..., list[Path]], by_arm: bool = False
) -> Figures:
    """Draw a figure over the finished final runs of these arms; nothing where it does not apply.

    Args:
        by_arm: within one table, whose arms give the runs their names; over all tables an arm may stand twice, and two
            arms may have one name.
    """
    labelled = [
        (results.runs / outcome.name, row.results.arm.label)
        for row in rows
        for outcome in row.results.outcomes.values()
        if outcome.state is State.DONE
    ]
    if not labelled:
        return []
    if by_arm:
        found = members([read_run(folder) for folder, _ in labelled], [label for _, label in labelled])
    else:
        found = members([read_run(folder) for folder in dict(labelled)])
    return [(path.stem, path.name) for path in draw(found, results.folder / name) if path.suffix == ".png"]


def _plot_sweep(key: str, arms: Sequence[Member], output: Path) -> list[Path]:
    return plot_sweep(arms, key, output)


@dataclass(frozen=True)
class _Column:
    """A column of the Markdown tables; left out where every cell is blank, unless `always`."""

    title: str
    cell: Callable[[Comparison], str]
    always: bool = False


def arm_table(study: Study, rows: Sequence[Comparison]) -> str:
    """Return one group's table in Markdown; a run that was not done is said to be "not run", never left out."""
    group = rows[0].results.arm.group if rows else ""
    reference, head = study.references.get(group, study.reference) or "reference", head_words(rows)
    columns = [
        _Column("arm", lambda row: row.results.arm.label, always=True),
        _Column("density", lambda row: BLANK if row.results.density is None else f"{row.results.density:.3g}"),
        _Column("learning rate", _rate, always=True),
        _Column(f"{head}, test %", lambda row: mean_with_sd(row.ridge) if row.ridge.sd else number(row.ridge.mean)),
        _Column("test accuracy %", _accuracy, always=True),
        _Column("n", lambda row: _count(row, len(study.run_seeds)), always=True),
        _Column("stopped early after round", _stops),
        _Column("val accuracy %", lambda row: mean_with_sd(row.val)),
        _Column(f"gain over {head} [95 % CI]", lambda row: mean_with_interval(row.gain)),
        _Column("gain, % of the best iid arm's", lambda row: number(row.retained, 1)),
        _Column(f"difference to {reference} [95 % CI]",
                lambda row: BLANK if row.difference is None else mean_with_interval(row.difference)),
        _Column("detectable", lambda row: BLANK if row.difference is None else number(row.difference.detectable)),
        _Column("‖θ − θ₀‖, last round", lambda row: mean_with_sd(row.norm, 3)),
        _Column("uplink MB per round", lambda row: number(row.uplink.mean)),
    ]  # fmt: skip
    cells = [(column, [column.cell(row) for row in rows]) for column in columns]
    shown = [(column, lines) for column, lines in cells if column.always or set(lines) != {BLANK}]
    return markdown_table([column.title for column, _ in shown], list(zip(*(lines for _, lines in shown), strict=True)))


def _rate(row: Comparison) -> str:
    choice, arm = row.results.choice, row.results.arm
    if choice is None:
        return BLANK
    notes = [f"that of {arm.same_rate_as}"] if arm.same_rate_as else []
    where = "" if choice.edges in ((), ("learning-rate",)) else f" of {', '.join(choice.edges)}"
    notes += [f"edge{where}: not tuned"] if choice.edge else []
    also = f", {also_words(choice.also)}" if choice.also else ""
    return f"{choice.rate:g}{also}" + (f" ({'; '.join(notes)})" if notes else "")


def _accuracy(row: Comparison) -> str:
    if row.test.n:
        return mean_with_sd(row.test)
    return "failed" if row.results.problem or row.results.causes else "not run"


def _count(row: Comparison, seeds: int) -> str:
    return str(row.test.n) if row.test.n in (0, seeds) else f"{row.test.n} of {seeds}"


def _stops(row: Comparison) -> str:
    """Name the rounds after which runs stopped early, by seed; "–" for a run that had all its rounds."""
    stops = row.results.stops
    return ", ".join(str(stops.get(seed, "–")) for seed in row.results.outcomes) if stops else BLANK


def _failures(rows: Sequence[Comparison]) -> list[str]:
    lines = [f"{row.results.arm.label}: {row.results.problem}" for row in rows if row.results.problem]
    lines += [f"{row.results.arm.label}, {seed_words(key)}: {cause}"
              for row in rows for key, cause in row.results.causes.items()]  # fmt: skip
    return [line.replace("\n", " ") for line in lines]


def _lost(rows: Sequence[Comparison], study: Study) -> list[str]:
    """Name the seeds that ended below the head they began with; a rate that was chosen on another is likely why."""
    lines = []
    for row in rows:
        arm, done = row.results.arm, {seed: each for seed, each in row.results.outcomes.items() if each.rows}
        if lost := [seed for seed, each in done.items() if (gain(each.rows) or 0.0) < 0]:
            ends = ", ".join(f"{seed_words(seed)} at {done[seed].test_percent:.2f} %" for seed in lost)
            line = f"{arm.label}: {ends} ended below the {head_words(rows)}."
            search = study.searched(arm)
            chosen_on = () if search is None else search.seeds_of(search.rounds[-1])
            if len(chosen_on) == 1 and chosen_on * 2 not in map(seeds_of, lost):
                line += (
                    f" The learning rate was chosen on seed {chosen_on[0]} alone and is likely too large for "
                    "others: let the search have more seeds, or set a smaller `learning-rate` in the arm's settings."
                )
            lines.append(line)
    return lines


def primary_table(study: Study, rows: Sequence[PrimaryRow]) -> str:
    """Return the primary contrasts in Markdown."""
    count = "shard seeds" if study.shard_seeds else "n"
    header = ["arm", "against", "difference [95 % CI]", count, "p (Holm)", "verdict"]
    return markdown_table(header, [
        (row.contrast.arm.title, row.contrast.against.title, mean_with_interval(row.difference), str(row.difference.n),
         number(row.p, 4), row.verdict)
        for row in rows
    ])  # fmt: skip


def _primary_record(row: PrimaryRow) -> dict[str, object]:
    """Return one line of primary.csv: `low` and `high` of 95 %, `inner` of 90 %."""
    pairs = row.difference
    return {
        "group": row.contrast.arm.group, "arm": row.contrast.arm.label, "against_group": row.contrast.against.group,
        "against": row.contrast.against.label, "mean": pairs.mean, "sd": pairs.sd, "n": pairs.n, "low": pairs.low,
        "high": pairs.high, "inner_low": pairs.inner[0], "inner_high": pairs.inner[1],
        "detectable": pairs.detectable, "over": pairs.over, "p": pairs.p, "p_holm": row.p, "verdict": row.verdict,
    }  # fmt: skip


def _arm_record(study: Study, row: Comparison, with_retained: bool) -> dict[str, object]:
    """Return one line of table.csv; what is not known is empty."""
    arm, choice = row.results.arm, row.results.choice
    record: dict[str, object] = {
        "group": arm.group,
        "arm": arm.label,
        **varied_settings(study, row.results),
        "density": row.results.density,
        "learning_rate": None if choice is None else choice.rate,
        "edge": None if choice is None else choice.edge,
        "n": row.test.n,
        "ridge_test_percent": row.ridge.mean,
    }
    for name, summary in (("test_percent", row.test), ("val_percent", row.val), ("task_vector_norm", row.norm)):
        record |= {name: summary.mean, f"{name}_sd": summary.sd}
    for name, pairs in (("gain", row.gain), ("difference", row.difference)):
        parts = ("mean", "sd", "low", "high", "over", "detectable", "n")
        record |= {f"{name}_{part}": None if pairs is None else getattr(pairs, part) for part in parts}
    if with_retained:
        record["gain_retained_percent"] = row.retained
    stops = any(each.settings.get("early-stopping-patience") for each in study.arms)
    early = {"stopped_early": _stops(row)} if stops else {}
    return record | {"uplink_megabytes": row.uplink.mean} | early


def _correct_records(frame: StudyFrame) -> list[dict[str, object]]:
    """Return the lines of correct.csv: which test images each run has right, as run.json says it; none if unknown."""
    return [
        {"group": arm.arm.group, "arm": arm.arm.label, **seed_columns(frame.study, key),
         "images": len(images), **{kind: " ".join((arm.outcomes[key].record or {}).get(kind, ())) for kind in KINDS}}
        for arm in frame.arms for key, images in arm.correct.items()
    ]  # fmt: skip


def _settings_record(frame: StudyFrame) -> str:
    """Return settings.json: seeds, search, machines, and every arm's settings in full, defaults included."""
    study = frame.study
    arms = [
        {"group": each.arm.group, "arm": each.arm.label, "settings": each.portable}
        | ({} if each.arm.search is None else {"search": _search_record(each.arm.search)})
        for each in frame.arms
    ]
    record: dict[str, object] = {
        "title": study.title,
        "seeds": list(study.seeds),
        **({"shard_seeds": list(study.shard_seeds)} if study.shard_seeds else {}),
        "search": None if study.search is None else _search_record(study.search),
        "machines": frame.machines,
        "arms": arms,
    }
    if study.primary:
        record["primary"] = [
            {"group": arm.group, "arm": arm.label, "against_group": against.group, "against": against.label}
            for arm, against in study.contrasts
        ]
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _search_record(search: Search) -> dict[str, Any]:
    several, by_loss = len(search.seeds) > 1, search.by == "loss"
    return (
        {"rates": list(search.rates), "rounds": list(search.rounds), "keep": search.keep}
        | ({"seeds": list(search.seeds)} if several else {"seed": search.seeds[0]})
        | ({"by": search.by} if by_loss else {})
        | ({"bracket": True} if search.bracket else {})
        | ({"last_seeds": list(search.last_seeds)} if search.last_seeds else {})
        | ({"also": {key: list(values) for key, values in search.also}} if search.also else {})
    )


def trials_csv(results: StudyResults) -> str:
    """Return search.csv: everything the searches tried so far, and what they chose."""
    records: list[dict[str, object]] = []
    study = results.study
    searches = [search for arm in study.arms if (search := study.searched(arm)) is not None]
    others = any(search.also for search in searches)
    for arm in study.arms:
        if study.rate_arm(arm) is not arm:
            continue
        scores, choice = {}, None
        with suppress(FlTaskarithError):  # told where the tables are made
            scores = results.scores(arm)
            choice = results.choice(arm)
        for trial, score in scores.items():
            diverged = score == DIVERGED
            chosen = choice is not None and (choice.rate, choice.also) == (trial.rate, trial.also)
            records.append({
                "group": arm.group, "arm": arm.label, "learning_rate": trial.rate,
                **({"also": also_words(trial.also)} if others else {}), "rounds": trial.rounds,
                "val_accuracy": None if diverged else score[0], "val_loss": None if diverged else -score[1],
                "diverged": diverged, "chosen": chosen,
            })  # fmt: skip
    return csv_text(records)
