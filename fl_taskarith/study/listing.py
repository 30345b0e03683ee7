"""What of a study is done and what is to do, and about how long the rest will take."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from fl_taskarith.config import Config
from fl_taskarith.errors import StudyError
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.one_run import describe_run
from fl_taskarith.study.results import Outcome, State, StudyResults, inspect
from fl_taskarith.study.search import open_trials, trials_left


@dataclass(frozen=True)
class _Plan:
    """The runs of one arm: those that are known by now, and the rounds of those whose rate is not."""

    arm: Arm
    known: tuple[tuple[Config, Outcome, bool], ...]  # (run, outcome, whether it is reported)
    later: tuple[int, ...]
    problem: str = ""

    def seconds_per_round(self) -> float | None:
        """Of the runs that are done."""
        speeds = [outcome.seconds / run.num_rounds for run, outcome, _ in self.known if outcome.state is State.DONE]
        return fmean(speeds) if speeds else None

    def rounds_left(self) -> int:
        """An interrupted run counts whole."""
        settled = (State.DONE, State.DIVERGED)
        return sum(run.num_rounds for run, outcome, _ in self.known if outcome.state not in settled) + sum(self.later)


def list_study(results: StudyResults) -> Iterator[str]:
    """A line per run, and one with the time left, from the speed of the arm's finished runs or else of all."""
    plans = [_plan(results, arm) for arm in results.study.arms]
    yield f"{results.study.title}: {results.folder}"
    for plan in plans:
        yield from (describe_run(plan.arm, run, outcome, reported=reported) for run, outcome, reported in plan.known)
        if plan.later:
            yield f"{plan.arm.title} | up to {len(plan.later)} more runs once the search has got there: {State.TO_DO}"
        if plan.problem:
            yield f"{plan.arm.title} | {plan.problem}"
    left = sum(plan.rounds_left() for plan in plans)
    speeds = [speed for plan in plans if (speed := plan.seconds_per_round()) is not None]
    if not left:
        yield "Nothing is left to do."
    elif not speeds:
        yield f"Left: {left} rounds; no run is finished yet that could tell how long they take."
    else:
        seconds = sum(plan.rounds_left() * (plan.seconds_per_round() or fmean(speeds)) for plan in plans)
        yield f"Left: {left} rounds, about {seconds / 60:.1f} minutes of one process."


def _plan(results: StudyResults, arm: Arm) -> _Plan:
    study = results.study
    runs: dict[str, tuple[Config, bool]] = {}
    later: list[int] = []
    if (search := study.searched(arm)) is not None and study.rate_arm(arm) is arm:
        scores = results.scores(arm)
        still_open = open_trials(search, scores)
        for trial in sorted({*scores, *still_open}, key=lambda trial: (trial[1], trial[0])):
            run = results.trial_run(arm, trial)
            runs[run.run_name] = (run, False)
        later += trials_left(search, scores)[len(still_open) :]
    problem = ""
    try:
        choice = results.choice(arm)
    except StudyError as error:
        choice, problem = None, str(error)
    if choice is not None:
        for run in results.final_runs(arm, choice):
            runs[run.run_name] = (run, True)
    elif not problem:
        later += [study.config(arm, None, None, seed, results.runs).num_rounds for seed in study.seeds]
    known = tuple((run, inspect(run), reported) for run, reported in runs.values())
    return _Plan(arm, known, tuple(later), problem)
