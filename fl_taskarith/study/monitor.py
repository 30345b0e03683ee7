"""What a study prints while it runs: a line per finished run, a line a minute about those that train, and study.log."""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.storage.files import make_folder
from fl_taskarith.storage.progress import duration
from fl_taskarith.storage.run_log import RunLog
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.listing import last_round, measure, runs_left, seconds_left
from fl_taskarith.study.plan import Plan, plan_of
from fl_taskarith.study.results import StudyResults, run_folder

STUDY_LOG = "study.log"  # in a study's folder
EVERY = 60.0  # seconds between two lines
GLANCE = 2.0  # seconds in which the speeds of a study's runs are measured


@dataclass
class _Training:
    """A run in progress: when this command began it, and after which round."""

    arm: Arm
    run: Config
    started: float
    first_round: int


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
        # Before any run begins: it would be slowed down, and the measurement too.
        self._speeds = measure([run for plan in self._plans() for run in plan.left()], GLANCE)

    def say(self, line: str) -> None:
        """Print and log one line."""
        print(line, file=self._out, flush=True)
        for log in self._logs:
            log.write(line)

    def begins(self, arm: Arm, run: Config) -> None:
        """Note that a run begins or resumes."""
        folder = run_folder(run)
        with self._lock:
            self._training[folder] = _Training(arm, run, time.time(), last_round(folder))

    def ends(self, run: Config) -> None:
        """Note that a run ended, in whatever way."""
        with self._lock:
            self._training.pop(run_folder(run), None)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._report_every_minute, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1)
        if error is not None:
            for log in self._logs:
                log.write(f"{type(error).__name__}: {error}")

    def report(self) -> None:
        """Say where every run that trains is, and how long the study will take."""
        with self._lock:
            training = list(self._training.values())
        left = self._study_left()
        for each in training:
            self.say(f"{self._line(each)}; study: {left}")

    def _report_every_minute(self) -> None:
        while not self._ended.wait(EVERY):
            try:
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

    def _plans(self) -> list[Plan]:
        """Return the plans of all arms, but for unreadable folders, which the study itself reports."""
        plans = []
        for results in self._everything:
            for arm in results.study.arms:
                with contextlib.suppress(FlTaskarithError):
                    plans.append(plan_of(results, arm))
        return plans
