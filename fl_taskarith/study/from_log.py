"""A study's results from what it printed, for where its machine went away with the folders of its runs.

A notebook keeps its output when it loses its disk. A line tells a run's rate, its last validation and test accuracy to
a hundredth of a point, and its time; curves, traffic and norms are lost. So is the test accuracy of a final run that is
a trial of its arm's search as well, for a trial's line does not tell it. A run whose folder is there is read from it,
whatever the log says of it.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.results import SETTLED, Outcome, State, StudyResults
from fl_taskarith.study.search import Choice, Trial
from fl_taskarith.study.shipped import MARK

_NUMBER = r"[-+.e\d]+|nan"
_RUN = re.compile(
    rf"(?P<title>.+?) \| rate (?P<rate>{_NUMBER}) \| seed (?P<seed>\d+) \| rounds (?P<rounds>\d+) \| (?P<end>.+)"
)
_DONE = re.compile(
    rf"(?:val (?P<val>{_NUMBER}) % \| )?(?:test (?P<test>{_NUMBER}) % \| )?(?P<seconds>[.\d]+) s(?: \| {MARK})?"
)
_HARDWARE = "Hardware: "


class LoggedResults(StudyResults):
    """As `StudyResults`; the lines that `run_studies` printed stand in for folders of runs that are not there.

    An arm's rate is that which the folders of its search choose, or without all of those the rate of its logged final
    runs. The ridge head before a logged run's training is what an arm at learning rate 0 has on the same seed.
    """

    origin = (
        "Where the folders of its runs are lost, from what the study printed: curves, traffic, norms and speeds are "
        "those of the runs whose folders are there. Accuracies are printed to a hundredth of a point; seconds are "
        "those of whole runs, evaluation included. Ridge head: the arm at learning rate 0 on the same seed, from which "
        "the others begin, to rounding."
    )

    def __init__(self, study: Study, root: Path, lines: Iterable[str]) -> None:
        """`lines` may hold others between those of runs. Of two on a run the one that says more counts, else the later.

        A line "Hardware: ..." that somebody added to them says what they ran on.

        Raises:
            ConfigError: no line is of a run, one is of a run that the study does not ask for, or final runs of an arm
                are at several rates.
        """
        super().__init__(study, root)
        self._folders = StudyResults(study, root)
        arms = {arm.title: arm for arm in study.arms}
        self._outcomes: dict[str, Outcome] = {}
        self._trials: dict[str, set[Trial]] = {title: set() for title in arms}
        self._rates: dict[str, set[float]] = {title: set() for title in arms}
        lines = [line.strip() for line in lines]
        self.hardware = [line.removeprefix(_HARDWARE) for line in lines if line.startswith(_HARDWARE)]
        found = [match for line in lines if (match := _RUN.fullmatch(line))]
        if not found:
            raise ConfigError(
                'The log has no line of a run. Expected what "fl-taskarith study" prints, for example "dense | rate '
                '0.01 | seed 0 | rounds 40 | val 97.00 % | test 97.50 % | 12.3 s".'
            )
        for match in found:
            if match["title"] not in arms:
                raise ConfigError(f'The log has a run of the arm "{match["title"]}", which {study.source} lacks.')
            self._take(arms[match["title"]], match)
        for title, rates in self._rates.items():
            if len(rates) > 1 and self._folders.choice(arms[title]) is None:
                raise ConfigError(f'The log has final runs of the arm "{title}" at several rates: {sorted(rates)}.')

    @classmethod
    def read(cls, study: Study, root: Path, log: Path) -> Self:
        """Of the lines in the file `log`.

        Raises:
            ConfigError: it cannot be read, or as for the constructor.
        """
        try:
            return cls(study, root, log.expanduser().read_text(encoding="utf-8-sig").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the log {log}: {error}. Expected a text file in UTF-8.") from error

    def _take(self, arm: Arm, line: re.Match[str]) -> None:
        rate, rounds, seed = float(line["rate"]), int(line["rounds"]), int(line["seed"])
        search = self.study.searched(arm) if self.study.rate_arm(arm) is arm else None
        is_trial = search is not None and seed == search.seed and rate in search.rates and rounds in search.rounds
        is_final = self._may_be_final(arm, rate, rounds, seed)
        if not is_trial and not is_final:
            raise ConfigError(f'The log has a run that {self.study.source} does not ask for: "{line[0]}".')
        outcome = _read_end(line["end"], rate, rounds)
        if outcome.rows and outcome.rows[-1].get("test_accuracy") is not None:
            is_trial = False  # a trial's line does not tell it
        elif is_trial:
            is_final = False  # or both: then its rate shows in the runs of other seeds
        name = self.study.config(arm, rate, rounds, seed, self.runs).run_name
        if _told(outcome) >= _told(self._outcomes.get(name, Outcome(State.TO_DO))):
            self._outcomes[name] = dataclasses.replace(outcome, name=name)
        if is_final:
            self._rates[arm.title].add(rate)
        if is_trial and outcome.state in SETTLED:
            self._trials[arm.title].add((rate, rounds))

    def _may_be_final(self, arm: Arm, rate: float, rounds: int, seed: int) -> bool:
        """Whether a run of an arm is one of those that are reported, if its rate is the one chosen."""
        search = self.study.searched(arm)
        config = from_mapping(dict(arm.settings))
        rates = (config.peak_rate,) if search is None else search.rates
        shown = {float(f"{each:g}") for each in rates}
        return rate in shown and rounds == config.num_rounds and seed in self.study.seeds

    def outcome(self, run: Config) -> Outcome:
        """What the folder of `run` holds, else how the log says that it ended.

        A logged run has a round 0 of the ridge head's accuracy where there is one.
        """
        found = self._found(run)
        if not found.rows or found.record is not None:
            return found
        start: Row = {"round": 0, "test_accuracy": self._ridge_accuracy(run)}
        return dataclasses.replace(found, rows=(start, *found.rows))

    def _found(self, run: Config) -> Outcome:
        kept = self._folders.outcome(run)
        return kept if kept.state in SETTLED else self._outcomes.get(run.run_name, kept)

    def _ridge_accuracy(self, run: Config) -> float | None:
        """Test accuracy of a run that did not train, on the same seed, data and model."""
        for arm in self.study.arms:
            if arm.settings.get("learning-rate") != 0.0:
                continue
            other = self.study.config(arm, None, None, run.seed, self._results_dir)
            if not _same_start(run, other):
                continue
            with contextlib.suppress(CheckpointError):  # its own arm tells of a damaged folder
                found = self._found(other)
                accuracy = found.rows[-1].get("test_accuracy") if found.rows else None
                if accuracy is not None:
                    return float(accuracy)
        return None

    def trials(self, arm: Arm) -> dict[Trial, Outcome]:
        """Every trial that is done or diverged, by its folder or the log."""
        logged = {trial: self.outcome(self.trial_run(arm, trial)) for trial in self._trials[arm.title]}
        found = logged | super().trials(arm)
        return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))

    def choice(self, arm: Arm) -> Choice | None:
        """The rate that the folders of its search choose, else that of logged final runs, else by folders and log.

        Raises:
            StudyError: every rate of the search diverged.
        """
        source = self.study.rate_arm(arm)
        search = self.study.searched(source)
        if search is None:
            return super().choice(arm)
        if (chosen := self._folders.choice(source)) is not None:
            return chosen
        rate = next(iter(self._rates[source.title] | self._rates[arm.title]), None)
        if rate is not None:
            return Choice(rate, edge=rate in (search.rates[0], search.rates[-1]))
        return super().choice(arm)


def _read_end(end: str, rate: float, rounds: int) -> Outcome:
    """What the rest of a line says."""
    if (done := _DONE.fullmatch(end)) is not None:
        accuracies = {f"{split}_accuracy": float(done[split]) / 100 for split in ("val", "test") if done[split]}
        seconds = float(done["seconds"])
        last: Row = {"round": rounds, "learning_rate": rate, "overhead_seconds": seconds} | accuracies
        return Outcome(State.DONE, (last,))
    word, _, cause = end.partition(": ")
    if word in (State.DIVERGED, State.FAILED):
        return Outcome(State(word), cause=cause)
    return Outcome(State.UNFINISHED if word == State.UNFINISHED else State.TO_DO)


def _told(outcome: Outcome) -> int:
    """How much a line says of a run: that it ended, and its test accuracy, which a trial's line leaves out."""
    if outcome.state not in SETTLED:
        return 0
    return 2 if outcome.rows and outcome.rows[-1].get("test_accuracy") is not None else 1


def _same_start(run: Config, other: Config) -> bool:
    """Whether both begin with one ridge head, to rounding; a mask, the clients' shards or a cache have no say in it."""
    keys = ("dataset", "model", "weights", "input_size", "head", "ridge_lambda", "logit_scale", "precision")
    sizes = ("train_subset", "validation_size", "calibration_size", "test_subset", "client_groups")
    return all(getattr(run, key) == getattr(other, key) for key in keys + sizes)
