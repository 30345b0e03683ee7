"""Do one run of a study, from what its folder holds to its end or the deadline, and describe it in a line."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import traceback
from pathlib import Path

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import BudgetSpent, CheckpointError, Damaged, Divergence, FlTaskarithError, FolderInUse
from fl_taskarith.figures.statistics import run_key, seed_words
from fl_taskarith.server import simulate as simulation
from fl_taskarith.server.course import gain
from fl_taskarith.server.round_zero_cache import Starts
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.folder_choice import hold
from fl_taskarith.study.definition import Arm
from fl_taskarith.study.results import FAILURE, SETTLED, Outcome, State, inspect, run_folder

_starts = Starts()  # of this process, which does the runs of a search one after the other


def run_once(run: Config, deadline: float | None) -> Outcome:
    """Start or resume `run`; at `deadline` (of time.time) it stops with a checkpoint. It prints to run.log alone.

    A folder that is damaged, or of another version of the user's module, is set aside, and the run begins again.
    """
    before = inspect(run)
    if before.state in SETTLED:
        return before
    folder, kept = run_folder(run), ""
    try:
        if before.state is State.UNUSABLE:
            kept = _set_aside(folder)
        make_folder(folder)
        (folder / FAILURE).unlink(missing_ok=True)
    except (CheckpointError, OSError) as error:  # which the folder cannot tell: the other runs go on
        return Outcome(State.FAILED, cause=str(error), name=folder.name)
    try:
        try:
            _simulate(run, deadline)
        except Damaged:
            kept = _set_aside(folder)
            _simulate(run, deadline)
    except BudgetSpent:
        pass
    except FolderInUse as error:  # whoever writes there will say how it ended
        return Outcome(State.FAILED, cause=str(error), name=folder.name)
    except Exception as error:  # of ours or of the machine (out of memory): the other runs go on
        diverged = isinstance(error, Divergence)
        failure = {
            "run": folder.name,
            "diverged": diverged,
            "cause": str(error) if diverged else f"{type(error).__name__}: {error}",
        }
        if not isinstance(error, FlTaskarithError):
            failure["traceback"] = traceback.format_exc()
        write_atomically(folder / FAILURE, json.dumps(failure, indent=2) + "\n")
    after = inspect(run)
    if after.state in SETTLED:
        for leftover in ("checkpoints", "client-states"):  # of many runs they would fill a disk; nothing needs them now
            shutil.rmtree(folder / leftover, ignore_errors=True)
    return dataclasses.replace(after, cause=kept) if after.state is State.DONE else after


def _simulate(run: Config, deadline: float | None) -> None:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        simulation.simulate(run, deadline=deadline, starts=_starts)


def _set_aside(folder: Path) -> str:
    """Move a run's folder, with all that is in it, to set-aside/ beside the runs; return where, in words.

    Raises:
        CheckpointError, OSError: it cannot be moved, or another process is writing there.
    """
    lock, place = hold(folder), folder.parent.with_name("set-aside")
    try:
        make_folder(place)
        names = (place / f"{folder.name}-{number}" for number in itertools.count(1))
        kept = next(path for path in names if not path.exists())
        folder.rename(kept)
    finally:
        if lock is not None:
            lock.release()
    return f"run again; its earlier folder is kept as {kept}"


def describe_run(arm: Arm, run: Config, outcome: Outcome, *, reported: bool) -> str:
    """Return one line; test accuracy only of runs that are reported, since the search must not see it."""
    seeds = seed_words(run_key(run.seed, run.shard_seed))
    words = [arm.title, f"rate {run.peak_rate:g}", seeds, f"rounds {run.num_rounds}"]
    if outcome.state is not State.DONE:
        return " | ".join([*words, f"{outcome.state}: {outcome.cause}" if outcome.cause else str(outcome.state)])
    measured = {"val": "val_accuracy"} | ({"test": "test_accuracy"} if reported else {})
    for name, column in measured.items():
        if (value := outcome.rows[-1].get(column)) is not None:
            words.append(f"{name} {100 * value:.2f} %")
    if outcome.cause:
        words.append(outcome.cause)
    if reported and (gain(outcome.rows) or 0.0) < 0:
        words.append(f"below the {run.head_words}")
    return " | ".join([*words, f"{outcome.seconds:.1f} s"])
