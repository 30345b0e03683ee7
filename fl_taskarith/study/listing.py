"""What of a study is done and what is to do, and about how long the rest will take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from fl_taskarith.config import Config, from_mapping
from fl_taskarith.errors import StudyError
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.one_run import describe_run
from fl_taskarith.study.results import Outcome, State, StudyResults, inspect
from fl_taskarith.study.search import open_trials, trials_left
from fl_taskarith.study.shipped import MARK, count_shipped, origin_words


@dataclass(frozen=True)
class _Plan:
    """The runs of one arm: those that are known by now, and the rounds of those whose rate is not."""

    arm: Arm
    known: tuple[tuple[Config, Outcome, bool], ...]  # (run, outcome, whether it is reported)
    later: tuple[int, ...]
    problem: str = ""

    def seconds_per_round(self) -> float | None:
        """Of the runs that are done, together: what a run does once weighs little over many rounds."""
        done = [(outcome.seconds, run.num_rounds) for run, outcome, _ in self.known if outcome.state is State.DONE]
        return sum(seconds for seconds, _ in done) / sum(rounds for _, rounds in done) if done else None

    def images_left(self) -> int:
        """Training images in the rounds that are left."""
        config = from_mapping(self.arm.settings)
        return self.rounds_left() * config.sampled_clients * config.local_steps * config.batch_size

    def rounds_left(self) -> int:
        """An interrupted run counts whole."""
        settled = (State.DONE, State.DIVERGED)
        return sum(run.num_rounds for run, outcome, _ in self.known if outcome.state not in settled) + sum(self.later)


def list_study(results: StudyResults) -> Iterator[str]:
    """A line per run, those on shipped runs if there are any, and one with the time left.

    That is from the speed of each arm's finished runs, else from the study's images per second, else from all runs.
    """
    plans = [_plan(results, arm) for arm in results.study.arms]
    yield f"{results.study.title}: {results.folder}"
    for plan in plans:
        for run, outcome, reported in plan.known:
            line = describe_run(plan.arm, run, outcome, reported=reported)
            yield f"{line} | {MARK}" if outcome.shipped else line
        if plan.later:
            yield f"{plan.arm.title} | up to {len(plan.later)} more runs once the search has got there: {State.TO_DO}"
        if plan.problem:
            yield f"{plan.arm.title} | {plan.problem}"
    yield from _origins(results, plans)
    left = sum(plan.rounds_left() for plan in plans)
    speeds = [speed for plan in plans if (speed := plan.seconds_per_round()) is not None]
    if not left:
        yield "Nothing is left to do."
    elif not speeds and results.study.images_per_second:
        images = sum(plan.images_left() for plan in plans)
        minutes = images / results.study.images_per_second / 60
        yield (
            f"Left: {left} rounds of {images:,} training images, about {minutes:.0f} minutes of one process at "
            f"{results.study.images_per_second:g} images/s (set in the file; evaluation comes on top)."
        )
    elif not speeds:
        yield f"Left: {left} rounds; no run is finished yet that could tell how long they take."
    else:
        seconds = sum(_seconds_left(plan, results.study.images_per_second, fmean(speeds)) for plan in plans)
        yield f"Left: {left} rounds, about {seconds / 60:.1f} minutes of one process."


def _origins(results: StudyResults, plans: Sequence[_Plan]) -> Iterator[str]:
    """On the runs that were shipped with the project: those in folders, and those in the study's tables."""
    done = {outcome.name: outcome.shipped for plan in plans for _, outcome, _ in plan.known
            if outcome.state is State.DONE}  # fmt: skip
    if words := origin_words(sum(done.values()), len(done)):
        yield words
    if words := origin_words(*count_shipped(results.folder / "runs.csv")):
        yield f"Of the tables in {results.folder}: {words}"


def _seconds_left(plan: _Plan, images_per_second: float, otherwise: float) -> float:
    """`otherwise`: seconds per round of an arm that nothing is known of."""
    speed = plan.seconds_per_round()
    if speed is None and images_per_second:
        return plan.images_left() / images_per_second
    return plan.rounds_left() * (otherwise if speed is None else speed)


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
