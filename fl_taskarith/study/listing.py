"""Lists what of a study is done and what is to do, and about how long the rest will take on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fl_taskarith.config.settings import Config
from fl_taskarith.server.speed import Speed, device_line, speed_of, work_of
from fl_taskarith.storage.folder_choice import last_saved_round
from fl_taskarith.storage.progress import duration
from fl_taskarith.study.elsewhere import made_elsewhere
from fl_taskarith.study.one_run import describe_run
from fl_taskarith.study.plan import Plan, plans_of
from fl_taskarith.study.results import State, StudyResults, run_folder
from fl_taskarith.study.shipped import MARK, count_shipped, origin_words
from fl_taskarith.workspace.probe import SPEED_KEYS

GLANCE, MEASUREMENT = 2.0, 20.0  # seconds in which the speeds of all kinds of runs left are measured, briefly or well
LONG = 600.0  # seconds of work from which they are measured well
LARGEST_TABLE = 30  # lines, so that a listing fits on a screen


def list_study(results: StudyResults, *, every_run: bool = False) -> Iterator[str]:
    """Yield a line per group of arms, or per run, and one with the time left at the speed that is measured now."""
    plans = plans_of(results)
    yield f"{results.study.title}: {results.folder}"
    left = runs_left(plans)
    speeds = measure(left, GLANCE)
    if seconds_left(plans, speeds) > LONG:
        speeds = measure(left, MEASUREMENT)
    if every_run:
        for plan in plans:
            for run, outcome, reported in plan.known:
                line = describe_run(plan.arm, run, outcome, reported=reported)
                yield f"{line} | {MARK}" if outcome.shipped else line
            if plan.later:
                later = f"up to {len(plan.later)} more runs once the search has chosen"
                yield f"{plan.arm.title} | {later}: {State.TO_DO}"
    else:
        yield from _table(plans, speeds)
    yield from (f"{plan.arm.title} | {plan.problem}" for plan in plans if plan.problem)
    yield from dict.fromkeys(f"{plan.arm.title} | unusable, and set aside before it is run again: {outcome.cause}"
                             for plan in plans for _, outcome, _ in plan.known
                             if outcome.state is State.UNUSABLE)  # fmt: skip
    yield from _origins(results, plans)
    yield from made_elsewhere(results, plans)
    if not left:
        if not any(plan.problem for plan in plans):
            yield "Nothing is left to do."
        return
    yield from _measured_lines(left, speeds)
    rounds = sum(round(run.num_rounds * share_left(run)) for run in left)
    seconds = seconds_left(plans, speeds)
    took = f"about {duration(seconds)} of one process here" if seconds else "regression data: no estimate"
    yield f"Left: {len(left)} runs of {rounds} rounds, {took}."


def _origins(results: StudyResults, plans: Sequence[Plan]) -> Iterator[str]:
    """Say how many runs were shipped with the project: of those in folders, and of those in the study's tables."""
    done = {outcome.name: outcome.shipped for plan in plans for _, outcome, _ in plan.known
            if outcome.state is State.DONE}  # fmt: skip
    if words := origin_words(sum(done.values()), len(done)):
        yield words
    if words := origin_words(*count_shipped(results.folder / "runs.csv")):
        yield f"Of the tables in {results.folder}: {words}"


def measure(runs: Sequence[Config], seconds: float) -> dict[tuple[object, ...], Speed]:
    """Measure this machine's speed for each kind of run, in about `seconds` for all of them together."""
    kinds = {_kind(run): run for run in runs}
    measured = {kind: speed_of(run, seconds / len(kinds)) for kind, run in kinds.items()}
    return {kind: speed for kind, speed in measured.items() if speed is not None}


def runs_left(plans: Sequence[Plan]) -> list[Config]:
    """Return the runs left in all plans; one that several arms ask for counts once."""
    left = [run for plan in plans for run in plan.left()]
    return list({run.run_name or number: run for number, run in enumerate(left)}.values())


def share_left(run: Config, *, going: bool = False) -> float:
    """Return the share of a run's rounds that is left; 1 if it has not begun.

    Args:
        going: whether it is being trained; if not, it goes on from its last checkpoint.
    """
    done = last_round if going else last_saved_round
    return 1 - max(0, done(run_folder(run))) / run.num_rounds if run.run_name else 1.0


def last_round(folder: Path) -> int:
    """Return the round of the last whole line of rounds.csv; -1 before there is one."""
    try:
        lines = (folder / "rounds.csv").read_text(encoding="utf-8").splitlines()[1:]
        return int(lines[-1].partition(",")[0]) if lines else -1
    except (OSError, ValueError):
        return -1


def seconds_left(plans: Sequence[Plan], speeds: dict[tuple[object, ...], Speed], *, going: bool = False) -> float:
    """Estimate the seconds of one process for all runs left; an arm's runs share its mask, a kind's runs its cache."""
    total, cached, counted = 0.0, set(), set()
    for plan in plans:
        for number, run in enumerate(plan.left()):
            work, speed = work_of(run), speeds.get(_kind(run))
            if work is None or speed is None or run.run_name in counted:
                continue
            counted |= {run.run_name} if run.run_name else set()
            work = work.again() if number else work
            total += replace(work, frozen=0 if _kind(run) in cached else work.frozen).seconds(speed) * share_left(
                run, going=going
            )
            cached.add(_kind(run))
    return total


def _kind(run: Config) -> tuple[object, ...]:
    return tuple(getattr(run, name) for name in SPEED_KEYS)


def _table(plans: Sequence[Plan], speeds: dict[tuple[object, ...], Speed]) -> Iterator[str]:
    """List runs done and to do, and time left, by group; by arm where there are no groups and few arms."""
    by_arm = len({plan.arm.group for plan in plans}) == 1 and len(plans) <= LARGEST_TABLE
    parts: dict[str, list[Plan]] = {}
    for plan in plans:
        parts.setdefault(plan.arm.label if by_arm else plan.arm.group or "all arms", []).append(plan)
    rows = [("arm" if by_arm else "group", "arms", "runs done", "to do", "time left")]
    for name, part in list(parts.items())[:LARGEST_TABLE]:
        to_do = sum(len(plan.left()) for plan in part)
        seconds = seconds_left(part, speeds)
        done = str(sum(plan.settled for plan in part))
        rows.append((name, str(len(part)), done, str(to_do), duration(seconds) if seconds else "–"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    if len(parts) > LARGEST_TABLE:
        yield f"... and {len(parts) - LARGEST_TABLE} more groups; --list all names every run"


def _measured_lines(runs: Sequence[Config], speeds: dict[tuple[object, ...], Speed]) -> Iterator[str]:
    """Say what was measured: a line per kind of run, three at most."""
    kinds = {_kind(run): run for run in runs if _kind(run) in speeds}
    for kind, run in list(kinds.items())[:3]:
        part = "all blocks" if not run.trainable_blocks else f"last {run.trainable_blocks} blocks"
        part = "the head" if run.trainable == "head" else part
        line = device_line(run, speeds[kind])
        yield f"Measured here: {line} ({run.model} at {run.input_size} px, {part}, batches of {run.batch_size})"
    if len(kinds) > 3:
        yield f"... and {len(kinds) - 3} other kinds of runs"
