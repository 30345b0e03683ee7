"""What stands under a study's tables: what numbers mean, how rates were chosen, the machine, the cost, the command."""

import math
from collections.abc import Sequence
from statistics import median

from fl_taskarith.study.comparison import Comparison
from fl_taskarith.study.definition import Study
from fl_taskarith.study.results import Outcome, State, StudyResults
from fl_taskarith.study.search import Search
from fl_taskarith.study.study_file import shown_setting
from fl_taskarith.study.table_records import machine_list, speed


def footnote(results: StudyResults, rows: Sequence[Comparison]) -> str:
    """How the rates were chosen, what ± and the intervals mean, the machine, and the command."""
    study = results.study
    seeds = ", ".join(str(seed) for seed in study.seeds)
    notes = [
        f"± is the sample standard deviation over n seeds (of {seeds}; each is both seed and shard-seed). Gains and "
        "differences are in percentage points, matched by seed, with 95 % t intervals. Detectable: the true difference "
        "that a paired two-sided t test at 5 % finds with about 80 % power, given the spread of these differences. "
        "Ridge head: round 0, before any training.",
        _about_rates(study),
    ]
    if study.shared:
        notes.append("Settings: " + ", ".join(f"`{shown_setting(*item)}`" for item in study.shared.items()))
    found = [outcome for row in rows for outcome in row.results.outcomes.values()]
    # Once each: an arm may stand in two tables.
    outcomes = list({each.name: each for each in found if each.state is State.DONE}.values())
    machines = machine_list([each.record for each in outcomes if each.record])
    hardware = f"Hardware: {'; '.join(machines)}. " if machines else ""
    if outcomes:
        notes.append(hardware + _cost(results, outcomes))
    notes.append(f"Command: `fl-taskarith study {study.source}`")
    return "\n\n".join(notes)


def _cost(results: StudyResults, final: Sequence[Outcome]) -> str:
    """Work on all runs, of one process after the other; how fast the final ones were."""
    reported = {outcome.name for outcome in final}
    trials = {outcome.name: outcome for arm in results.study.arms for outcome in results.trials(arm).values()}
    searched = [each for each in trials.values() if each.state is State.DONE and each.name not in reported]
    text = f"The {len(final)} final runs took {_duration(final)} of one process"
    if searched:
        text += f", the {len(searched)} others of the searches that did not diverge {_duration(searched)}"
    speeds = ""
    for unit, values in zip(("s a round", "training images/s"), zip(*map(speed, final), strict=True), strict=True):
        if found := sorted(value for value in values if not math.isnan(value)):
            speeds += f"; {median(found):.3g} {unit} ({found[0]:.3g} to {found[-1]:.3g})"
    return f"{text}{speeds}: medians, evaluation apart; each run's in runs.csv." if speeds else f"{text}."


def _duration(outcomes: Sequence[Outcome]) -> str:
    seconds = sum(outcome.seconds for outcome in outcomes)
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _about_rates(study: Study) -> str:
    search = study.search
    if search is None or not any(study.searched(arm) for arm in study.arms):
        return "Learning rates: as set, not searched."
    fixed = [arm.title for arm in study.arms if study.searched(arm) is None]
    own: dict[str, list[str]] = {}
    for arm in study.arms:
        if arm.search is not None and study.searched(arm) is not None:
            own.setdefault(_described(arm.search), []).append(arm.title)
    return (
        f"Learning rates: chosen per arm on validation accuracy alone among {_described(search)}, "
        f"seed {search.seed}; ties go to the smaller validation loss. A rate at an end of the grid is not tuned."
        + "".join(f" {'; '.join(titles)}: among {described}." for described, titles in own.items())
        + (f" Set, not searched: {', '.join(fixed)}." if fixed else "")
    )


def _described(search: Search) -> str:
    rungs = [f"all for {search.rounds[0]}"] + [f"the best {search.keep} for {rounds}" for rounds in search.rounds[1:]]
    ends = f"{search.low:g} to {search.high:g} ({search.per_decade} per decade)"
    return f"{len(search.rates)} from {ends}: {', then '.join(rungs)} rounds"
