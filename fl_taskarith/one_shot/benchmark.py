"""Runs a one-shot benchmark: cell by cell, each a file; finished cells are not run again."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fl_taskarith.errors import Divergence, FlTaskarithError, StudyError
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.merging.merge_rules import scaled_weights
from fl_taskarith.one_shot.benchmark_file import Cell, OneShot
from fl_taskarith.one_shot.benchmark_tables import write_tables
from fl_taskarith.one_shot.cell_results import Record, read_cell, write_cell
from fl_taskarith.one_shot.finetune import Spread, Training
from fl_taskarith.one_shot.scoring import TaskScore, Workbench, normalised_accuracy, search_merge
from fl_taskarith.one_shot.tasks import Task
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.environment import environment
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.processes import worker_pool
from fl_taskarith.storage.record_files import Within, read_csv
from fl_taskarith.storage.run_log import RUN_LOG, recorded
from fl_taskarith.training.schedules import step_coefficient_sum

Apply = Callable[..., Iterator[Any]]  # `map`, in this process or in others

SEARCH = {"learning_rate": Within(float, 0), "val_accuracy": Within(float, 0, 1), "settings": str}  # search.csv

log = logging.getLogger(__name__)


def run_one_shot(one_shot: OneShot, root: Path, jobs: int = 1, budget: float | None = None) -> None:
    """Run the cells that are left, one after the other or in `jobs` processes, and write tables and figures.

    Args:
        root: the folder of all one-shot results; this one gets root/NAME.
        budget: seconds after which no cell is started any more.

    Raises:
        StudyError: cells failed; all others were run.
    """
    folder, deadline = root / one_shot.name, None if budget is None else time.time() + budget
    make_folder(folder / "cells")
    with recorded(folder / RUN_LOG), ExitStack() as stack:
        apply: Apply = map if jobs == 1 else stack.enter_context(worker_pool(jobs)).map
        one_shot = at_chosen_rate(one_shot, folder, apply)
        left = [cell for cell in one_shot.cells if read_cell(one_shot, cell, folder) is None]
        print(f"{one_shot.title}: {folder}; {len(one_shot.cells) - len(left)} of {len(one_shot.cells)} cells are done")
        failures: list[str] = []
        try:
            for number, problem in enumerate(apply(partial(_run_one, one_shot, folder, deadline), left), start=1):
                if problem is None:
                    print("The budget is spent: no further cell was started. The same command goes on from here.")
                    break
                failures += [problem] if problem else []
                print(f"cell {number} of {len(left)}{': ' + problem if problem else ''}", flush=True)
        finally:
            write_tables(one_shot, folder)
        print(f"Tables: {folder / 'README.md'}")
    if failures:
        raise StudyError(f"{len(failures)} cells failed, all others were run:\n  " + "\n  ".join(failures))


def _run_one(one_shot: OneShot, folder: Path, deadline: float | None, cell: Cell) -> str | None:
    """Run one cell and return why it failed, "" if it did not; None if the budget is spent."""
    if deadline is not None and time.time() > deadline:
        return None
    try:
        started = time.perf_counter()
        record = run_cell(one_shot, cell) | {"environment": environment()}
        write_cell(one_shot, cell, folder, record | {"seconds": time.perf_counter() - started})
    except Exception as error:  # of ours or of the machine (out of memory): the other cells go on
        if not isinstance(error, FlTaskarithError):
            log.error("A cell failed in a way that is not foreseen.", exc_info=True)
        return f"{cell.data}, {cell.training}, seed {cell.seed}: {type(error).__name__}: {error}"
    return ""


def run_cell(one_shot: OneShot, cell: Cell) -> Record:
    """Fine-tune a model per task, merge them by every method at its best hyper-parameters, and score on test.

    Raises:
        FlTaskarithError: with the cause.
    """
    bench = Workbench(one_shot, cell.overlap, cell.seed)
    config, plans = bench.home.config, bench.plan(cell.spread)
    vectors = bench.fine_tune(plans)
    steps = [step_coefficient_sum(config, plan.local_steps, plan.learning_rate) for plan in plans]
    own, own_test = (bench.divisors(split, vectors) for split in ("validation", "test"))
    evaluate = partial(bench.scores, "validation")
    merges = {}
    for method in one_shot.methods:
        merged = search_merge(method, vectors, bench.home.pretrained, evaluate, own, steps, cell.seed)
        test = bench.scores("test", scaled_weights(bench.home.pretrained, merged.direction, merged.scale))
        merges[method] = {
            **{"value": merged.value, "scale": merged.scale, "edge": merged.edge, "val_normalised": merged.normalised},
            "test_normalised": normalised_accuracy(test, own_test),
            "test_accuracy": fmean(each.accuracy for each in test),
            "test_by_task": [each.accuracy for each in test],
        }
    return {
        "tasks": [_task_record(*each) for each in zip(bench.tasks, plans, steps, vectors, own_test, strict=True)],
        "pretrained_test_accuracy": fmean(each.accuracy for each in bench.scores("test", {})),
        "own_test_accuracy": fmean(each.accuracy for each in own_test),
        "mean_cosine": mean_cosine(vectors),
        "learning_rate": config.peak_rate,
        "methods": merges,
    }


def _task_record(task: Task, plan: Training, steps: float, vector: Mapping[str, Tensor], own: TaskScore) -> Record:
    return {
        "name": task.name,
        **{f"{split}_examples": len(getattr(task, split)) for split in ("train", "validation", "test")},
        **{"local_steps": plan.local_steps, "learning_rate": plan.learning_rate, "batch_size": plan.batch_size},
        **{"step_coefficient_sum": steps, "task_vector_norm": task_vector_norm(vector)},
        "own_test_accuracy": own.accuracy,
    }


def mean_cosine(vectors: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the mean cosine between two task vectors, tensors of any shapes: how far the tasks agree."""
    flat = torch.stack([torch.cat([value.flatten() for value in vector.values()]).double() for vector in vectors])
    unit = torch.nn.functional.normalize(flat, dim=1)
    products = unit @ unit.T
    pairs = len(flat) * (len(flat) - 1)
    return float((products.sum() - products.diagonal().sum()) / pairs)


def at_chosen_rate(one_shot: OneShot, folder: Path, apply: Apply = map) -> OneShot:
    """Return the benchmark at the learning rate of search.csv, which is written, once, if the rate is to be searched.

    The rate whose models do best by themselves on validation: mean over tasks and over the lowest and the highest data
    level, equal training, first seed. Merging has no part in it, so that it favours no method.
    """
    if not one_shot.rates:
        return one_shot
    path, spread = folder / "search.csv", next(iter(one_shot.training.values()))
    levels = dict.fromkeys((next(iter(one_shot.data.values())), list(one_shot.data.values())[-1]))
    key = "-".join(one_shot.fingerprint(Cell("", overlap, "", spread, one_shot.seeds[0])) for overlap in levels)
    lines = read_csv(path, SEARCH, "Delete it to search again.", optional=True) or []
    scores = {float(line["learning_rate"]): float(line["val_accuracy"]) for line in lines if line["settings"] == key}
    left = [rate for rate in one_shot.rates if rate not in scores]
    trials = [(one_shot.at_rate(rate), overlap, spread) for rate in left for overlap in levels]
    accuracies = apply(_own_accuracy, *zip(*trials, strict=True)) if trials else iter(())
    for rate in left:
        scores[rate] = fmean([next(accuracies) for _ in levels])
        print(f"learning rate {rate:g}: own models' validation accuracy {scores[rate]:.4f}", flush=True)
        make_folder(folder)
        rows = [{"learning_rate": each, "val_accuracy": scores[each], "settings": key} for each in sorted(scores)]
        write_atomically(path, csv_text(rows))
    best = max(one_shot.rates, key=lambda rate: (scores[rate], -rate))
    if best in (one_shot.rates[0], one_shot.rates[-1]):
        print(f"The learning rate {best:g} lies at an end of what was searched: it is not tuned.")
    return one_shot.at_rate(best)


def _own_accuracy(one_shot: OneShot, overlap: float, spread: Spread) -> float:
    """Return the mean over tasks of the validation accuracy of each task's own model; 0 where one diverges."""
    bench = Workbench(one_shot, overlap, one_shot.seeds[0])
    try:
        vectors = bench.fine_tune(bench.plan(spread))
    except Divergence:
        return 0.0
    return fmean(score.accuracy for score in bench.own_scores("validation", vectors))
