"""What a study prints while it runs: a line per finished run, a line a minute about those that train, and study.log.

In a notebook a bar with the time left stands in for the lines of every minute, which go to study.log alone.
"""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from fl_taskarith.config.settings import Config
from fl_taskarith.storage.files import make_folder
from fl_taskarith.storage.folder_choice import last_saved_round
from fl_taskarith.storage.progress import duration, in_notebook
from fl_taskarith.storage.run_log import RunLog
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.listing import last_round, measure, runs_left, seconds_left
from fl_taskarith.study.plan import Plan, plans_of
from fl_taskarith.study.results import Outcome, State, StudyResults, run_folder

STUDY_LOG = "study.log"  # in a study's folder
EVERY = 60.0  # seconds between two lines
MOVES = 12  # of the bar, between two lines
BAR = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left{postfix}"
GLANCE = 2.0  # seconds in which the speeds of a study's runs are measured


@dataclass
class _Training:
    """A run in progress: when this command began it, after which round, and seconds left at the last count."""

    arm: Arm
    run: Config
    started: float
    first_round: int
    left: float


class Monitor:
    """A context manager that prints lines to the output of its start (runs redirect theirs) and to each study.log."""

    def __init__(self, everything: Sequence[StudyResults], jobs: int) -> None:
        self._everything, self._jobs = everything, jobs
        self._out = sys.stdout
        self._logs = [RunLog(results.folder / STUDY_LOG) for results in everything]
        for results in everything:
            make_folder(results.folder)
        self._arms = [arm.title for results in everything for arm in results.study.in_turn]
        self._training: dict[Path, _Training] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._bar: tqdm[None] | None = None
        # Before any run begins: it would be slowed down, and the measurement too.
        self._speeds = measure([run for plan in self._plans() for run in plan.left()], GLANCE)
        self._left = 0.0  # seconds of one process for all runs left, when they were last counted

    def say(self, line: str) -> None:
        """Print and log one line."""
        print(line, file=self._out, flush=True)
        self._write(line)

    def _write(self, line: str) -> None:
        for log in self._logs:
            log.write(line)

    def begins(self, arm: Arm, run: Config) -> None:
        """Note that a run begins or resumes."""
        folder = run_folder(run)
        with self._lock:
            self._training[folder] = _Training(
                arm, run, time.time(), last_saved_round(folder), self._seconds_of(arm, run)
            )

    def ends(self, run: Config) -> None:
        """Note that a run ended, in whatever way."""
        with self._lock:
            self._training.pop(run_folder(run), None)
            if self._bar is not None:
                self._count()
                self._move()

    def __enter__(self) -> Self:
        if in_notebook():
            self._count()
            some = runs_left(self._plans())
            self.say(f"Measured here: {self._study_left()}." if some else "Nothing is left to do.")
            if self._left:  # standard error is another one while a run is going on in this process
                self._bar = tqdm(total=self._left, file=sys.stderr, bar_format=BAR)
        self._thread = threading.Thread(target=self._report_every_minute, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1)
        if self._bar is not None:
            self._bar.close()
        if error is not None:
            self._write(f"{type(error).__name__}: {error}")

    def report(self) -> None:
        """Say where every run that trains is, and how long the study will take."""
        with self._lock:
            training = list(self._training.values())
        left = self._study_left()
        for each in training:
            line = f"{self._line(each)}; study: {left}"
            if self._bar is None:
                print(line, file=self._out, flush=True)
            self._write(line)

    def _report_every_minute(self) -> None:
        moves = 0
        while not self._ended.wait(EVERY if self._bar is None else EVERY / MOVES):
            moves += 1
            try:
                if self._bar is not None:
                    with self._lock:
                        self._move()
                if self._bar is None or not moves % MOVES:
                    self.report()
            except Exception as error:  # a folder read while it was written, a full disk: the runs themselves go on
                self.say(f"No progress report now: {error}")

    def _line(self, training: _Training) -> str:
        """Say which arm and round a run is at, of how many, and the time that it has left."""
        run, done = training.run, last_round(run_folder(training.run))
        words = f"arm {self._arms.index(training.arm.title) + 1} of {len(self._arms)} ({training.arm.title}"
        words += f", rate {run.peak_rate:g}, seed {run.seed}): round {max(done, 0)} of {run.num_rounds}"
        if done > max(training.first_round, 0):
            each = (time.time() - training.started) / (done - max(training.first_round, 0))
            words += f", {duration(each * (run.num_rounds - done))} left"
        return words

    def _study_left(self) -> str:
        """Say how much of the whole study is left, by the speed measured here, divided by the number of processes."""
        plans = self._plans()
        left, seconds = runs_left(plans), seconds_left(plans, self._speeds) / self._jobs
        return f"about {duration(seconds)} left for {len(left)} runs" if seconds else f"{len(left)} runs left"

    def _count(self) -> None:
        """Estimate all that is left, of the study and of each run in progress."""
        self._left = seconds_left(self._plans(), self._speeds)
        for each in self._training.values():
            each.left = self._seconds_of(each.arm, each.run)

    def _seconds_of(self, arm: Arm, run: Config) -> float:
        """Estimate what is left of one run, by the rounds that its folder has."""
        return seconds_left([Plan(arm, ((run, Outcome(State.TO_DO), True),), ())], self._speeds, going=True)

    def _move(self) -> None:
        """Move the bar to where the runs are; the time left follows from how long its way so far took."""
        if self._bar is None:
            return
        training = list(self._training.values())
        left = self._left - sum(each.left - self._seconds_of(each.arm, each.run) for each in training)
        self._bar.total = max(self._bar.total, left)
        self._bar.n = self._bar.total - left
        self._bar.set_postfix_str("; ".join(f"{each.arm.title}, seed {each.run.seed}" for each in training))

    def _plans(self) -> list[Plan]:
        """Return the plans of all arms, but for unreadable folders, which the study itself reports."""
        return [plan for results in self._everything for plan in plans_of(results)]
