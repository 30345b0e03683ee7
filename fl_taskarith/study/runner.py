"""Runs a study: for every arm its search, then its seeds. What is done stays done; what stopped half-way goes on."""

import contextlib
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from fl_taskarith import simulation
from fl_taskarith.config import Config
from fl_taskarith.errors import Divergence, FlTaskarithError, StudyError
from fl_taskarith.files import write_atomically
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.results import FAILURE, Outcome, State, StudyResults, inspect, run_folder
from fl_taskarith.study.search import open_trials
from fl_taskarith.study.tables import write_tables


@dataclass(frozen=True)
class Report:
    """What became of a family of arms: a line per failure, and whether the budget ended before the work."""

    failures: tuple[str, ...] = ()
    stopped: bool = False


class _BudgetSpentError(Exception):
    """No time is left to start another run."""


def run_studies(studies: Sequence[Study], root: Path, jobs: int = 1, budget: float | None = None) -> None:
    """Run what is left of the studies, one after the other, and write their tables.

    Args:
        root: the folder of all results; each study gets root/<name>.
        jobs: processes that arms are shared out to; results are the same for any number.
        budget: seconds of wall-clock time after which no run is started any more.

    Raises:
        StudyError: runs failed; all others were run, and the tables name the failures.
    """
    deadline = None if budget is None else time.time() + budget
    failures: list[str] = []
    for study in studies:
        results = StudyResults(study, root)
        print(f"{study.title}: {results.folder}", flush=True)
        try:
            reports = list(_reports(results, jobs, deadline))
        finally:
            write_tables(results)
        print(f"Tables: {results.folder / 'README.md'}", flush=True)
        failures += [failure for report in reports for failure in report.failures]
        if any(report.stopped for report in reports):
            print("The budget is spent: no further run was started. The same command goes on from here.", flush=True)
            break
    if failures:
        raise StudyError(f"{len(failures)} failed, the others are kept:\n  " + "\n  ".join(failures))


def _reports(results: StudyResults, jobs: int, deadline: float | None) -> Iterator[Report]:
    """Of every family, by this process or by `jobs` of them."""
    families = _families(results.study)
    if jobs == 1:
        yield from (_run_family(results, family, deadline) for family in families)
        return
    executor = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = [executor.submit(_run_family_in_worker, results, family, deadline) for family in families]
        for future in futures:
            yield future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            "A process of --jobs was killed (was there too little memory?): start the same command again to go on, "
            "with fewer jobs if need be."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _families(study: Study) -> list[list[Arm]]:
    """Arms that share one search, or runs, stay in one process, in file order, so that no process waits for another."""
    families: list[tuple[set[str], list[Arm]]] = []
    for arm in study.arms:
        shared = {study.twin(arm).title, study.twin(study.rate_arm(arm)).title}
        joined = [family for family in families if family[0] & shared]
        families = [family for family in families if family not in joined]
        titles = shared.union(*(family[0] for family in joined))
        families.append((titles, [*(each for family in joined for each in family[1]), arm]))
    return [arms for _, arms in families]


def _run_family_in_worker(results: StudyResults, family: Sequence[Arm], deadline: float | None) -> Report:
    """Ctrl-C reaches every process of the terminal: a worker that went on would begin the next family."""
    try:
        return _run_family(results, family, deadline)
    except KeyboardInterrupt:
        os._exit(130)


def _run_family(results: StudyResults, family: Sequence[Arm], deadline: float | None) -> Report:
    failures: list[str] = []
    for arm in family:
        try:
            failures += _run_arm(results, arm, deadline)
        except _BudgetSpentError:
            return Report(tuple(failures), stopped=True)
        except FlTaskarithError as error:
            failures.append(f"{arm.title}: {error}")
    return Report(tuple(failures))


def _run_arm(results: StudyResults, arm: Arm, deadline: float | None) -> list[str]:
    """Search, then every seed; a line per final run that failed."""
    source = results.study.rate_arm(arm)
    search = results.study.searched(source)
    while search is not None and (trials := open_trials(search, results.scores(source))):
        for trial in trials:
            run = results.trial_run(source, trial)
            outcome = _run_once(source, run, deadline, reported=False)
            if outcome.state not in (State.DONE, State.DIVERGED):
                raise StudyError(f"the search stopped at learning-rate = {run.learning_rate:g}: {outcome.cause}")
    choice = results.choice(arm)
    assert choice is not None
    failures = []
    for run in results.final_runs(arm, choice):
        outcome = _run_once(arm, run, deadline, reported=True)
        if outcome.state is not State.DONE:
            failures.append(f"{arm.title}, seed {run.seed}: {outcome.cause}")
    return failures


def _run_once(arm: Arm, run: Config, deadline: float | None, *, reported: bool) -> Outcome:
    """Do or continue `run` unless it is done or known to diverge. What it prints goes to log.txt in its folder."""
    before = inspect(run)
    if before.state in (State.DONE, State.DIVERGED):
        return before
    if deadline is not None and time.time() >= deadline:
        raise _BudgetSpentError
    folder = run_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        with (
            open(folder / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            simulation.simulate(run)
    except Exception as error:  # of ours or of the machine (out of memory): the other runs go on
        diverged = isinstance(error, Divergence)
        failure = {"diverged": diverged, "cause": str(error) if diverged else f"{type(error).__name__}: {error}"}
        if not isinstance(error, FlTaskarithError):
            failure["traceback"] = traceback.format_exc()
        write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")
    after = inspect(run)
    if after.state in (State.DONE, State.DIVERGED):
        for leftover in ("checkpoints", "client-states"):  # of many runs they would fill a disk; nothing needs them now
            shutil.rmtree(folder / leftover, ignore_errors=True)
    print(describe_run(arm, run, after, reported=reported), flush=True)
    return after


def describe_run(arm: Arm, run: Config, outcome: Outcome, *, reported: bool) -> str:
    """One line; test accuracy only of runs that are reported, since the search is not to see it."""
    words = [arm.title, f"rate {run.learning_rate:g}", f"seed {run.seed}", f"rounds {run.num_rounds}"]
    if outcome.state is not State.DONE:
        return " | ".join([*words, f"{outcome.state}: {outcome.cause}" if outcome.cause else str(outcome.state)])
    measured = {"val": "val_accuracy"} | ({"test": "test_accuracy"} if reported else {})
    for name, column in measured.items():
        if (value := outcome.rows[-1].get(column)) is not None:
            words.append(f"{name} {100 * value:.2f} %")
    return " | ".join([*words, f"{outcome.seconds:.1f} s"])
