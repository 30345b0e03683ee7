"""Sums and means of task vectors."""

import math
from collections.abc import Sequence

import torch

from fl_taskarith.merging.merge_rules import Direction, by_name, merge_rule
from fl_taskarith.merging.robust import TaskVectors


@merge_rule("task-arithmetic", "the sum Σ τ_t", source="Ilharco et al., ICLR 2023", summed=True, streams=True)
def task_arithmetic(task_vectors: TaskVectors) -> Direction:
    """Return Σ τ_t, in the shapes of the task vectors."""
    return by_name(task_vectors, lambda name, rows: rows.sum(0))


@merge_rule(
    "average", "the mean of the models", source="Wortsman et al., ICML 2022", scaled=False, needs_base=False,
    streams=True,
)  # fmt: skip
def average(task_vectors: TaskVectors) -> Direction:
    """Return Σ τ_t / T, in the shapes of the task vectors."""
    return by_name(task_vectors, lambda name, rows: rows.mean(0))


@merge_rule("fednova", "the mean, each model divided by its local steps", source="Tao et al., arXiv 2411.18607")
def fednova(task_vectors: TaskVectors, steps: Sequence[float]) -> Direction:
    """Return Σ (mean(K) / K_t / T) τ_t for K_t local steps: a model that took more of them does not count for more.

    Tao et al.'s form of FedNova, which is the mean for equal steps. The optimizer's `step_coefficient_sum` in place of
    the plain number counts momentum. Shapes are those of the task vectors.

    Raises:
        ValueError: not a positive number of steps for each model.
    """
    if len(steps) != len(task_vectors) or not all(0 < taken < math.inf for taken in steps):
        raise ValueError(f"FedNova needs a positive number of steps for each of {len(task_vectors)} models: {steps}")
    taken = torch.tensor(steps, dtype=torch.float64)
    weights = taken.mean() / taken / len(steps)
    return by_name(task_vectors, lambda name, rows: torch.tensordot(weights.to(rows), rows, dims=1))
