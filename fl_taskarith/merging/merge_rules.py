"""Merging T fine-tuned models at once: one round of federated averaging, with the remedies of both fields.

θ = θ₀ + λ · direction(τ_1, ..., τ_T). Every rule takes a sequence of task vectors and looks tensors up one name at a
time, so a task vector may read itself from a file: memory is T tensors of one name and one direction. The scaling is
that of Tao et al. (arXiv 2411.18607): of a sum for task arithmetic, FedGMA, CCLIP and DARE, of a mean for the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fl_taskarith.merging.robust import TaskVectors, coordinate_median, norms, stacked
from fl_taskarith.merging.trimming import magnitude_threshold
from fl_taskarith.seeding import random_generator, torch_seed

Direction = dict[str, Tensor]

SCALES = tuple(round(0.05 * step, 2) for step in range(1, 41))  # λ searched: 0.05, 0.10, ..., 2.0
GMA_THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
CLIPPING_RADII = 5  # evenly from the smallest to the largest norm of a task vector
KEPT_SHARES = (0.1, 0.2, 0.5)
DROPPED_SHARES = (0.5, 0.8, 0.9)


def task_arithmetic(task_vectors: TaskVectors) -> Direction:
    """Σ τ_t (Ilharco et al., ICLR 2023)."""
    return _by_name(task_vectors, lambda name, rows: rows.sum(0))


def average(task_vectors: TaskVectors) -> Direction:
    """Σ τ_t / T: the mean of the models."""
    return _by_name(task_vectors, lambda name, rows: rows.mean(0))


def fednova(task_vectors: TaskVectors, steps: Sequence[float]) -> Direction:
    """Σ (mean(K) / K_t / T) τ_t for K_t local steps: a model that took more of them does not count for more.

    Tao et al.'s form of FedNova, which is the mean for equal steps. The optimizer's `step_coefficient_sum` in place of
    the plain number counts momentum.
    """
    if len(steps) != len(task_vectors) or min(steps, default=1.0) <= 0:
        raise ValueError(f"FedNova needs a positive number of steps for each of {len(task_vectors)} models: {steps}")
    taken = torch.tensor(steps, dtype=torch.float64)
    weights = taken.mean() / taken / len(steps)
    return _by_name(task_vectors, lambda name, rows: torch.tensordot(weights.to(rows), rows, dims=1))


def fedgma(task_vectors: TaskVectors, threshold: float) -> Direction:
    """m ⊙ Σ τ_t, m = 1 where |Σ sign τ_t| / T is at least ρ = `threshold`, else that agreement (Tenison et al.)."""

    def masked_sum(name: str, rows: Tensor) -> Tensor:
        agreement = rows.sign().sum(0).abs() / len(rows)
        return rows.sum(0) * torch.where(agreement >= threshold, 1.0, agreement)

    return _by_name(task_vectors, masked_sum)


def median(task_vectors: TaskVectors) -> Direction:
    """The median of every entry (Yin et al., ICML 2018)."""
    return coordinate_median(task_vectors)


def cclip(task_vectors: TaskVectors, radius: float) -> Direction:
    """Σ τ_t min(1, ρ/‖τ_t‖), ρ = `radius`: centred clipping (Karimireddy et al.) once from 0, times T."""
    if not radius > 0:
        raise ValueError(f"centred clipping needs a radius above 0, not {radius}")
    shares = (radius / norms(task_vectors)).clamp(max=1.0)
    return _by_name(task_vectors, lambda name, rows: torch.tensordot(shares.to(rows), rows, dims=1))


def ties(task_vectors: TaskVectors, keep: float) -> Direction:
    """Trim, elect sign, disjoint mean (Yadav et al., NeurIPS 2023).

    Of each task vector the share `keep` of entries of largest magnitude over all tensors stays; each entry takes the
    sign of the sum of what is left, and the mean of those that have it.
    """
    thresholds = torch.tensor([magnitude_threshold(vector, keep) for vector in task_vectors])

    def merged(name: str, rows: Tensor) -> Tensor:
        limit = thresholds.to(rows).view(-1, *[1] * (rows.dim() - 1))
        trimmed = rows * (rows.abs() >= limit)
        elected = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
        return elected.sum(0) / (elected != 0).sum(0).clamp(min=1)

    return _by_name(task_vectors, merged)


def dare(task_vectors: TaskVectors, drop: float, seed: int = 0) -> Direction:
    """Σ of task vectors whose entries are each dropped with probability p = `drop`, the others times 1/(1 − p).

    Yu et al. (ICML 2024) on task arithmetic. What is dropped is a function of (seed, tensor, model).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"DARE drops a share of 0 <= p < 1, not {drop}")

    def dropped_sum(name: str, rows: Tensor) -> Tensor:
        for model, row in enumerate(rows):
            generator = torch.Generator().manual_seed(torch_seed(random_generator(seed, f"dare {name}", 0, model)))
            row.mul_(torch.rand(row.shape, generator=generator).to(row.device) >= drop)
        return rows.sum(0) / (1 - drop)

    return _by_name(task_vectors, dropped_sum)


@dataclass(frozen=True)
class MergeRule:
    """A rule and what is searched for it.

    parameter: its hyper-parameter's name, "" if it has none. values: those searched, given the task vectors. scaled:
    whether λ is searched; otherwise it is 1. summed: whether the direction scales as a sum of task vectors.
    """

    direction: Callable[..., Direction]
    parameter: str = ""
    values: Callable[[TaskVectors], Sequence[float]] = lambda task_vectors: ()
    scaled: bool = True
    summed: bool = False

    def default_scale(self, number: int) -> float:
        """λ at which equal task vectors merge into themselves: 1/T for a sum, 1 for a mean."""
        return 1 / number if self.summed else 1.0


def clipping_radii(task_vectors: TaskVectors) -> Sequence[float]:
    """Evenly from the smallest to the largest norm of a task vector."""
    lengths = norms(task_vectors)
    return sorted(set(torch.linspace(float(lengths.min()), float(lengths.max()), CLIPPING_RADII).tolist()))


MERGE_RULES: dict[str, MergeRule] = {
    "task-arithmetic": MergeRule(task_arithmetic, summed=True),
    "average": MergeRule(average, scaled=False),
    "fednova": MergeRule(fednova),
    "fedgma": MergeRule(fedgma, "threshold", lambda task_vectors: GMA_THRESHOLDS, summed=True),
    "median": MergeRule(median),
    "cclip": MergeRule(cclip, "radius", clipping_radii, summed=True),
    "ties": MergeRule(ties, "keep", lambda task_vectors: KEPT_SHARES),
    "dare": MergeRule(dare, "drop", lambda task_vectors: DROPPED_SHARES, summed=True),
}


def merge_direction(
    method: str, task_vectors: TaskVectors, value: float | None, steps: Sequence[float], seed: int
) -> Direction:
    """The direction of the rule `method` at the value of its hyper-parameter, if it has one."""
    rule = MERGE_RULES[method]
    arguments: dict[str, Any] = {rule.parameter: value} if rule.parameter else {}
    if method == "fednova":
        arguments["steps"] = steps
    if method == "dare":
        arguments["seed"] = seed
    return rule.direction(task_vectors, **arguments)


def _by_name(task_vectors: TaskVectors, combine: Callable[[str, Tensor], Tensor]) -> Direction:
    """`combine` of the stacked tensors [T, ...] of every name."""
    if not task_vectors:
        raise ValueError("there are no task vectors to merge")
    for vector in task_vectors:
        if vector.keys() != task_vectors[0].keys():
            different = sorted(vector.keys() ^ task_vectors[0].keys())
            raise ValueError(f"tensors in one task vector and not in another: {', '.join(different)}")
    return {name: combine(name, stacked(task_vectors, name)) for name in task_vectors[0]}


def scaled_weights(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor], scale: float) -> Direction:
    """θ₀ + λ · direction, computed in the direction's type and returned in θ₀'s."""
    return {name: torch.add(weights[name].to(value), value, alpha=scale).to(weights[name]) for name, value in
            direction.items()}  # fmt: skip
