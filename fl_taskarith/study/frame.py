"""The results of a study, read once: its arms, a frame of its final runs and a frame of their evaluated rounds.

Tables, figures, footnote and records are made of these alone. Accuracies are in percent, megabytes are 10⁶ bytes.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray

from fl_taskarith.config.fields import snake
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS, RECORDED_DEFAULTS, Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.figures.statistics import run_key, seeds_of
from fl_taskarith.storage.correctness import KINDS, correct_images
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.results import Outcome, State, StudyResults
from fl_taskarith.study.search import Choice

Key = int | tuple[int, int]  # `statistics.run_key`

RUN_COLUMNS = (
    "title", "group", "arm", "run", "seed", "learning_rate", "state", "ridge_test_percent", "test_percent",
    "val_percent", "task_vector_norm", "uplink_megabytes", "seconds", "round_seconds", "images_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class ArmResults:
    """One arm over its seeds.

    Attributes:
        choice: the learning rate, None while the search is not over.
        settings: of its runs, seed and learning rate apart.
        outcomes: of the final runs by `statistics.run_key`; empty while the rate is not known.
        problem: why nothing can be said of the arm, in words.
        correct, head_correct: of the runs that noted it, which test images they have right, and their head before.
    """

    arm: Arm
    choice: Choice | None
    settings: Mapping[str, Scalar]
    outcomes: Mapping[Key, Outcome]
    problem: str
    correct: Mapping[Key, NDArray[np.float64]]
    head_correct: Mapping[Key, NDArray[np.float64]]

    @property
    def density(self) -> float | None:
        """Share of the maskable weights that are updated: measured in its runs, else as set; None without a mask."""
        if self.settings.get("mask-rule", "none") == "none":
            return None
        records = [outcome.record for outcome in self.outcomes.values() if outcome.record]
        measured = [record["mask"]["density"] for record in records if "density" in record.get("mask", {})]
        return float(fmean(measured) if measured else self.settings["density"])

    @property
    def causes(self) -> dict[Key, str]:
        """Why runs ended badly, by seed."""
        bad = (State.DIVERGED, State.FAILED, State.UNUSABLE)
        return {seed: f"{each.state}: {each.cause}" for seed, each in self.outcomes.items() if each.state in bad}

    @property
    def stops(self) -> dict[Key, int]:
        """The round after which a run stopped early, by seed."""
        records = {seed: each.record or {} for seed, each in self.outcomes.items()}
        return {seed: record["stopped_early"]["round"] for seed, record in records.items() if "stopped_early" in record}

    @property
    def portable(self) -> dict[str, Scalar]:
        """The settings that decide the arm's numbers, without the rate and without a path of this machine."""
        decisive = {key: self.settings[key] for key in self.settings if key not in OPERATIONAL_KEYS | CHOSEN_KEYS}
        files = {key: Path(str(decisive[key])).name for key in ("weights", "mask-file") if decisive.get(key)}
        return decisive | files


@dataclass(frozen=True)
class StudyFrame:
    """What is known of a study.

    Attributes:
        arms: in the study's order.
        runs: `RUN_COLUMNS`, and the settings in which arms differ; `title` is the arm's; None for what is not known.
        rounds: group, arm, seeds, round, megabytes since round 0, losses and accuracies of the evaluated rounds.
        other_seconds: seconds of the finished trials of searches that are no final runs.
    """

    study: Study
    arms: tuple[ArmResults, ...]
    runs: pandas.DataFrame
    rounds: pandas.DataFrame
    other_seconds: tuple[float, ...]

    @property
    def done(self) -> pandas.DataFrame:
        """The finished final runs, each once, though an arm may stand in two tables."""
        return self.runs[self.runs["state"] == "done"].drop_duplicates("run")

    @property
    def machines(self) -> list[str]:
        """The machines of the runs, each once."""
        outcomes = [outcome for arm in self.arms for outcome in arm.outcomes.values()]
        return list(dict.fromkeys(machine(outcome.record) for outcome in outcomes if outcome.record))

    def by_seed(self, arm: Arm, column: str) -> dict[Key, float]:
        """Return a column of the arm's runs by `statistics.run_key`, for the runs that have a value."""
        own = self.runs[self.runs["title"] == arm.title].dropna(subset=[column])
        shards = own["shard_seed"] if "shard_seed" in own else own["seed"]
        return dict(zip(map(run_key, own["seed"], shards), own[column].tolist(), strict=True))


def read_frame(results: StudyResults) -> StudyFrame:
    """Read all that the study's folder holds; a damaged folder becomes its arm's problem."""
    study = results.study
    arms = tuple(_read_arm(results, arm) for arm in study.arms)
    runs = [_run_record(study, each, key) for each in arms for key in each.outcomes]
    rounds = [record for each in arms for key in each.outcomes for record in _round_records(study, each, key)]
    final = {record["run"] for record in runs if record["state"] == "done"}
    trials = {each.name: each for arm in study.arms for each in _trials(results, arm)}
    others = tuple(each.seconds for name, each in trials.items() if each.state is State.DONE and name not in final)
    columns = list(runs[0]) if runs else list(RUN_COLUMNS)
    return StudyFrame(
        study,
        arms,
        pandas.DataFrame(runs, columns=columns, dtype=object),
        pandas.DataFrame(rounds, dtype=object),
        others,
    )


def varied_settings(study: Study, arm: ArmResults) -> dict[str, object]:
    """Return the settings of an arm in which those of the study differ, as columns; the density has its own.

    Those that are searched are as chosen, and None before.
    """
    search = study.searched(arm.arm)
    open_keys = dict.fromkeys(key for key, _ in search.also) if search is not None else {}
    chosen = dict(arm.choice.also) if arm.choice is not None else {}
    values = Config().to_run_config() | dict(arm.arm.settings) | open_keys | chosen
    return {snake(key): values[key] for key in study.varied if key not in ("density", "learning-rate")}


def seed_columns(study: Study, key: Key) -> dict[str, int]:
    """Return the seed of a run and, where it is another, that of its shards, as columns."""
    shards, seed = seeds_of(key)
    return {"seed": seed} | ({"shard_seed": shards} if study.shard_seeds else {})


def machine(record: Mapping[str, Any]) -> str:
    """Return processor or GPU and threads, from a run.json."""
    described = record.get("machine")
    processor = described.get("processor") if isinstance(described, dict) else None
    device = record.get("device", "unknown device")
    where = str(processor or "unknown processor") if device == "cpu" else f"{device} ({processor})"
    return f"{where}, {record.get('threads', '?')} CPU threads per run"


def speed(outcome: Outcome) -> tuple[float, float]:
    """Return seconds per round and training images per second of a finished run: medians over its rounds from 1 on.

    Seconds are those of clients and server, without evaluation. Images are NaN where rounds.csv does not tell their
    number: clients take unequal numbers of steps, or have fewer examples than a batch. Both are NaN without a round.
    """
    rounds = [row for row in outcome.rows if row["round"] and row.get("train_seconds")]
    seconds = [row["train_seconds"] + (row.get("overhead_seconds") or 0.0) for row in rounds]
    if not seconds or outcome.record is None:
        return nan, nan
    images = [_images(outcome.record, row) / spent for row, spent in zip(rounds, seconds, strict=True)]
    return median(seconds), median(images)


def _images(record: Mapping[str, Any], row: Row) -> float:
    config, shards = RECORDED_DEFAULTS | record["config"], record.get("shards", {"smallest": 0})
    if config["strategy"] == "centralized":
        return float(record.get("data", {}).get("train", nan))  # a round is an epoch
    if config["local-steps-max"] or shards["smallest"] < config["batch-size"] or row.get("clients") is None:
        return nan
    return float(row["clients"] * config["local-steps"] * config["batch-size"])


def _read_arm(results: StudyResults, arm: Arm) -> ArmResults:
    settings = results.study.config(arm, None, None, results.study.seeds[0], results.runs).to_run_config()
    choice: Choice | None = None
    outcomes: dict[Key, Outcome] = {}
    correct: tuple[dict[Key, NDArray[np.float64]], ...] = ({}, {})
    problem = ""
    try:
        choice = results.choice(arm)
        runs: list[Config] = [] if choice is None else results.final_runs(arm, choice)
        settings |= {} if choice is None else dict(choice.also)
        found = {run_key(run.seed, run.shard_seed): results.outcome(run) for run in runs}
        correct = tuple(_correct(found, kind) for kind in KINDS)
        outcomes = found
    except FlTaskarithError as error:  # one damaged folder must not keep the rest out of the table
        problem = f"failed: {error}"
    return ArmResults(arm, choice, settings, outcomes, problem, *correct)


def _correct(outcomes: Mapping[Key, Outcome], kind: str) -> dict[Key, NDArray[np.float64]]:
    records = {key: outcome.record for key, outcome in outcomes.items() if outcome.record is not None}
    images = {key: correct_images(record, kind) for key, record in records.items()}
    return {key: each for key, each in images.items() if each is not None}


def _trials(results: StudyResults, arm: Arm) -> list[Outcome]:
    try:
        return list(itertools.chain.from_iterable(results.trials(arm).values()))
    except FlTaskarithError:  # the arm's problem
        return []


def _run_record(study: Study, arm: ArmResults, key: Key) -> dict[str, object]:
    outcome = arm.outcomes[key]
    rows = list(outcome.rows) or [{}]
    times: tuple[float | None, ...] = (None, None, None)
    if outcome.state is State.DONE:
        times = (outcome.seconds, *(None if isnan(value) else value for value in speed(outcome)))
    return {
        "title": arm.arm.title,
        "group": arm.arm.group,
        "arm": arm.arm.label,
        **varied_settings(study, arm),
        "run": outcome.name,
        **seed_columns(study, key),
        "learning_rate": None if arm.choice is None else arm.choice.rate,
        "state": str(outcome.state),
        "ridge_test_percent": _percent(rows[0], "test") if arm.settings["head"] != "linear" else None,
        "test_percent": _percent(rows[-1], "test"),
        "val_percent": _percent(rows[-1], "val"),
        "task_vector_norm": rows[-1].get("task_vector_norm"),
        "uplink_megabytes": _uplink(outcome.rows),
        **dict(zip(("seconds", "round_seconds", "images_per_second"), times, strict=True)),
    }


def _percent(row: Row, split: str) -> float | None:
    value = row.get(f"{split}_accuracy")
    return None if value is None else 100 * float(value)


def _uplink(rows: tuple[Row, ...]) -> float | None:
    """Return the mean over the training rounds, all clients; None without one, as at a learning rate of 0."""
    trained = [row for row in rows if row["round"] > 0 and row.get("learning_rate") != 0.0]
    sent = [row["uplink_bytes"] for row in trained if row.get("uplink_bytes") is not None]
    return fmean(sent) / 1e6 if sent else None


def _round_records(study: Study, arm: ArmResults, key: Key) -> list[dict[str, object]]:
    sent, records = 0.0, []
    for row in arm.outcomes[key].rows:
        sent += (row.get("uplink_bytes") or 0) / 1e6
        percents = {f"{split}_percent": _percent(row, split) for split in ("val", "test")}
        if any(value is not None for value in percents.values()):
            place = {"group": arm.arm.group, "arm": arm.arm.label, **seed_columns(study, key), "round": row["round"]}
            losses = {f"{split}_loss": row.get(f"{split}_loss") for split in ("train", "val", "test")}
            records.append({**place, "uplink_megabytes": sent, **losses, **percents})
    return records
