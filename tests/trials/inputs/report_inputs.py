"""Records that `report`, `plot` and `study --tables` read, with values, lines or bytes of them changed."""

import contextlib
import csv
import io
import json
import random
import shutil
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from report_studies import MIXED, write_study
from small_studies import STUDY, FakeTraining, study_of

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.figures.run_groups import find_runs, members
from fl_taskarith.one_shot.benchmark_file import OneShot, load_one_shot
from fl_taskarith.one_shot.benchmark_tables import (
    accuracy_table,
    attribution_table,
    cell_table,
    chosen_table,
    difference_table,
)
from fl_taskarith.one_shot.cell_results import OneShotResults, write_cell
from fl_taskarith.report.document import answer, context
from fl_taskarith.report.read_results import read_studies
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.packed_runs import PackedRun, read_pack, write_pack
from fl_taskarith.study.comparison import compare
from fl_taskarith.study.definition import Study
from fl_taskarith.study.frame import read_frame
from fl_taskarith.study.listing import last_round
from fl_taskarith.study.results import StudyResults, read_outcome
from fl_taskarith.study.shipped import count_shipped
from fl_taskarith.study.tables import arm_table, trials_csv

ONE_SHOT = """
title = "A benchmark"
name = "tiny"
seeds = [0, 1]
methods = ["task-arithmetic", "median"]
reference = "task-arithmetic"
tasks = { family = "inversions", number = 4 }
settings = { learning-rate = 0.1 }
data = [{ name = "low", overlap = 1.0 }, { name = "high", overlap = 0.0 }]
training = [{ name = "low" }, { name = "high", steps-spread = 4 }]
"""
METHOD = {"value": None, "scale": 1.0, "edge": False, "val_normalised": 0.9, "test_normalised": 0.9,
          "test_accuracy": 0.8}  # fmt: skip
CELL = {"own_test_accuracy": 0.9, "pretrained_test_accuracy": 0.1, "mean_cosine": 0.1, "learning_rate": 0.1,
        "seconds": 3.0, "environment": {"machine": {"processor": "A processor"}}}  # fmt: skip
FAULT = "records of runs and studies damaged"
ODD = (
    *(None, True, -1, 0, 1.5, 10**30, 2**63, -(10**400), float("nan"), float("inf"), 1e308, "", "x", "auto", "\ud800"),
    *("=1+1", "a|b", "\\input{x}", [], [[]], {}, {"": 0}, [None] * 3, "y" * 200_000),
)
CELLS = ("", "x", "-1", "nan", "inf", "1e999", "1_0", "9" * 5000, "٣", " 1", "True", "0.5", "3", '"', "a\0b", "1.5.2")


class Prepared(NamedTuple):
    """A folder of a study's tables; the study and root of its runs; a one-shot benchmark and its folder of cells."""

    tables: Path
    study: Study
    root: Path
    one_shot: OneShot
    cells: Path


def prepare(folder: Path) -> Prepared:
    write_study(folder / "tables", MIXED[:7])
    (folder / "file").mkdir()
    study, training = study_of(STUDY, folder / "file"), FakeTraining(lambda run: 0.9 + 0.001 * run.seed)
    results = StudyResults(study, folder / "results")
    for arm in study.arms:
        choice = results.choice(arm)
        assert choice is not None
        for run in results.final_runs(arm, choice):
            training(run)
    (folder / "one-shot.toml").write_text(ONE_SHOT)
    one_shot = load_one_shot(folder / "one-shot.toml")
    for cell in one_shot.cells:
        methods = dict.fromkeys(one_shot.methods, METHOD)
        write_cell(one_shot, cell, folder / "one-shot", {"methods": methods, **CELL})
    return Prepared(folder / "tables", study, folder / "results", one_shot, folder / "one-shot")


def attempt(prepared: Prepared, drawn: random.Random, folder: Path) -> str:
    use, place, files = drawn.choice([_report, _report, _plot, _tables, _pack, _one_shot])(prepared, drawn, folder)
    for path in drawn.sample(files, min(len(files), drawn.choice([1, 1, 2]))):
        _damage(path, drawn)
    with contextlib.redirect_stdout(io.StringIO()):
        use()
    return f"{place} accepted"


Made = tuple[Callable[[], None], str, list[Path]]
"""What reads the files, in a word, and the files."""


def _report(prepared: Prepared, drawn: random.Random, folder: Path) -> Made:
    shutil.copytree(prepared.tables, folder / "tables")

    def use() -> None:
        studies = read_studies(folder / "tables")
        sections = answer(studies)
        filled = context(studies, sections, {section.name: [] for section in sections}, "A title", [])
        assert "\ud800" not in repr(filled)
        for arm in studies[0].arms:
            assert all(0 <= value <= 100 for value in (*arm.test.values(), *arm.val.values()))
            assert arm.rate is None or isfinite(arm.rate)
        count_shipped(folder / "tables" / "runs.csv")

    return use, "report", sorted(path for path in (folder / "tables").iterdir() if path.name != "README.md")


def _runs(prepared: Prepared, drawn: random.Random, folder: Path) -> list[Path]:
    shutil.copytree(prepared.root, folder / "results")
    if drawn.random() < 0.8:  # else the checksums find everything
        for path in folder.rglob("SHA256SUMS"):
            path.unlink()
    return sorted(path for path in folder.rglob("*") if path.name in ("run.json", "rounds.csv", "SHA256SUMS"))


def _plot(prepared: Prepared, drawn: random.Random, folder: Path) -> Made:
    files = _runs(prepared, drawn, folder)

    def use() -> None:
        runs = find_runs([folder / "results"])
        assert len(runs) >= 4, "a run was left out that says it is finished"
        for run in runs:
            assert run.title and run.training_loss and run.settings["dataset"] != REGRESSION
        for member in members(runs):
            assert 0 <= member.last_percent().mean <= 100 or not member.last_percent().n
            member.curve("val_accuracy", 100)
            member.mean_of("uplink_bytes")

    return use, "plot", files


def _tables(prepared: Prepared, drawn: random.Random, folder: Path) -> Made:
    files = _runs(prepared, drawn, folder)
    (failing,) = drawn.sample(files, 1)
    if drawn.random() < 0.2:
        (failing.parent / "run.json").unlink()
        (failing.parent / "failure.json").write_text(json.dumps({"diverged": True, "cause": "a loss of NaN"}))
        files.append(failing.parent / "failure.json")

    def use() -> None:
        results = StudyResults(prepared.study, folder / "results")
        results.runs.resolve()
        frame = read_frame(results)
        rows = compare(frame)
        assert arm_table(prepared.study, rows) and csv_text(frame.runs.to_dict("records")) is not None
        assert frame.machines is not None and trials_csv(results) is not None
        for path in files:
            last_round(path.parent)
            read_outcome(path.parent)

    return use, "tables", [path for path in files if path.exists()]


def _pack(prepared: Prepared, drawn: random.Random, folder: Path) -> Made:
    outcomes = {path.parent.name: read_outcome(path.parent) for path in prepared.root.rglob("run.json")}
    pack = folder / "runs.jsonl"
    write_pack(pack, {name: PackedRun(each.record, each.rows) for name, each in outcomes.items()})

    def use() -> None:
        runs = find_runs([folder])
        for member in members(runs):
            member.last_percent()
        assert all(run == PackedRun(outcomes[name].record, outcomes[name].rows)
                   for name, run in read_pack(pack).items())  # fmt: skip

    return use, "pack", [pack]


def _one_shot(prepared: Prepared, drawn: random.Random, folder: Path) -> Made:
    shutil.copytree(prepared.cells, folder / "one-shot")
    files = sorted(folder.rglob("*.json"))
    for path in files if drawn.random() < 0.8 else ():  # as an earlier version wrote them
        record = json.loads(path.read_text())
        del record["sha256"]
        path.write_text(json.dumps(record))

    def use() -> None:
        one_shot = prepared.one_shot
        results = OneShotResults(one_shot, folder / "one-shot")
        for table in (accuracy_table, difference_table, attribution_table, chosen_table, cell_table):
            assert table(results)
        assert csv_text(results.runs()) is not None and csv_text(results.table())

    return use, "one-shot", files


def _damage(path: Path, drawn: random.Random) -> None:
    content = path.read_bytes()
    kind = drawn.choice(
        [*["value"] * 12, "line", "line", "flipped", "cut", "empty", "gone", "folder", "utf-16", "deep"]
    )
    place = drawn.randrange(len(content))
    lines = content.splitlines(keepends=True)
    if kind == "value":
        content = _with_odd_value(path, content, drawn)
    elif kind == "line":
        at = drawn.randrange(len(lines))
        lines[at : at + 1] = drawn.choice(
            [[], [lines[at], lines[at]], [lines[at], b"\n"], [b",".join([lines[at]] * 2)]]
        )
        content = b"".join(lines)
    elif kind == "flipped":
        content = content[:place] + bytes([drawn.randrange(256)]) + content[place + 1 :]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        changed = {"cut": content[:place], "empty": b"", "utf-16": content.decode(errors="replace").encode("utf-16"),
                   "deep": b"[" * 100_000}  # fmt: skip
        path.write_bytes(changed.get(kind, content))


def _with_odd_value(path: Path, content: bytes, drawn: random.Random) -> bytes:
    """Change one value, or take a key away, in a line of a CSV or in JSON."""
    lines = content.decode().splitlines()
    if path.suffix == ".csv":
        rows = list(csv.reader(lines))
        row = drawn.choice(rows)
        row[drawn.randrange(len(row))] = drawn.choice(CELLS)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()
    if path.suffix not in (".json", ".jsonl"):
        return content
    at = drawn.randrange(len(lines)) if path.suffix == ".jsonl" else 0
    value = json.loads(lines[at]) if path.suffix == ".jsonl" else json.loads(content)
    holder: Any = value
    while True:
        key = drawn.choice(list(holder) if isinstance(holder, dict) else list(range(len(holder))))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or drawn.random() < 0.3:
            break
        holder = holder[key]
    if drawn.random() < 0.25:
        del holder[key]
    else:
        holder[key] = drawn.choice(ODD)
    if path.suffix == ".json":
        return json.dumps(value).encode()
    lines[at] = json.dumps(value)
    return ("\n".join(lines) + "\n").encode()
