"""Runs studies: for every arm its search, then its seeds. Finished runs are not repeated; interrupted ones resume."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import FlTaskarithError, StudyError
from fl_taskarith.server.interruption import ending_until_idle
from fl_taskarith.server.launch import require_own
from fl_taskarith.storage.files import make_folder, remove_leftovers
from fl_taskarith.storage.processes import worker_pool
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.elsewhere import made_elsewhere
from fl_taskarith.study.listing import list_study
from fl_taskarith.study.monitor import Monitor
from fl_taskarith.study.one_run import describe_run, run_once
from fl_taskarith.study.plan import Plan, plan_of, plans_of
from fl_taskarith.study.results import SETTLED, Outcome, State, StudyResults, inspect, run_folder
from fl_taskarith.study.tables import warn_of_other_arms, write_tables


@dataclass(frozen=True)
class Task:
    """One run of one arm; `reported` if it is final and no trial of a search."""

    arm: Arm
    run: Config
    reported: bool

    @property
    def folder(self) -> Path:
        """Equal for equal runs, whichever arms and studies ask for them."""
        return run_folder(self.run)


def run_studies(studies: Sequence[Study], root: Path, jobs: int = 1, budget: float | None = None) -> None:
    """Run what is left of the studies and write their tables. A run that several arms or studies need is run once.

    Args:
        root: the folder of all results; each study gets root/<name>.
        jobs: processes that runs are shared out to; results are the same for any number.
        budget: seconds of wall-clock time after which no run is started, and those that train stop at a checkpoint.

    Raises:
        ConfigError: what an arm's settings name as one's own cannot be imported; nothing was run.
        StudyError: runs failed; all others were run, and the tables name the failures.
    """
    for arm in (arm for study in studies for arm in study.arms):
        require_own(from_mapping(arm.settings))
    everything = [StudyResults(study, root) for study in studies]
    for results in everything:
        warn_of_other_arms(results)
    try:
        run_what_is_left(everything, jobs, budget)
    finally:
        for results in everything:
            write_tables(results)
            print(f"Tables: {results.folder / 'README.md'}", flush=True)


def run_what_is_left(everything: Sequence[StudyResults], jobs: int = 1, budget: float | None = None) -> None:
    """Run what is left of the studies as `run_studies` does, without tables."""
    deadline = None if budget is None else time.time() + budget
    for results in everything:
        make_folder(results.runs)
    for folder in {each for results in everything for each in (results.folder, results.runs)}:
        remove_leftovers(folder, below=True)
    schedule = _Schedule([(results, arm) for results in everything for arm in results.study.in_turn])
    with Monitor(everything, jobs) as monitor:
        for results in everything:
            monitor.say(f"{results.study.title}: {results.folder}")
            for line in made_elsewhere(results, plans_of(results)):
                monitor.say(line)
        with _workers(jobs) as executor:
            cut = _work(schedule, executor, jobs, deadline, monitor)
        if cut:
            monitor.say("The budget is spent. The same command goes on from here. What is left:")
            for results in everything:
                for line in list_study(results):
                    monitor.say(line)
        if schedule.failures:
            failures = "\n  ".join(schedule.failures)
            raise StudyError(f"{len(schedule.failures)} failed, the others are kept:\n  {failures}")


def _work(schedule: "_Schedule", executor: Executor, jobs: int, deadline: float | None, monitor: Monitor) -> bool:
    """Keep `jobs` runs going until none is left; return whether the deadline ended that."""
    run = run_once if isinstance(executor, Here) else _run_in_worker
    running: dict[Future[Outcome], Task] = {}
    while True:
        late = deadline is not None and time.time() >= deadline
        while len(running) < jobs and not late and (task := schedule.next_task()) is not None:
            monitor.begins(task.arm, task.run)
            running[executor.submit(run, task.run, deadline)] = task
        if not running:
            return schedule.next_task() is not None or schedule.cut
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task, outcome = running.pop(future), future.result()
            schedule.settle(task, outcome)
            monitor.ends(task.run)
            monitor.say(describe_run(task.arm, task.run, outcome, reported=task.reported))


class _Schedule:
    """Chooses the next run: the first, in the order of studies and arms, that waits for no other and is not running."""

    def __init__(self, arms: Sequence[tuple[StudyResults, Arm]]) -> None:
        self.failures: list[str] = []
        self.cut = False  # whether a run was stopped before its end
        self._open = list(arms)
        self._taken: set[Path] = set()
        self._outcomes: dict[Path, Outcome] = {}  # of the runs that ended in this command

    def next_task(self) -> Task | None:
        """Return a run to start now; None while all that are known are done or running."""
        for place in list(self._open):
            results, arm = place
            try:
                plan = plan_of(results, arm)
            except FlTaskarithError as error:
                self._close(place, [f"{arm.title}: {error}"])
                continue
            tasks = [Task(arm, run, reported) for run, _, reported in plan.known]
            outcomes = [
                self._outcomes.get(task.folder, each) for task, (_, each, _) in zip(tasks, plan.known, strict=True)
            ]
            waiting = [task for task, outcome in zip(tasks, outcomes, strict=True)
                       if outcome.state not in SETTLED and task.folder not in self._outcomes]  # fmt: skip
            for task in waiting:
                if task.folder not in self._taken:
                    self._taken.add(task.folder)
                    return task
            if not waiting:
                self._go_on(place, plan, list(zip(tasks, outcomes, strict=True)))
        return None

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Note how a run that was handed out ended."""
        self._outcomes[task.folder] = outcome

    def _go_on(self, place: tuple[StudyResults, Arm], plan: Plan, ended: Sequence[tuple[Task, Outcome]]) -> None:
        """Close an arm, all known runs of which ended; but let it wait where it takes the rate of another arm."""
        title = plan.arm.title
        stopped = [f"{title}: the search stopped at learning-rate = {task.run.peak_rate:g}: {outcome.cause}"
                   for task, outcome in ended if not task.reported and outcome.state not in SETTLED]  # fmt: skip
        if any(outcome.state is State.UNFINISHED for _, outcome in ended):  # what needs it is left for the next command
            self.cut = True
            self._close(place, [])
        elif stopped or plan.problem:
            self._close(place, stopped[:1] or [f"{title}: {plan.problem}"])
        elif not plan.later:
            self._close(place, [f"{title}, seed {task.run.seed}: {outcome.cause}" for task, outcome in ended
                                if task.reported and outcome.state is not State.DONE])  # fmt: skip

    def _close(self, place: tuple[StudyResults, Arm], failures: Sequence[str]) -> None:
        self._open.remove(place)
        self.failures += failures


class Here(Executor):
    """An executor that runs what is submitted in this process, before `submit` returns."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Call the function; its errors are raised here."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))
        return future


@contextmanager
def _workers(jobs: int) -> Iterator[Executor]:
    """Yield this process for one job, else as many others, which keep data and models from one run to the next."""
    if jobs == 1:
        yield Here()
        return
    executor = worker_pool(jobs)
    try:
        yield executor
    except KeyboardInterrupt:  # which this process alone may have heard of
        print("Waiting for the rounds under way, which are saved first.", flush=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    except BrokenProcessPool as error:
        raise StudyError(
            "A process of --jobs was killed (was there too little memory?): start the same command again to go on, "
            "with fewer jobs if need be."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _run_in_worker(run: Config, deadline: float | None) -> Outcome:
    """Run in a worker, where a signal ends the run after its round and not the process, nor the pool with it."""
    with ending_until_idle():
        try:
            return run_once(run, deadline)
        except KeyboardInterrupt:
            return inspect(run)
