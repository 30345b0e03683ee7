"""The runs, studies and searches in a results folder, as frames."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.run_groups import read_run
from fl_taskarith.figures.setting_words import mask_words, sharding_words
from fl_taskarith.server.course import gain
from fl_taskarith.storage.paths import results_root
from fl_taskarith.storage.record_files import COUNT, Within, read_csv, read_json
from fl_taskarith.storage.run_record import read_record

RUN_COLUMNS = ("run", "state", "round", "rounds", "test_accuracy", "gain", "distance", "learning_rate", "dataset",
               "strategy", "clients", "mask", "local_steps", "seed", "age_hours")  # fmt: skip
NUMBER = (float, None)
TABLE = {
    "group": (str, None),
    "arm": str,
    "n": COUNT,
    "val_percent": NUMBER,
    "test_percent": NUMBER,
    "gain_mean": NUMBER,
}
ASKED = {"seeds?": [COUNT], "shard_seeds?": [COUNT]}  # settings.json: the runs of an arm that is finished
WRITE_AGAIN = "Write it again with fl-taskarith study ... --tables."
STUDY_COLUMNS = ("study", "arms", "finished", "best_arm", "test_accuracy", "gain", "age_hours")
TRIALS = {"learning_rate": Within(float, 0), "val_accuracy": NUMBER, "chosen": bool}
SEARCH_COLUMNS = ("search", "trials", "learning_rate", "val_accuracy", "tuned", "age_hours")


def results(results_dir: str = "") -> pandas.DataFrame:
    """Return the runs in a results folder, the newest first; those of studies are in `studies`.

    Columns: run (name of its folder), state ("finished", "running", "interrupted", "failed" or "unreadable"), round and
    rounds (done and asked for), test_accuracy (%, last round measured), gain (points over the head before training),
    distance (to the truth, on regression data), learning_rate (the peak), dataset, strategy, clients (how data are
    spread), mask, local_steps, seed, age_hours (since something was last written).

    Raises:
        ConfigError: `results_dir` is relative and there is no checkout that it could be relative to.
    """
    root = results_root(results_dir)
    rows = [_run(path.parent, root) for path in sorted(root.glob("*/run.json"))]
    return pandas.DataFrame(rows, columns=list(RUN_COLUMNS)).sort_values("age_hours", ignore_index=True)


def studies(results_dir: str = "") -> pandas.DataFrame:
    """Return the studies in a results folder: how many arms have all their seeds, and the best one by validation.

    Columns: study (its folder below the results folder), arms, finished (arms with every seed), best_arm,
    test_accuracy (%, mean over its seeds), gain (points over the head before training), age_hours.

    Raises:
        ConfigError: `results_dir` is relative and there is no checkout that it could be relative to.
    """
    root = results_root(results_dir)
    tables = [path for path in sorted(root.rglob("table.csv")) if (path.parent / "settings.json").exists()]
    return pandas.DataFrame([_study(path, root) for path in tables], columns=list(STUDY_COLUMNS))


def searches(results_dir: str = "") -> pandas.DataFrame:
    """Return the searches of the command `search` in a results folder.

    Columns: search (its folder below the results folder), trials (runs so far, each counted with all its seeds as one),
    learning_rate (what it chose; none while it is not over), val_accuracy (%, at that rate), tuned (whether the choice
    lies inside the grid), age_hours.

    Raises:
        ConfigError: `results_dir` is relative and there is no checkout that it could be relative to.
    """
    root = results_root(results_dir)
    rows = [_search(path, root) for path in sorted(root.glob("search/*/search.csv"))]
    return pandas.DataFrame(rows, columns=list(SEARCH_COLUMNS))


def _run(folder: Path, root: Path) -> Mapping[str, Any]:
    row: dict[str, Any] = {"run": folder.relative_to(root).as_posix(), "age_hours": _age(folder / "run.json")}
    try:
        record, run = read_record(folder), read_run(folder)
        settings, rows = run.settings, run.rows
    except CheckpointError:
        return row | {"state": "unreadable"}
    accuracies = [each["test_accuracy"] for each in rows if each.get("test_accuracy") is not None]
    distances = [each["matched_distance"] for each in rows if each.get("matched_distance") is not None]
    of_images = settings["dataset"] != REGRESSION
    federated = settings["strategy"] != "centralized"
    return row | {
        "state": "unreadable" if record is None else record["status"],
        "round": rows[-1]["round"] if rows else None,
        "rounds": settings["num-rounds"],
        "test_accuracy": 100 * accuracies[-1] if accuracies else None,
        "gain": gain(rows),
        "distance": distances[-1] if distances else None,
        "learning_rate": settings["learning-rate"],
        "dataset": settings["dataset"],
        "strategy": settings["strategy"],
        "clients": sharding_words(settings) if of_images and federated else None,
        "mask": mask_words(settings) if of_images else None,
        "local_steps": settings["local-steps"] if federated else None,
        "seed": settings["seed"],
    }


def _study(table: Path, root: Path) -> Mapping[str, Any]:
    row: dict[str, Any] = {"study": table.parent.relative_to(root).as_posix(), "age_hours": _age(table)}
    try:
        lines = read_csv(table, TABLE, WRITE_AGAIN, filled=True) or []
        asked = read_json(table.with_name("settings.json"), ASKED, WRITE_AGAIN, optional=True) or {}
    except CheckpointError:
        return row | {"best_arm": "unreadable"}
    runs = len(asked.get("seeds", ())) * len(asked.get("shard_seeds", (0,)))
    most = runs or max(line["n"] for line in lines)  # earlier versions wrote no seeds
    finished = [line for line in lines if line["n"] == most > 0]
    row |= {"arms": len(lines), "finished": len(finished)}
    measured = [line for line in lines if line["n"] and line["val_percent"] is not None]
    if not measured:
        return row
    best = max(measured, key=lambda line: float(line["val_percent"]))
    name = " | ".join(words for words in (best["group"], best["arm"]) if words)
    return row | {"best_arm": name, "test_accuracy": best["test_percent"], "gain": best["gain_mean"]}


def _search(path: Path, root: Path) -> Mapping[str, Any]:
    row: dict[str, Any] = {"search": path.parent.relative_to(root).as_posix(), "age_hours": _age(path)}
    try:
        trials = read_csv(path, TRIALS, "Write it again with fl-taskarith search.") or []
    except CheckpointError:
        return row | {"tuned": "unreadable"}
    row["trials"] = len(trials)
    rates = [trial["learning_rate"] for trial in trials]
    for trial in (trial for trial in trials if trial["chosen"]):
        rate, accuracy = trial["learning_rate"], trial["val_accuracy"]
        row |= {"learning_rate": rate, "val_accuracy": None if accuracy is None else 100 * accuracy,
                "tuned": "no, an end of the grid" if rate in (min(rates), max(rates)) else "yes"}  # fmt: skip
    return row


def _age(path: Path) -> float:
    """Return the hours since a file of the folder of `path` was last written."""
    newest = max(each.stat().st_mtime for each in _files(path.parent))
    return round(max(0.0, time.time() - newest) / 3600, 2)


def _files(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (path for path in folder.iterdir() if path.is_file())


def describe_results(results_dir: str = "") -> Iterator[str]:
    """Yield the lines of `fl-taskarith results`: a table of studies, one of searches, then one of runs."""
    root = results_root(results_dir)
    if results_dir and not root.is_dir():
        raise ConfigError(f"There is no folder {root}. A relative results-dir lies in the checkout.")
    tables = (("studies (best arm by validation)", studies(results_dir)), ("searches", searches(results_dir)),
              ("runs, newest first", results(results_dir)))  # fmt: skip
    if all(frame.empty for _, frame in tables):
        yield f"{root} holds no results yet. Start with: fl-taskarith simulate"
        return
    yield f"{root}"
    for title, frame in tables:
        if not frame.empty:
            shown = frame.dropna(axis="columns", how="all")
            yield f"\n{title}\n{shown.to_string(index=False, na_rep='', float_format='{:.4g}'.format, max_colwidth=48)}"
