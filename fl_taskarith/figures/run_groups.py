"""Any set of runs, grouped by settings: runs that differ in nothing but their seeds are one member."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas

from fl_taskarith.config.settings import IDENTITY_KEYS, from_mapping
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.setting_words import SEED_KEYS, Settings, labels, run_words
from fl_taskarith.figures.statistics import Summary, summarise
from fl_taskarith.storage.packed_runs import packed_folders, packed_run
from fl_taskarith.storage.run_folder import COLUMNS, Row, read_rounds
from fl_taskarith.storage.run_record import RECORD, is_finished, read_record
from fl_taskarith.storage.verified_files import CHECKSUMS

NAMED = 5  # folders in a warning

log = logging.getLogger("fl_taskarith")


@dataclass(frozen=True)
class RunRecord:
    """The rows of rounds.csv of the run in `folder`; its settings are read when they are asked for.

    packed: run.json of a run that a pack holds in place of the folder.
    """

    folder: Path
    rows: tuple[Row, ...]
    packed: Mapping[str, Any] | None = None

    @cached_property
    def record(self) -> Mapping[str, Any] | None:
        """What run.json holds; None if there is none.

        Raises:
            CheckpointError: run.json cannot be read.
        """
        return read_record(self.folder) if self.packed is None else self.packed

    @cached_property
    def settings(self) -> Settings:
        """The run's settings from run.json, all keys of this version.

        Raises:
            CheckpointError: run.json cannot be read.
        """
        try:
            if self.record is None:
                raise ConfigError("there is no run.json")
            return from_mapping(self.record["config"]).to_run_config()
        except ConfigError as error:
            raise CheckpointError(
                f"Cannot read the settings of the run in {self.folder} ({error}): expected a run.json of this version."
            ) from error

    @property
    def title(self) -> str:
        """The run's main settings; the folder's name for a run with a name, or where run.json cannot be read."""
        name = self.folder.resolve().name
        try:
            return run_words(self.settings) or name
        except CheckpointError:
            return name

    @property
    def training_loss(self) -> str:
        """The loss that clients minimise; cross-entropy where run.json cannot be read."""
        try:
            return str(self.settings["local-loss"])
        except CheckpointError:
            return "cross-entropy"


def read_run(folder: Path) -> RunRecord:
    """Read the run in `folder`, or what a pack holds in its place.

    Raises:
        CheckpointError: it holds no readable rounds.csv.
    """
    if not (folder / "rounds.csv").exists() and (packed := packed_run(folder)) is not None:
        return RunRecord(folder, packed.rows, packed.record)
    return RunRecord(folder, tuple(read_rounds(folder)))


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the run folders among `folders` and the finished ones below the others, in packs or not, each once.

    Raises:
        CheckpointError: a folder neither is a run nor holds any, or a rounds.csv or a pack cannot be read.
    """
    found: list[Path] = []
    for folder in folders:
        alone = (folder / "rounds.csv").exists() or packed_run(folder) is not None
        below = [folder] if alone else [*_finished_below(folder), *packed_folders(folder)]
        if not below:
            raise CheckpointError(f"{folder} is no folder of a run (it has no rounds.csv) and holds no finished run.")
        found += below
    return [read_run(folder) for folder in {folder.resolve(): folder for folder in found}.values()]


def _finished_below(folder: Path) -> Iterator[Path]:
    """Yield the folders of finished runs below `folder`; what they lack or is damaged in them, their reader will say.

    Runs that are not finished are left out, and named in a warning.
    """
    left_out = []
    for path in sorted({path.parent for name in (RECORD, "rounds.csv", CHECKSUMS) for path in folder.rglob(name)}):
        has_table = (path / "rounds.csv").exists()
        try:
            finished = (path / CHECKSUMS).exists() or is_finished(read_record(path))
        except CheckpointError:
            if has_table:
                raise
            continue  # a run.json of another program
        if finished:
            yield path
        else:
            left_out.append(str(path))
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        log.warning("Left out, for they are not finished: %s%s.", ", ".join(left_out[:NAMED]), more)


@dataclass(frozen=True)
class Member:
    """Runs that are equal but for the seed: their rows of rounds.csv, and run.json of each.

    label: what tells it from the other members of its set, in words. settings: of its first run. divisions: shard seeds
    of runs that share them and differ in the seed of training; 0 where every run has a seed of its own.
    """

    label: str
    settings: Settings
    runs: tuple[tuple[Row, ...], ...]
    records: tuple[Mapping[str, Any], ...] = ()
    divisions: int = 0

    @cached_property
    def rounds(self) -> pandas.DataFrame:
        """All rows, one frame: `run` counts the runs, `sent_megabytes` (10⁶) sums both ways since round 0."""
        rows = [{"run": run, **row} for run, table in enumerate(self.runs) for row in table]
        frame = pandas.DataFrame(rows, columns=["run", *COLUMNS]).astype(float)
        both = frame["uplink_bytes"].fillna(0) + frame["downlink_bytes"].fillna(0)
        return frame.assign(sent_megabytes=both.groupby(frame["run"]).cumsum() / 1e6)

    def last_percent(self) -> Summary:
        """Summarise the test accuracy in the last round of each run that has it, in percent."""
        return summarise((100 * self.rounds.groupby("run").tail(1)["test_accuracy"].dropna()).tolist())

    def mean_of(self, column: str) -> Summary:
        """Summarise the runs' means of a column over their training rounds."""
        trained = self.rounds[self.rounds["round"] > 0]
        return summarise(trained.groupby("run")[column].mean().dropna().tolist())

    def curve(self, column: str, scale: float = 1.0) -> dict[int, Summary]:
        """Summarise a column over the runs, by round, for the rounds in which every run has a value."""
        wide = scale * self.rounds.pivot(index="round", columns="run", values=column).dropna()
        return {int(number): summarise(values) for number, values in zip(wide.index, wide.to_numpy(), strict=True)}


def members(runs: Sequence[RunRecord], names: Sequence[str] | None = None) -> list[Member]:
    """Group runs, in the order in which members first appear. A seed that was run twice counts once.

    Args:
        names: the label of each run's member, where the caller knows better; else the settings that differ.

    Raises:
        CheckpointError: a run's settings cannot be read.
    """
    groups: dict[str, dict[tuple[int, ...], RunRecord]] = {}
    for place, run in enumerate(runs):
        decisive = {key: value for key, value in run.settings.items() if key in IDENTITY_KEYS and key not in SEED_KEYS}
        key = json.dumps(decisive, sort_keys=True) if names is None else names[place]
        groups.setdefault(key, {}).setdefault(tuple(int(run.settings[each]) for each in SEED_KEYS), run)
    first = [next(iter(group.values())) for group in groups.values()]
    settings = [run.settings for run in first]
    words = list(groups) if names is not None else labels(settings, [run.folder.resolve().name for run in first])
    return [_member(*each) for each in zip(words, settings, groups.values(), strict=True)]


def _member(label: str, settings: Settings, runs: Mapping[tuple[int, ...], RunRecord]) -> Member:
    """Return the member of the runs by (seed, shard seed)."""
    rows, records = tuple(run.rows for run in runs.values()), tuple(run.record or {} for run in runs.values())
    seeds, shards = (len(set(each)) for each in zip(*runs, strict=True))
    return Member(label, settings, rows, records, divisions=shards if seeds < len(runs) else 0)
