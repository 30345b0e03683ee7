"""Any set of run folders, put together by settings: runs that differ in nothing but their seeds are one member."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import IDENTITY_KEYS, from_mapping
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.statistics import Summary, summarise
from fl_taskarith.storage.run_folder import Row, read_rounds
from fl_taskarith.storage.verified_files import CHECKSUMS, check_unchanged

Settings = dict[str, Scalar]

SEED_KEYS = ("seed", "shard-seed")
FOLLOWING_KEYS = ("learning-rate", "num-rounds", "evaluate-every", "threads", "device")
"""What is chosen for each setting of interest, and so tells members apart only where nothing else does."""
SHARDING_WORDS = {"iid": "iid", "classes": "Nc = {classes-per-client}", "dirichlet": "Dir({dirichlet-alpha})"}
WORDS = {
    "local-steps": "J = {}",
    "num-clients": "K = {}",
    "participation": "C = {}",
    "calibration-rounds": "R = {}",
    "density": "density {}",
    "strategy": "{}",
    "dataset": "{}",
    "model": "{}",
    "schedule": "{}",
    "learning-rate": "lr {}",
}
DETAILS = {
    "sharding": ("classes-per-client", "dirichlet-alpha"),
    "mask-rule": ("density", "calibration-rounds", "soft-zero"),
}
"""Settings that say nothing where the first one makes them idle."""


@dataclass(frozen=True)
class Member:
    """Runs that are equal but for the seed.

    Attributes:
        label: what tells it from the other members of its set, in words.
        settings: of its first run.
        runs: the rows of rounds.csv of each.
    """

    label: str
    settings: Settings
    runs: tuple[tuple[Row, ...], ...]

    def over_runs(self, measure: Callable[[Sequence[Row]], float | None]) -> Summary:
        """Mean and sample standard deviation of a number of each run, where it has one."""
        values = [value for rows in self.runs if (value := measure(rows)) is not None]
        return summarise(values)

    def curve(self, column: str, scale: float = 1.0) -> list[tuple[int, Summary]]:
        """(round, summary over the runs) of the rounds in which every run has a value."""
        tables = [{row["round"]: row[column] for row in rows if row.get(column) is not None} for rows in self.runs]
        shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
        return [(number, summarise([scale * table[number] for table in tables])) for number in shared]


def last_percent(column: str) -> Callable[[Sequence[Row]], float | None]:
    """A share in a run's last round, in percent."""

    def measure(rows: Sequence[Row]) -> float | None:
        value = rows[-1].get(column) if rows else None
        return None if value is None else 100 * float(value)

    return measure


last_test_accuracy = last_percent("test_accuracy")
last_validation_accuracy = last_percent("val_accuracy")


def mean_of(column: str) -> Callable[[Sequence[Row]], float | None]:
    """The mean of a column over a run's training rounds."""

    def measure(rows: Sequence[Row]) -> float | None:
        values = [row[column] for row in rows if row["round"] > 0 and row.get(column) is not None]
        return fmean(values) if values else None

    return measure


def sharding_words(settings: Settings) -> str:
    """For example "iid" or "Nc = 2"."""
    return SHARDING_WORDS[str(settings["sharding"])].format(**settings)


def mask_words(settings: Settings) -> str:
    """For example "all weights" or "random, density 0.1"."""
    rule = settings["mask-rule"]
    return "all weights" if rule == "none" else f"{rule}, density {settings['density']:g}"


def mean_local_steps(settings: Settings) -> float:
    """J, or the mean of what clients draw for themselves."""
    low, high = settings["local-steps-min"], settings["local-steps-max"]
    return (float(low) + float(high)) / 2 if high else float(settings["local-steps"])


def training_loss(folder: Path) -> str:
    """What the clients of a run minimise; cross-entropy where run.json cannot be read."""
    try:
        return str(_settings(folder)["local-loss"])
    except CheckpointError:
        return "cross-entropy"


def has_regression_data(folder: Path) -> bool:
    """Whether the run in `folder` is on regression data, which has distances to the truth and no accuracy."""
    return _settings(folder)["dataset"] == REGRESSION


def in_words(folder: Path) -> str:
    """A run's main settings; empty for a run that was given a name, or whose run.json cannot be read."""
    try:
        settings = _settings(folder)
    except CheckpointError:
        return ""
    if settings["run-name"]:
        return ""
    words = [str(settings["dataset"]), str(settings["strategy"])]
    if settings["dataset"] == REGRESSION:
        for key, letter in (("num-clusters", "K"), ("num-clients", "m"), ("examples-per-client", "n")):
            words.append(f"{letter} = {settings[key]}")
    elif settings["strategy"] != "centralized":
        drawn = f"J = {settings['local-steps-min']} to {settings['local-steps-max']}"
        steps = drawn if settings["local-steps-max"] else f"J = {settings['local-steps']}"
        words += [sharding_words(settings), steps]
    return ", ".join([*words, f"seed {settings['seed']}"])


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders` and, of those that are none, the finished ones below them.

    Raises:
        CheckpointError: a folder neither is a run nor holds any.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / "rounds.csv").exists():
            found.append(folder)
            continue
        below = sorted(path.parent for path in folder.rglob("rounds.csv") if _is_finished(path.parent))
        if not below:
            raise CheckpointError(f"{folder} is no folder of a run (it has no rounds.csv) and holds no finished run.")
        found += below
    return list({folder.resolve(): folder for folder in found}.values())


def members(folders: Sequence[Path], labels: Sequence[str] | None = None) -> list[Member]:
    """The members of a set of run folders, in the order in which they first appear.

    A seed that was run twice counts once.

    Args:
        labels: of each folder, where the caller knows better; else the settings that differ.

    Raises:
        CheckpointError: a folder's files cannot be read.
    """
    groups: dict[str, dict[tuple[Scalar, ...], tuple[Settings, tuple[Row, ...], str]]] = {}
    for index, folder in enumerate(folders):
        settings = _settings(folder)
        decisive = {key: value for key, value in settings.items() if key in IDENTITY_KEYS and key not in SEED_KEYS}
        key = json.dumps(decisive, sort_keys=True) if labels is None else labels[index]
        seeds = tuple(settings[each] for each in SEED_KEYS)
        groups.setdefault(key, {}).setdefault(seeds, (settings, tuple(read_rounds(folder)), folder.resolve().name))
    first = [next(iter(group.values())) for group in groups.values()]
    settings_of = [settings for settings, _, _ in first]
    words = list(groups) if labels is not None else _labels(settings_of, [name for _, _, name in first])
    return [
        Member(label, settings, tuple(rows for _, rows, _ in group.values()))
        for label, settings, group in zip(words, settings_of, groups.values(), strict=True)
    ]


def _labels(settings: Sequence[Settings], names: Sequence[str]) -> list[str]:
    """The settings that differ, in words; the folders' names where that does not tell all apart."""
    keys = [key for key in settings[0] if key in IDENTITY_KEYS and key not in SEED_KEYS]
    differing = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
    telling = [key for key in differing if key not in FOLLOWING_KEYS] or differing
    words = [", ".join(_words(each, telling)) for each in settings]
    return words if len(set(words)) == len(words) and all(words) else list(names)


def _words(settings: Settings, telling: Sequence[str]) -> Iterator[str]:
    idle = set(DETAILS["sharding"])  # said with the sharding
    if settings["mask-rule"] == "none":
        idle |= set(DETAILS["mask-rule"])
    if set(DETAILS["sharding"]) & set(telling) or "sharding" in telling:
        yield sharding_words(settings)
    for key in telling:
        if key == "mask-rule":
            yield "all weights" if settings[key] == "none" else str(settings[key])
        elif key != "sharding" and key not in idle:
            yield WORDS.get(key, key + " = {}").format(settings[key])


def _settings(folder: Path) -> Settings:
    path = folder / "run.json"
    try:
        content = path.read_bytes()
        check_unchanged(path, content)
        return from_mapping(json.loads(content)["config"]).to_run_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"Cannot read the settings of the run in {folder} ({error}): expected run.json."
        ) from error


def _is_finished(folder: Path) -> bool:
    if (folder / CHECKSUMS).exists():
        return True  # whatever run.json says: should it be damaged, its reader will say so
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False
