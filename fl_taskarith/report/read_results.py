"""The results of studies, arm by arm: settings, and accuracies by seed. Nothing is computed here."""

import csv
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS, Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.csv_text import plain_words
from fl_taskarith.study.shipped import line_is_shipped

Line = Mapping[str, str]
BySeed = Mapping[int, float]
Curves = Mapping[int, Mapping[int, float]]  # by seed, then by round
CURVES = ("val_percent", "test_percent", "uplink_megabytes")  # columns of curves.csv that are read


@dataclass(frozen=True, eq=False)
class MeasuredArm:
    """One arm of one study.

    Attributes:
        settings: all of them, in kebab-case.
        rate: learning rate; None if its search is not over. edge: whether it is an end of its grid, so not tuned.
        test, val, ridge: accuracy in percent by seed: last round on test and validation, ridge head before training.
        states: of every run by seed ("done", "diverged", ...).
        curves: by column of curves.csv: accuracy in percent, megabytes (10⁶ bytes) that clients sent since round 0.
    """

    label: str
    settings: Mapping[str, Scalar]
    rate: float | None = None
    edge: bool = False
    test: BySeed = field(default_factory=dict)
    val: BySeed = field(default_factory=dict)
    ridge: BySeed = field(default_factory=dict)
    states: Mapping[int, str] = field(default_factory=dict)
    curves: Mapping[str, Curves] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether only a part of the weights is updated."""
        return self.settings["mask-rule"] != "none"

    @property
    def federated(self) -> bool:
        """Whether clients train, each on its own data."""
        return self.settings["strategy"] != "centralized"

    @property
    def trained(self) -> bool:
        """Whether the arm trains at all; at a learning rate of 0 it is its start, the ridge head alone."""
        return self.rate != 0.0

    @property
    def ended_early(self) -> list[str]:
        """How runs ended that did not finish."""
        return sorted({state for state in self.states.values() if state in ("diverged", "failed")})


class FinishedRun(NamedTuple):
    """A run with a result; the same arm in a second table has the same runs."""

    seed: str
    test_percent: str
    seconds: float
    shipped: bool


class StudyFolder(NamedTuple):
    """The folder of a study; `record` is its settings.json."""

    name: str
    folder: Path
    arms: tuple[MeasuredArm, ...]
    finished: frozenset[FinishedRun]
    record: Mapping[str, Any]


def read_studies(root: Path) -> list[StudyFolder]:
    """Read the studies in `root`, and `root` itself if it is one: every folder with a table.csv, in order of name.

    Raises:
        CheckpointError: there is none, or a file is missing or damaged; names it.
    """
    with _reading(root):
        folders = [folder for folder in (root, *sorted(root.iterdir())) if (folder / "table.csv").is_file()]
    if not folders:
        raise CheckpointError(
            f"{root} holds no results of a study: expected table.csv in it or in folders in it. Run fl-taskarith "
            "study, or give the folder that it wrote."
        )
    return [read_study(folder) for folder in folders]


def read_study(folder: Path) -> StudyFolder:
    """Read the table.csv, runs.csv and settings.json of one study and, where it is there, its curves.csv.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    # A setting that the version which ran the study did not have was at its default.
    own = OPERATIONAL_KEYS | CHOSEN_KEYS
    defaults = {key: value for key, value in Config().to_run_config().items() if key not in own}
    with _reading(folder / "settings.json") as path:
        record = {"seeds": [], "machines": []} | json.loads(path.read_text(encoding="utf-8"))
        settings = {(arm["group"], arm["arm"]): defaults | arm["settings"] for arm in record["arms"]}
    runs = _lines(folder / "runs.csv", "seed", "state", "test_percent", "val_percent")
    courses = folder / "curves.csv"
    points = _lines(courses, "seed", "round", "val_percent") if courses.exists() else {}
    table = _lines(folder / "table.csv", "learning_rate", "edge")
    with _reading(folder):
        arms = tuple(
            _arm(line, settings[place], runs[place], points.get(place, ()))
            for place, lines in table.items() for line in lines
        )  # fmt: skip
        finished = frozenset(
            FinishedRun(run["seed"], run["test_percent"], float(run.get("seconds") or 0), line_is_shipped(run))
            for run in itertools.chain(*runs.values()) if run["test_percent"]
        )  # fmt: skip
    return StudyFolder(folder.resolve().name, folder, arms, finished, record)


def _arm(line: Line, settings: Mapping[str, Scalar], runs: Iterable[Line], points: Iterable[Line]) -> MeasuredArm:
    def by_seed(column: str) -> dict[int, float]:
        return {int(run["seed"]): float(run[column]) for run in runs if run.get(column)}

    curves: dict[str, dict[int, dict[int, float]]] = {column: defaultdict(dict) for column in CURVES}
    for point, column in itertools.product(points, CURVES):
        if point.get(column):
            curves[column][int(point["seed"])][int(point["round"])] = float(point[column])
    rate = float(line["learning_rate"]) if line["learning_rate"] else None
    test, val, ridge = map(by_seed, ("test_percent", "val_percent", "ridge_test_percent"))
    states = {int(run["seed"]): run["state"] for run in runs}
    return MeasuredArm(line["arm"], settings, rate, line["edge"] == "True", test, val, ridge, states, curves)


def _lines(path: Path, *columns: str) -> dict[tuple[str, str], list[Line]]:
    """Return the lines of a CSV file by group and arm."""
    by_arm: dict[tuple[str, str], list[Line]] = defaultdict(list)
    with _reading(path), open(path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            missing = [column for column in ("group", "arm", *columns) if line.get(column) is None]
            if missing or None in line:
                raise ValueError(f"expected {', '.join(missing) or 'no more cells than columns'}")
            line |= {name: plain_words(line[name]) for name in ("group", "arm")}
            by_arm[line["group"], line["arm"]].append(line)
    return by_arm


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"Cannot read {path} ({error!r}): expected the results of a study. Write them again with fl-taskarith "
            "study ... --tables."
        ) from error
