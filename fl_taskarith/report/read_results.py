"""What the folders of studies say, arm by arm: settings, and accuracies by seed. Nothing is computed here."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_taskarith.config.fields import kebab, rules
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS, Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.report.labels import settings_in_label
from fl_taskarith.study.shipped import line_is_shipped

BySeed = Mapping[int, float]
Curve = tuple[tuple[int, float], ...]  # (round, percent), rising rounds

RUN_COLUMNS = ("group", "arm", "seed", "state", "test_percent", "val_percent")
MEASURED_COLUMNS = {"learning_rate", "density"}  # of table.csv: settings by name, but found by the study


@dataclass(frozen=True)
class MeasuredArm:
    """One arm of one study.

    Attributes:
        settings: kebab-case; all of them where the study's settings.json is there, else what labels and columns tell.
        rate: learning rate; None if its search is not over. edge: chosen at an end of its grid, so not tuned.
        test, val, ridge: accuracy in percent by seed: last round on test and validation, ridge head before training.
        states: of every run by seed ("done", "diverged", ...).
        curves: validation accuracy by seed. test_curves: the same on test.
        sent: megabytes (10⁶ bytes) that clients have sent up since round 0, in place of an accuracy.
        seconds: of work on each run, by seed.
        shipped: seeds of the runs that were shipped with the project.
    """

    study: str
    group: str
    label: str
    settings: Mapping[str, Scalar]
    rate: float | None = None
    edge: bool = False
    test: BySeed = field(default_factory=dict)
    val: BySeed = field(default_factory=dict)
    ridge: BySeed = field(default_factory=dict)
    states: Mapping[int, str] = field(default_factory=dict)
    curves: Mapping[int, Curve] = field(default_factory=dict)
    test_curves: Mapping[int, Curve] = field(default_factory=dict)
    sent: Mapping[int, Curve] = field(default_factory=dict)
    seconds: BySeed = field(default_factory=dict)
    shipped: frozenset[int] = frozenset()


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder as it was read: `record` is settings.json, empty where there is none."""

    name: str
    folder: Path
    arms: tuple[MeasuredArm, ...]
    record: Mapping[str, Any]


def read_studies(root: Path) -> list[StudyFolder]:
    """The studies in `root`, and `root` itself if it is one: every folder with a table.csv, in order of name.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    try:
        folders = [folder for folder in [root, *sorted(root.iterdir())] if (folder / "table.csv").is_file()]
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {root}: {error.strerror}. Expected the folder of a study's results."
        ) from error
    if not folders:
        raise CheckpointError(
            f"{root} holds no results of a study: expected table.csv in it or in folders in it. Run fl-taskarith "
            "study, or give the folder that it wrote."
        )
    return [read_study(folder) for folder in folders]


def read_study(folder: Path) -> StudyFolder:
    """One study's table.csv, runs.csv and, where they are there, settings.json and curves.csv.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    name = folder.resolve().name
    record = _read_settings(folder / "settings.json")
    # A setting that the version which ran the study did not have was at its default.
    own = OPERATIONAL_KEYS | CHOSEN_KEYS
    defaults = {key: value for key, value in Config().to_run_config().items() if key not in own}
    known = {(arm["group"], arm["arm"]): defaults | arm["settings"] for arm in record.get("arms", [])}
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in _read_csv(folder / "runs.csv", RUN_COLUMNS):
        runs.setdefault((line["group"], line["arm"]), []).append(line)
    curves: dict[tuple[str, str], list[dict[str, str]]] = {}
    if (folder / "curves.csv").exists():
        for line in _read_csv(folder / "curves.csv", ("group", "arm", "seed", "round", "val_percent")):
            curves.setdefault((line["group"], line["arm"]), []).append(line)
    arms = []
    for line in _read_csv(folder / "table.csv", ("group", "arm", "learning_rate", "edge")):
        place = (line["group"], line["arm"])
        arms.append(_arm(name, line, known.get(place), runs.get(place, []), curves.get(place, [])))
    return StudyFolder(name, folder, tuple(arms), record)


def _arm(
    study: str, line: dict[str, str], settings: Mapping[str, Scalar] | None,
    runs: list[dict[str, str]], curves: list[dict[str, str]],
) -> MeasuredArm:  # fmt: skip
    def by_seed(column: str) -> dict[int, float]:
        return {int(run["seed"]): float(run[column]) for run in runs if run.get(column)}

    def courses(column: str) -> dict[int, Curve]:
        points: dict[int, list[tuple[int, float]]] = {}
        for point in curves:
            if point.get(column):
                points.setdefault(int(point["seed"]), []).append((int(point["round"]), float(point[column])))
        return {seed: tuple(sorted(course)) for seed, course in points.items()}

    try:
        return MeasuredArm(
            study=study,
            group=line["group"],
            label=line["arm"],
            settings=_guessed(line) if settings is None else settings,
            rate=float(line["learning_rate"]) if line["learning_rate"] else None,
            edge=line["edge"] == "True",
            test=by_seed("test_percent"),
            val=by_seed("val_percent"),
            ridge=by_seed("ridge_test_percent"),
            states={int(run["seed"]): run["state"] for run in runs},
            curves=courses("val_percent"),
            test_curves=courses("test_percent"),
            sent=courses("uplink_megabytes"),
            seconds=by_seed("seconds"),
            shipped=frozenset(int(run["seed"]) for run in runs if line_is_shipped(run)),
        )
    except ValueError as error:
        raise CheckpointError(
            f'The results of {study}, arm "{line["arm"]}", are damaged ({error}): rewrite them with fl-taskarith study '
            "... --tables."
        ) from error


def _guessed(line: Mapping[str, str]) -> dict[str, Scalar]:
    """Settings of an arm whose study wrote no settings.json: columns named after settings, then words of its label."""
    known = rules()
    columns: dict[str, Scalar] = {
        kebab(name): _scalar(cell)
        for name, cell in line.items()
        if cell and name not in MEASURED_COLUMNS and kebab(name) in known
    }
    guessed = settings_in_label(f"{line['group']}, {line['arm']}") | columns
    if line.get("density") and "density" not in guessed:
        guessed["density"] = float(f"{float(line['density']):.3g}")  # as found: 0.09999902 was asked for as 0.1
    return guessed


def _scalar(cell: str) -> Scalar:
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Write it with fl-taskarith study ... --tables.") from error
    for line in lines:
        missing = [column for column in columns if line.get(column) is None]
        if missing or None in line:
            raise CheckpointError(
                f"{path} is damaged: expected {', '.join(missing) or 'no more cells than columns'}. Write it again "
                "with fl-taskarith study ... --tables."
            )
    return lines


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for arm in record["arms"]:
            arm["group"], arm["arm"], dict(arm["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read {path} ({error!r}): write it again with fl-taskarith study ... --tables."
        ) from error
    return dict(record)
