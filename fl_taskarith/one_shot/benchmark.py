"""Runs a one-shot benchmark: cell by cell, each a file; what is done stays done."""

import csv
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError, Divergence, FlTaskarithError, StudyError
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.merging.merge_rules import scaled_weights
from fl_taskarith.one_shot.benchmark_file import Cell, OneShot
from fl_taskarith.one_shot.finetune import (
    FineTuned,
    Spread,
    TaskScore,
    Training,
    fine_tune_all,
    plan_training,
    score_tasks,
    solve_heads,
)
from fl_taskarith.one_shot.scale_search import normalised_accuracy, search_merge
from fl_taskarith.one_shot.tasks import Task, folder_tasks, make_tasks
from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.paths import resolve
from fl_taskarith.storage.processes import worker_pool
from fl_taskarith.storage.run_log import RUN_LOG, recorded
from fl_taskarith.workspace.workspace import Resident

Record = dict[str, Any]

CHECKSUM = "sha256"  # in a cell's record: of the rest of it

log = logging.getLogger(__name__)


def run_one_shot(one_shot: OneShot, root: Path, jobs: int = 1, budget: float | None = None) -> None:
    """Run the cells that are left, each in turn or in one of `jobs` processes, and write tables and figures.

    Args:
        root: the folder of all one-shot results; this one gets root/NAME.
        budget: seconds after which no cell is started any more.

    Raises:
        StudyError: cells failed; all others were run.
    """
    with recorded(root / one_shot.name / RUN_LOG), _processes(jobs) as executor:
        _run_one_shot(one_shot, root / one_shot.name, executor, None if budget is None else time.time() + budget)


def _run_one_shot(
    one_shot: OneShot, folder: Path, executor: ProcessPoolExecutor | None, deadline: float | None
) -> None:
    from fl_taskarith.one_shot.benchmark_tables import write_tables

    one_shot = at_chosen_rate(one_shot, folder, executor)
    left = [cell for cell in one_shot.cells if read_cell(one_shot, cell, folder) is None]
    print(f"{one_shot.title}: {folder}; {len(one_shot.cells) - len(left)} of {len(one_shot.cells)} cells are done")
    failures: list[str] = []
    try:
        for number, problem in enumerate(_run_all(one_shot, left, folder, executor, deadline), start=1):
            if problem is None:
                print("The budget is spent: no further cell was started. The same command goes on from here.")
                break
            failures += [problem] if problem else []
            print(f"cell {number} of {len(left)}{': ' + problem if problem else ''}", flush=True)
    finally:
        write_tables(one_shot, folder)
    print(f"Tables: {folder / 'README.md'}")
    if failures:
        raise StudyError(f"{len(failures)} cells failed, the others are kept:\n  " + "\n  ".join(failures))


def _run_all(
    one_shot: OneShot, cells: Sequence[Cell], folder: Path, executor: ProcessPoolExecutor | None, deadline: float | None
) -> Iterator[str | None]:
    """A word on each cell's failure, "" for none, None where it was not started because the budget is spent."""
    if executor is None:
        yield from (_run_one(one_shot, cell, folder, deadline) for cell in cells)
        return
    futures = [executor.submit(_run_one, one_shot, cell, folder, deadline) for cell in cells]
    yield from (future.result() for future in futures)


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """This process for one job (None), else as many others, which stay for all that is to be done."""
    if jobs == 1:
        yield None
        return
    executor = worker_pool(jobs)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _run_one(one_shot: OneShot, cell: Cell, folder: Path, deadline: float | None) -> str | None:
    if deadline is not None and time.time() > deadline:
        return None
    try:
        started = time.perf_counter()
        record = run_cell(one_shot, cell) | {"environment": environment()}
        path = _cell_path(one_shot, cell, folder)
        make_folder(path.parent)
        record["seconds"] = time.perf_counter() - started
        record[CHECKSUM] = _checksum(record)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
    except Exception as error:  # of ours or of the machine (out of memory): the other cells go on
        if not isinstance(error, FlTaskarithError):
            log.error("A cell failed in a way that is not foreseen.", exc_info=True)
        return f"{cell.data}, {cell.training}, seed {cell.seed}: {type(error).__name__}: {error}"
    return ""


def read_cell(one_shot: OneShot, cell: Cell, folder: Path) -> Record | None:
    """What `run_cell` found for this cell under these settings and at least these methods; None if it was not run.

    Nor was it where its file is damaged, which is warned of.
    """
    path = _cell_path(one_shot, cell, folder)
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop(CHECKSUM, None) not in (None, _checksum(record)):
            raise ValueError("another checksum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("The cell %s is damaged (%s); it is run anew.", path, error)
        return None
    return record if set(one_shot.methods) <= record.get("methods", {}).keys() else None


def _checksum(record: Record) -> str:
    """Of the record as it is read back, whose keys are strings."""
    as_read = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _cell_path(one_shot: OneShot, cell: Cell, folder: Path) -> Path:
    words = re.sub(r"[^a-z0-9.]+", "-", f"{cell.data}-{cell.training}".lower()).strip("-.")
    return folder / "cells" / f"{words}-s{cell.seed}-{one_shot.fingerprint(cell)}.json"


def prepare(one_shot: OneShot, overlap: float, seed: int) -> tuple[Resident, list[Task]]:
    """Model and preprocessing, of this process alone, and the tasks of a data level."""
    config = one_shot.config(seed)
    home = Resident(config)  # not the shared one: heads of the tasks are put into its model
    if one_shot.family != "folders":
        return home, make_tasks(home.data, one_shot.family, one_shot.number, overlap, seed)
    if overlap:
        raise ConfigError("Data sets in folders of their own have nothing in common: set overlap = 0.")
    folders = [resolve(folder, "folders") for folder in one_shot.folders]
    return home, folder_tasks(folders, config.input_size, home.device, seed)


def run_cell(one_shot: OneShot, cell: Cell) -> Record:
    """Fine-tune a model per task, merge them by every method at its best hyper-parameters, and score on test.

    Raises:
        FlTaskarithError: with the cause.
    """
    home, tasks = prepare(one_shot, cell.overlap, cell.seed)
    heads = solve_heads(home, tasks, one_shot.shared_head)
    plans = plan_training(home.config, len(tasks), cell.spread, cell.seed)
    tuned = fine_tune_all(home, tasks, heads, plans, cell.seed)
    vectors = [each.task_vector for each in tuned]

    def score(split: str, weights: dict[str, torch.Tensor]) -> list[TaskScore]:
        return score_tasks(home, weights, _split(tasks, split), heads)

    def alone(split: str) -> list[TaskScore]:
        models = [scaled_weights(home.pretrained, vector, 1.0) for vector in vectors]
        return [score_tasks(home, model, [getattr(task, split)], [head])[0]
                for model, task, head in zip(models, tasks, heads, strict=True)]  # fmt: skip

    own = {split: alone(split) for split in ("validation", "test")}
    if unusable := [task.name for task, found in zip(tasks, own["validation"], strict=True) if not found.accuracy]:
        raise ConfigError(f"The fine-tuned models of {', '.join(unusable)} get nothing right: lower learning-rate.")
    merges = {}
    for method in one_shot.methods:
        merged = search_merge(
            method, vectors, home.pretrained, lambda weights: score("validation", dict(weights)), own["validation"],
            [each.step_coefficient_sum for each in tuned], cell.seed,
        )  # fmt: skip
        test = score("test", scaled_weights(home.pretrained, merged.direction, merged.scale))
        merges[method] = {
            "value": merged.value,
            "scale": merged.scale,
            "edge": merged.edge,
            "val_normalised": merged.normalised,
            "test_normalised": normalised_accuracy(test, own["test"]),
            "test_accuracy": fmean(each.accuracy for each in test),
            "test_by_task": [each.accuracy for each in test],
        }
    return {
        "tasks": [_task_record(*each) for each in zip(tasks, plans, tuned, own["test"], strict=True)],
        "pretrained_test_accuracy": fmean(each.accuracy for each in score("test", {})),
        "own_test_accuracy": fmean(each.accuracy for each in own["test"]),
        "mean_cosine": mean_cosine(vectors),
        "learning_rate": home.config.peak_rate,
        "methods": merges,
    }


def at_chosen_rate(one_shot: OneShot, folder: Path, executor: ProcessPoolExecutor | None = None) -> OneShot:
    """The benchmark at the learning rate of search.csv, which is written, once, if the rate is to be searched.

    The rate whose models do best by themselves on validation: mean over tasks and over the lowest and the highest data
    level, equal training, first seed. Merging has no part in it, so that it favours no method.
    """
    if not one_shot.rates:
        return one_shot
    path, spread = folder / "search.csv", next(iter(one_shot.training.values()))
    levels = dict.fromkeys((next(iter(one_shot.data.values())), list(one_shot.data.values())[-1]))
    key = "-".join(one_shot.fingerprint(Cell("", overlap, "", spread, one_shot.seeds[0])) for overlap in levels)
    lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    found = {float(line["learning_rate"]): float(line["val_accuracy"]) for line in lines if line["settings"] == key}
    left = [rate for rate in one_shot.rates if rate not in found]
    trials = [(one_shot.at_rate(rate), overlap, spread) for rate in left for overlap in levels]
    accuracies = _own_accuracies(trials, executor)
    for rate in left:
        found[rate] = fmean([next(accuracies) for _ in levels])
        print(f"learning rate {rate:g}: own models' validation accuracy {found[rate]:.4f}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{each},{accuracy!r},{key}" for each, accuracy in sorted(found.items())]
        write_atomically(path, "\n".join(["learning_rate,val_accuracy,settings", *rows]) + "\n")
    best = max(one_shot.rates, key=lambda rate: (found[rate], -rate))
    if best in (one_shot.rates[0], one_shot.rates[-1]):
        print(f"The learning rate {best:g} lies at an end of what was searched: it is not tuned.")
    return one_shot.at_rate(best)


def _own_accuracies(
    trials: Sequence[tuple[OneShot, float, Spread]], executor: ProcessPoolExecutor | None
) -> Iterator[float]:
    """`_own_accuracy` of each, in order."""
    if executor is None or not trials:
        return itertools.starmap(_own_accuracy, trials)
    return executor.map(_own_accuracy, *zip(*trials, strict=True))


def _own_accuracy(one_shot: OneShot, overlap: float, spread: Spread) -> float:
    """Mean over tasks of the validation accuracy of each task's own model; 0 where one diverges."""
    seed = one_shot.seeds[0]
    home, tasks = prepare(one_shot, overlap, seed)
    heads = solve_heads(home, tasks, one_shot.shared_head)
    plans = plan_training(home.config, len(tasks), spread, seed)
    try:
        tuned = fine_tune_all(home, tasks, heads, plans, seed)
    except Divergence:
        return 0.0
    models = [scaled_weights(home.pretrained, each.task_vector, 1.0) for each in tuned]
    return fmean(score_tasks(home, model, [task.validation], [head])[0].accuracy
                 for model, task, head in zip(models, tasks, heads, strict=True))  # fmt: skip


def mean_cosine(vectors: Sequence[dict[str, torch.Tensor]]) -> float:
    """Mean cosine between the task vectors of two tasks: how far they agree."""
    flat = torch.stack([torch.cat([value.flatten() for value in vector.values()]).double() for vector in vectors])
    unit = torch.nn.functional.normalize(flat, dim=1)
    products = unit @ unit.T
    pairs = len(flat) * (len(flat) - 1)
    return float((products.sum() - products.diagonal().sum()) / pairs)


def _split(tasks: Sequence[Task], split: str) -> list[ImageSet]:
    return [getattr(task, split) for task in tasks]


def _task_record(task: Task, plan: Training, tuned: FineTuned, own: TaskScore) -> Record:
    return {
        "name": task.name,
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "test_examples": len(task.test),
        "local_steps": plan.local_steps,
        "learning_rate": plan.learning_rate,
        "batch_size": plan.batch_size,
        "step_coefficient_sum": tuned.step_coefficient_sum,
        "task_vector_norm": task_vector_norm(tuned.task_vector),
        "own_test_accuracy": own.accuracy,
    }
