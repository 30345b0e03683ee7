"""How far each run of a study is, from its folder or a pack. Reads, and never trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.storage.own_modules import changed_modules
from fl_taskarith.storage.packed_runs import packed_run
from fl_taskarith.storage.paths import portable, results_root
from fl_taskarith.storage.record_files import read_json
from fl_taskarith.storage.run_folder import TIMING_COLUMNS, Row, read_rounds
from fl_taskarith.storage.run_record import REMEDY, is_finished, read_record
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.search import DIVERGED, Also, Choice, Score, Trial, choose, open_trials
from fl_taskarith.study.shipped import is_shipped

FAILURE = "failure.json"  # in a run's folder
FAILED = {"diverged": bool, "cause": str, "run?": str}


class State(StrEnum):
    """How far a run is. A diverged run is not repeated, for it would diverge again; a failed or unusable one is."""

    DONE = "done"
    DIVERGED = "diverged"
    FAILED = "failed"
    UNUSABLE = "unusable"
    UNFINISHED = "running or interrupted"
    TO_DO = "to do"


SETTLED = (State.DONE, State.DIVERGED)  # not to be run again


@dataclass(frozen=True)
class Outcome:
    """What a run's folder holds.

    Attributes:
        rows: of rounds.csv, of a run that is done.
        record: run.json, of a run that is done.
        cause: why it diverged or failed, what is unusable, or where the folder is kept of a run done again.
        name: of its folder.
    """

    state: State
    rows: tuple[Row, ...] = ()
    record: dict[str, Any] | None = None
    cause: str = ""
    name: str = ""

    @property
    def seconds(self) -> float:
        """Work on the run, over all sittings."""
        return sum(row.get(column) or 0.0 for row in self.rows for column in TIMING_COLUMNS)

    @property
    def test_percent(self) -> float | None:
        """Test accuracy of the last round in percent, None where it was not measured."""
        value = self.rows[-1].get("test_accuracy") if self.rows else None
        return None if value is None else 100 * float(value)

    @property
    def shipped(self) -> bool:
        """Whether this is a finished run that came with the project."""
        return self.state is State.DONE and is_shipped(self.name, self.test_percent, self.seconds)

    @property
    def score(self) -> Score:
        """Validation accuracy and minus loss of the last round, by which rates are chosen; worst if it diverged.

        NaN stands for what was not measured.
        """
        if self.state is State.DIVERGED:
            return DIVERGED
        last = self.rows[-1]
        accuracy, loss = (nan if (value := last.get(name)) is None else value for name in ("val_accuracy", "val_loss"))
        return float(accuracy), -float(loss)


class StudyResults:
    """The folder of a study: README.md, table.csv, search.csv and figures; runs/ has a folder per run.

    Studies named "family/part" share the runs of their family: root/family/runs.
    """

    def __init__(self, study: Study, root: Path) -> None:
        """`root` is the folder that holds all results."""
        self.study = study
        self.folder = root / study.name
        self.runs = root / study.name.partition("/")[0] / "runs"
        self._results_dir = Path(portable(self.runs))  # so that the records of runs may move with the checkout
        self._settled: dict[str, Outcome] = {}
        self._runs: dict[tuple[object, ...], Config] = {}

    def final_runs(self, arm: Arm, choice: Choice) -> list[Config]:
        """Return the runs that are reported, one per seed or pair of seeds."""
        return [self._run(arm, choice.rate, None, seeds, choice.also) for seeds in self.study.run_seeds]

    def trial_runs(self, arm: Arm, trial: Trial) -> list[Config]:
        """Return the runs behind one trial of the search of `arm`, one per seed of its rung."""
        search = self.study.searched(arm)
        assert search is not None
        seeds = search.seeds_of(trial.rounds)
        return [self._run(arm, trial.rate, trial.rounds, (seed, seed), trial.also) for seed in seeds]

    def _run(self, arm: Arm, rate: float, rounds: int | None, seeds: tuple[int, int], also: Also) -> Config:
        key = (arm.title, rate, rounds, seeds, also)
        if key not in self._runs:
            self._runs[key] = self.study.config(arm, rate, rounds, seeds[0], self._results_dir, also, seeds[1])
        return self._runs[key]

    def outcome(self, run: Config) -> Outcome:
        """Return how far a run is; a settled run is read once.

        Raises:
            CheckpointError: its folder holds a finished run of other settings, or the pack cannot be read.
        """
        known = self._settled.get(run.run_name)
        if known is None:
            known = inspect(run)
            if known.state in SETTLED:  # it will not change
                self._settled[run.run_name] = known
        return known

    def trials(self, arm: Arm) -> dict[Trial, list[Outcome]]:
        """Return every trial of the search of `arm` whose runs are done or diverged, rung by rung."""
        search = self.study.searched(arm)
        settled: dict[Trial, list[Outcome]] = {}
        while search is not None and (trials := open_trials(search, _scores(settled))):
            outcomes = {trial: list(map(self.outcome, self.trial_runs(arm, trial))) for trial in trials}
            known = {trial: runs for trial, runs in outcomes.items()
                     if all(run.state in SETTLED for run in runs)}  # fmt: skip
            settled |= known
            if len(known) < len(trials):
                break
        return settled

    def scores(self, arm: Arm) -> dict[Trial, Score]:
        """Return the score of each of `trials`."""
        return _scores(self.trials(arm))

    def choice(self, arm: Arm) -> Choice | None:
        """Return the rate that `arm` runs at; None while the search is not over.

        Raises:
            StudyError: every rate of the search diverged.
        """
        source = self.study.rate_arm(arm)
        search = self.study.searched(source)
        if search is None:
            return Choice(self.study.config(source, None, None, self.study.seeds[0], self.runs).peak_rate)
        scores = self.scores(source)
        return None if open_trials(search, scores) else choose(search, scores)


def _scores(trials: Mapping[Trial, Sequence[Outcome]]) -> dict[Trial, Score]:
    """Return the mean over its runs of each trial's scores; the worst where one diverged."""
    scores = {trial: [run.score for run in runs] for trial, runs in trials.items()}
    return {
        trial: DIVERGED if DIVERGED in each else (fmean(a for a, _ in each), fmean(b for _, b in each))
        for trial, each in scores.items()
    }


def run_folder(config: Config) -> Path:
    """Return the folder of a study's run, whether it exists or not."""
    return results_root(config.results_dir) / config.run_name


def inspect(config: Config) -> Outcome:
    """Return how far the run of `config` is.

    Raises:
        CheckpointError: its folder holds a finished run of other settings, or the pack cannot be read.
    """
    folder = run_folder(config)
    try:
        outcome = _in_folder(folder)
    except CheckpointError as error:
        return Outcome(State.UNUSABLE, cause=str(error), name=folder.name)
    outcome = outcome or _in_pack(folder)
    if outcome.record is not None and (different := config.differing_keys(outcome.record.get("config", {}))):
        raise CheckpointError(
            f"{folder} holds a finished run of other settings ({', '.join(different)}), although its name says "
            "otherwise: move it away."
        )
    if changed := changed_modules(outcome.record, config):
        cause = f"the module that {changed[0]} names has changed since the run in {folder}."
        return Outcome(State.UNUSABLE, cause=cause, name=folder.name)
    return outcome


def read_outcome(folder: Path) -> Outcome:
    """Return how far the run in `folder` is; where there is none, a pack may hold it.

    Raises:
        CheckpointError: the folder or the pack cannot be read.
    """
    return _in_folder(folder) or _in_pack(folder)


def _in_folder(folder: Path) -> Outcome | None:
    """Return what the folder says; None where it says nothing.

    Raises:
        CheckpointError: it cannot be read.
    """
    record = read_record(folder)
    failure = read_json(folder / FAILURE, FAILED, "Delete it to run the run again.", optional=True)
    if record is not None and is_finished(record):
        rows = tuple(read_rounds(folder))
        last = rows[-1]["round"] if rows else -1
        if last != _end(record, last):
            raise CheckpointError(
                f"{folder / 'rounds.csv'} has no row after round {last}, though its run has finished. {REMEDY}"
            )
        return Outcome(State.DONE, rows, record, name=folder.name)
    if failure is not None and failure.get("run", folder.name) != folder.name:
        raise CheckpointError(f"{folder / FAILURE} is of the run {shown(failure['run'])}: delete it to run this one.")
    if failure is not None:
        state = State.DIVERGED if failure["diverged"] else State.FAILED
        return Outcome(state, cause=failure["cause"], name=folder.name)
    return None if record is None else Outcome(State.UNFINISHED, name=folder.name)


def _end(record: Mapping[str, Any], last: int) -> int:
    """Return the round after which a finished run ended; `last` where its settings do not say."""
    if "stopped_early" in record:
        return int(record["stopped_early"]["round"])
    config = record["config"]
    converges = config.get("dataset") == REGRESSION and last >= 0
    return last if converges else int(config.get("num-rounds", last))


def _in_pack(folder: Path) -> Outcome:
    packed = packed_run(folder)
    if packed is None:
        return Outcome(State.TO_DO, name=folder.name)
    state = State.DIVERGED if packed.record is None else State.DONE
    return Outcome(state, packed.rows, packed.record, packed.cause, folder.name)
