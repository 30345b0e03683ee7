"""Rules that drop a part of every task vector's entries."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fl_taskarith.merging.merge_rules import Direction, by_name, merge_rule
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.seeding import random_generator, torch_seed

LEFT_OUT = (0.15, 0.01)  # shares of the smallest and the largest entries that breadcrumbs drops


@merge_rule(
    "ties", "trim, elect sign, disjoint mean", source="Yadav et al., NeurIPS 2023", parameter="keep",
    meaning="share of entries of each task vector that stay", values=(0.1, 0.2, 0.5),
)  # fmt: skip
def ties(task_vectors: TaskVectors, keep: float) -> Direction:
    """Return the mean of the entries that agree with the elected sign, in the shapes of the task vectors.

    Of each task vector the share `keep` of entries of largest magnitude over all tensors stays; each entry takes the
    sign of the sum of what is left, and the mean of those that have it.

    Raises:
        ValueError: not 0 < keep <= 1, or an entry is not finite.
    """
    thresholds = torch.tensor([magnitude_threshold(vector, keep) for vector in task_vectors])

    def merged(name: str, rows: Tensor) -> Tensor:
        limit = thresholds.to(rows).view(-1, *[1] * (rows.dim() - 1))
        trimmed = rows * (rows.abs() >= limit)
        elected = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
        return elected.sum(0) / (elected != 0).sum(0).clamp(min=1)

    return by_name(task_vectors, merged)


@merge_rule(
    "dare", "the sum with random entries dropped and the others rescaled", source="Yu et al., ICML 2024",
    parameter="drop", meaning="share of entries of each task vector that are dropped, p", values=(0.5, 0.8, 0.9),
    summed=True,
)  # fmt: skip
def dare(task_vectors: TaskVectors, drop: float, seed: int = 0) -> Direction:
    """Return Σ of task vectors whose entries are each dropped with probability p = `drop`, the others times 1/(1 − p).

    What is dropped is a function of (seed, tensor, model). Shapes are those of the task vectors.

    Raises:
        ValueError: not 0 <= p < 1.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"DARE drops a share of 0 <= p < 1, not {drop}")

    def dropped_sum(name: str, rows: Tensor) -> Tensor:
        for model, row in enumerate(rows):
            generator = torch.Generator().manual_seed(torch_seed(random_generator(seed, f"dare {name}", 0, model)))
            row.mul_(torch.rand(row.shape, generator=generator).to(row.device) >= drop)
        return rows.sum(0) / (1 - drop)

    return by_name(task_vectors, dropped_sum)


@merge_rule(
    "breadcrumbs", "the sum without each tensor's largest and smallest entries",
    source="Davari & Belilovsky, ECCV 2024", summed=True,
)  # fmt: skip
def breadcrumbs(task_vectors: TaskVectors) -> Direction:
    """Return Σ of task vectors without the largest 1 % and the smallest 15 % of each tensor's entries by magnitude.

    Shapes are those of the task vectors. Of n entries ⌊0.01 n⌋ and ⌊0.15 n⌋ are dropped, the first of equals.
    """

    def middle_sum(name: str, rows: Tensor) -> Tensor:
        for row in rows:
            entries = row.flatten()
            order = entries.abs().argsort(stable=True)
            smallest, largest = int(LEFT_OUT[0] * len(order)), int(LEFT_OUT[1] * len(order))
            entries[order[:smallest]] = 0
            entries[order[len(order) - largest :]] = 0
            row.copy_(entries.view(row.shape))
        return rows.sum(0)

    return by_name(task_vectors, middle_sum)


def magnitude_threshold(task_vector: Mapping[str, Tensor], keep: float) -> float:
    """Return the smallest of the ⌈keep · N⌉ largest |τ_j| over all tensors, of any shape, together.

    Entries of at least that magnitude are kept, ties included; 0 keeps everything. One tensor is read at a time; the
    magnitudes take as much memory as the direction will.

    Raises:
        ValueError: `keep` is not above 0 and at most 1, or an entry is not finite.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the share of entries kept must be above 0 and at most 1, not {keep}")
    sizes = [task_vector[name].numel() for name in task_vector]
    magnitudes = torch.empty(sum(sizes))
    for name, part in zip(task_vector, magnitudes.split(sizes), strict=True):
        part.copy_(task_vector[name].flatten()).abs_()
        if not bool(part.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite")
    place = len(magnitudes) - math.ceil(keep * len(magnitudes) - 1e-9)
    magnitudes.numpy().partition(place)
    return float(magnitudes[place])
