"""The runs of one arm: those that are known by now, with how far they are, and how many are still to be chosen."""

import itertools
from dataclasses import dataclass, replace

from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import FlTaskarithError, StudyError
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.results import SETTLED, Outcome, StudyResults
from fl_taskarith.study.search import open_trials, trials_left
from fl_taskarith.workspace.machine import on_this_machine


@dataclass(frozen=True)
class Plan:
    """The runs of one arm.

    Attributes:
        known: (run, outcome, whether it is reported) of the runs whose rate is known by now.
        later: the rounds of the others.
        problem: why the arm cannot go on.
    """

    arm: Arm
    known: tuple[tuple[Config, Outcome, bool], ...]
    later: tuple[int, ...]
    problem: str = ""

    @property
    def settled(self) -> int:
        """The number of runs that are not to be run again."""
        return sum(outcome.state in SETTLED for _, outcome, _ in self.known)

    def left(self) -> list[Config]:
        """Return the runs that are left; a run whose rate is not known has no name and any rate."""
        config = on_this_machine(from_mapping(self.arm.settings))
        return [run for run, outcome, _ in self.known if outcome.state not in SETTLED] + [
            replace(config, num_rounds=rounds) for rounds in self.later
        ]


def plan_of(results: StudyResults, arm: Arm) -> Plan:
    """Return the plan of an arm, from the folders of its runs.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    study = results.study
    runs: dict[str, tuple[Config, bool]] = {}
    later: list[int] = []
    if (search := study.searched(arm)) is not None and study.rate_arm(arm) is arm:
        scores = results.scores(arm)
        still_open = open_trials(search, scores)
        places = {point: place for place, point in enumerate(search.points)}
        known = sorted({*scores, *still_open}, key=lambda trial: (trial.rounds, places[trial.rate, trial.also]))
        for run in itertools.chain.from_iterable(results.trial_runs(arm, trial) for trial in known):
            runs[run.run_name] = (run, False)
        for rounds in trials_left(search, scores)[len(still_open) :]:
            later += [rounds] * len(search.seeds_of(rounds))
    problem = ""
    try:
        choice = results.choice(arm)
    except StudyError as error:
        choice, problem = None, str(error)
    if choice is not None:
        for run in results.final_runs(arm, choice):
            runs[run.run_name] = (run, True)
    elif not problem:
        later += [from_mapping(arm.settings).num_rounds for _ in study.run_seeds]
    outcomes = tuple((run, results.outcome(run), reported) for run, reported in runs.values())
    return Plan(arm, outcomes, tuple(later), problem)


def plans_of(results: StudyResults) -> list[Plan]:
    """Return the plans of all arms; an arm with a folder that cannot be read has a problem in place of runs."""
    plans = []
    for arm in results.study.arms:
        try:
            plans.append(plan_of(results, arm))
        except FlTaskarithError as error:
            plans.append(Plan(arm, (), (), str(error)))
    return plans
