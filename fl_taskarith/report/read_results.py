"""The results of studies, arm by arm: settings, and accuracies by seed. Nothing is computed here."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_taskarith.config.fields import rules, snake
from fl_taskarith.config.rule import Scalar, shown
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS, Config
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.statistics import Correct, run_key
from fl_taskarith.storage.correctness import CORRECT, HEAD_CORRECT, correct_images
from fl_taskarith.storage.record_files import COUNT, SCALAR, Within, conforming, read_csv, read_json, unreadable
from fl_taskarith.study.shipped import line_is_shipped

Line = Mapping[str, Any]
Lines = Sequence[Line]
Key = Any  # `statistics.run_key`: int | tuple[int, int]
BySeed = Mapping[Key, float]
Curves = Mapping[Key, Mapping[int, float]]  # by seed, then by round
CURVES = ("val_percent", "test_percent", "uplink_megabytes")  # columns of curves.csv that are read
log = logging.getLogger("fl_taskarith")

REMEDY = "Write the results of the study again with fl-taskarith study ... --tables."
SEED, PERCENT = Within(int, 0, 2**53), (Within(float, 0, 100), None)
SEARCH = {
    "rates": [Within(float, 0)],
    "rounds": [COUNT],
    "keep": COUNT,
    "seed?": SEED,
    "seeds?": [SEED],
    "by?": str,
    "bracket?": bool,
    "last_seeds?": [SEED],
    "also?": {str: [SCALAR]},
}
SETTINGS_JSON = {
    "seeds?": [SEED],
    "shard_seeds?": [SEED],
    "primary?": [{"group": str, "arm": str, "against_group": str, "against": str}],
    "machines?": [str],
    "search?": (SEARCH, None),
    "arms": [{"group": str, "arm": str, "settings": {str: SCALAR}, "search?": (SEARCH, None)}],
}
_PLACE = {"group": str, "arm": str}
TABLE_CSV = {
    **_PLACE,
    "learning_rate": (Within(float, 0), None),
    "edge": (bool, None),
    "n": (COUNT, None),
    **dict.fromkeys(("mask_rule", "strategy", "sharding"), (str, None)),
    "num_rounds": (COUNT, None),
} | dict.fromkeys(("test_percent", "val_percent", "ridge_test_percent"), PERCENT)
_SEEDS = {"seed": SEED, "shard_seed": (SEED, None)}  # without a seed of their own shards have the run's
RUNS_CSV = {**_PLACE, **_SEEDS, "state": str, "seconds": (Within(float, 0), None)} | dict.fromkeys(
    ("test_percent", "val_percent", "ridge_test_percent"), PERCENT
)
CORRECT_CSV = {**_PLACE, **_SEEDS, "images": COUNT, CORRECT: str, HEAD_CORRECT: str}
CURVES_CSV = {**_PLACE, **_SEEDS, "round": COUNT, "val_percent": PERCENT, "test_percent": PERCENT} | {
    "uplink_megabytes": (Within(float, 0), None)
}
DEFAULTS = {key: value for key, value in Config().to_run_config().items() if key not in OPERATIONAL_KEYS | CHOSEN_KEYS}


@dataclass(frozen=True, eq=False)
class MeasuredArm:
    """One arm of one study.

    Attributes:
        settings: all of them, in kebab-case.
        rate: learning rate; None if its search is not over. edge: whether it is an end of its grid, so not tuned.
        test, val, ridge: accuracy in percent by seed: last round on test and validation, ridge head before training.
        states: of every run by seed ("done", "diverged", ...).
        curves: by column of curves.csv: accuracy in percent, megabytes (10⁶ bytes) that clients sent since round 0.
        group: of the study's tables, in which it stands.
        correct, head_correct: where correct.csv has them, which test images each run and its solved head have right.

    What is "by seed" is so by `statistics.run_key`.
    """

    label: str
    settings: Mapping[str, Scalar]
    rate: float | None = None
    edge: bool = False
    test: BySeed = field(default_factory=dict)
    val: BySeed = field(default_factory=dict)
    ridge: BySeed = field(default_factory=dict)
    states: Mapping[Key, str] = field(default_factory=dict)
    curves: Mapping[str, Curves] = field(default_factory=dict)
    correct: Correct[Key] = field(default_factory=dict)
    head_correct: Correct[Key] = field(default_factory=dict)
    group: str = ""

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
    def below_the_head(self) -> list[Key]:
        """Which of its runs ended less accurate on test than the head they began with."""
        return [key for key, value in self.test.items() if key in self.ridge and value < self.ridge[key]]

    @property
    def ended_early(self) -> list[str]:
        """How runs ended that did not finish."""
        return sorted({state for state in self.states.values() if state in ("diverged", "failed")})


class FinishedRun(NamedTuple):
    """A run with a result; the same arm in a second table has the same runs."""

    seed: int
    test_percent: float
    seconds: float
    shipped: bool


class StudyFolder(NamedTuple):
    """The folder of a study; `record` is its settings.json, `primary` the contrasts that were named beforehand."""

    name: str
    folder: Path
    arms: tuple[MeasuredArm, ...]
    finished: frozenset[FinishedRun]
    record: Mapping[str, Any]
    primary: tuple[tuple[MeasuredArm, MeasuredArm], ...] = ()


def read_studies(root: Path) -> list[StudyFolder]:
    """Read the studies in `root`, and `root` itself if it is one: every folder with a table.csv, in order of name.

    Raises:
        CheckpointError: there is none, or a file is missing or damaged; names it.
    """
    try:
        folders = [folder for folder in (root, *sorted(root.iterdir())) if (folder / "table.csv").is_file()]
    except OSError as error:
        raise unreadable(root, error, "Expected the folder of a study's results.") from error
    if not folders:
        raise CheckpointError(
            f"{root} holds no results of a study: expected table.csv in it or in folders in it. Run fl-taskarith "
            "study, or give the folder that it wrote."
        )
    return [read_study(folder) for folder in folders]


def read_study(folder: Path) -> StudyFolder:
    """Read the table.csv, runs.csv and settings.json of one study and, where it is there, its curves.csv.

    Raises:
        CheckpointError: a file is missing or damaged, or two of them do not agree; names it.
    """
    record = {"seeds": [], "machines": []} | read_json(folder / "settings.json", SETTINGS_JSON, REMEDY)
    settings = {(arm["group"], arm["arm"]): _settings(folder, arm["settings"]) for arm in record["arms"]}
    runs = _by_arm(read_csv(folder / "runs.csv", RUNS_CSV, REMEDY))
    points = _by_arm(read_csv(folder / "curves.csv", CURVES_CSV, REMEDY, optional=True))
    correct = _by_arm(read_csv(folder / "correct.csv", CORRECT_CSV, REMEDY, optional=True))
    table = _by_arm(read_csv(folder / "table.csv", TABLE_CSV, REMEDY, filled=True))
    for place, lines in table.items():
        _check_agreement(folder, place, lines, runs[place], place in settings)
        _check_origin(folder, place, lines[0], settings[place])
    _tell_other_curves(folder, table, runs, points)
    arms = {
        place: _arm(lines[0], settings[place], runs[place], points[place], correct[place])
        for place, lines in table.items()
    }
    finished = frozenset(
        FinishedRun(run["seed"], run["test_percent"], run["seconds"] or 0.0, line_is_shipped(run))
        for run in itertools.chain(*runs.values()) if run["test_percent"] is not None
    )  # fmt: skip
    named = [((each["group"], each["arm"]), (each["against_group"], each["against"]))
             for each in record.get("primary", ())]  # fmt: skip
    if lost := [place for pair in named for place in pair if place not in arms]:
        raise CheckpointError(
            f"{folder / 'settings.json'} has a primary contrast of {shown(lost[0][1])}, an arm that table.csv does not "
            f"have. {REMEDY}"
        )
    primary = tuple((arms[arm], arms[against]) for arm, against in named)
    return StudyFolder(folder.resolve().name, folder, tuple(arms.values()), finished, record, primary)


def _settings(folder: Path, recorded: Mapping[str, Any]) -> Mapping[str, Scalar]:
    """Return an arm's settings; one that the study's version did not have was at its default.

    Raises:
        CheckpointError: a number is not accepted, or something else stands in its place.
    """
    numbers = {key: rule for key, rule in rules().items() if key in recorded and rule.kind is not str}
    try:
        known = {key: rule.check(key, recorded[key]) for key, rule in numbers.items()}
        words = {key: rule.kind for key, rule in rules().items() if key not in numbers}
        conforming(recorded, {f"{key}?": kind for key, kind in words.items()})
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{folder / 'settings.json'} is damaged: {str(error).rstrip('.')}. {REMEDY}") from error
    return {**DEFAULTS, **recorded, **known}


def _check_agreement(folder: Path, place: tuple[str, str], table: Lines, runs: Lines, has_settings: bool) -> None:
    """Check that table.csv has an arm once, and the means of its runs; warn where runs.csv has fewer runs."""
    finished, counted = sum(run["test_percent"] is not None for run in runs), table[0]["n"]
    problem = "" if has_settings else "settings.json does not have it"
    if len(table) > 1 or len({_key(run) for run in runs}) < len(runs):
        problem = "a line of it, or of a seed of it, is there twice"
    if counted is not None and counted != finished:
        log.warning(
            "%s: at the arm %s, table.csv counts %d finished runs, and runs.csv has %d, which the report is made of.",
            folder, shown(place[1]), counted, finished,
        )  # fmt: skip
    for column in () if counted != finished else ("test_percent", "val_percent", "ridge_test_percent"):
        values, mean = [run[column] for run in runs if run[column] is not None], table[0][column]
        if mean is not None and not (values and isclose(fmean(values), mean, abs_tol=1e-6)):
            problem = problem or f"{column} in table.csv is not the mean of its runs in runs.csv"
    if problem:
        raise CheckpointError(f"The results in {folder} are damaged, at the arm {shown(place[1])}: {problem}. {REMEDY}")


def _check_origin(folder: Path, place: tuple[str, str], line: Line, settings: Mapping[str, Scalar]) -> None:
    """Check that settings.json is of the runs in the table: not of another study, or of before."""
    told = {key: line[snake(key)] for key in ("mask-rule", "strategy", "sharding", "num-rounds")}
    other = [key for key, value in told.items() if value is not None and value != settings[key]]
    problem = f"settings.json has another {other[0]} than table.csv" if other else ""
    if problem:
        raise CheckpointError(f"The results in {folder} are mixed, at the arm {shown(place[1])}: {problem}. {REMEDY}")


def _tell_other_curves(folder: Path, *tables: Mapping[tuple[str, str], Lines]) -> None:
    """Warn where curves.csv has an arm that table.csv lacks, or does not end at the accuracies in runs.csv."""
    table, runs, points = tables
    for place, lines in points.items():
        ends = {_key(point): point["test_percent"] for point in sorted(lines, key=lambda point: point["round"])
                if point["test_percent"] is not None}  # fmt: skip
        known = {_key(run): run["test_percent"] for run in runs.get(place, ())}
        pairs = [(end, known[seed]) for seed, end in ends.items() if known.get(seed) is not None]
        if place not in table or not all(isclose(end, value, abs_tol=1e-6) for end, value in pairs):
            log.warning(
                "%s: curves.csv is not of the runs in the tables, as at the arm %s, and may show others. Make it again "
                "with fl-taskarith study --tables, or move it away.", folder, shown(place[1]),
            )  # fmt: skip
            return


def _key(line: Line) -> int | tuple[int, int]:
    return run_key(line["seed"], line["seed"] if line["shard_seed"] is None else line["shard_seed"])


def _correct(lines: Lines, kind: str) -> dict[Key, NDArray[np.float64]]:
    records = {_key(line): {"data": {"test": line["images"]}, kind: line[kind].split()} for line in lines if line[kind]}
    images = {key: correct_images(record, kind) for key, record in records.items()}
    return {key: each for key, each in images.items() if each is not None}


def _arm(line: Line, settings: Mapping[str, Scalar], runs: Lines, points: Lines, correct: Lines) -> MeasuredArm:
    def by_seed(column: str) -> dict[Key, float]:
        return {_key(run): float(run[column]) for run in runs if run[column] is not None}

    curves: dict[str, dict[Key, dict[int, float]]] = {column: defaultdict(dict) for column in CURVES}
    for point, column in itertools.product(points, CURVES):
        if point[column] is not None:
            curves[column][_key(point)][point["round"]] = float(point[column])
    test, val, ridge = map(by_seed, ("test_percent", "val_percent", "ridge_test_percent"))
    states = {_key(run): run["state"] for run in runs}
    rate = None if line["learning_rate"] is None else float(line["learning_rate"])
    right, head_right = (_correct(correct, kind) for kind in (CORRECT, HEAD_CORRECT))
    return MeasuredArm(
        line["arm"], settings, rate, bool(line["edge"]), test, val, ridge, states, curves, right, head_right,
        line["group"],
    )  # fmt: skip


def _by_arm(lines: Lines | None) -> dict[tuple[str, str], list[Line]]:
    """Return the lines of a table by group and arm."""
    by_arm: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines or ():
        by_arm[line["group"], line["arm"]].append(line)
    return by_arm
