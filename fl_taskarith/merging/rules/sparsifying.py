"""Rules that drop a part of every task vector's entries."""

import torch
from torch import Tensor

from fl_taskarith.merging.merge_rules import Direction, by_name, merge_rule
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.merging.trimming import magnitude_threshold
from fl_taskarith.seeding import random_generator, torch_seed


@merge_rule(
    "ties", "trim, elect sign, disjoint mean", source="Yadav et al., NeurIPS 2023", parameter="keep",
    meaning="share of entries of each task vector that stay", values=(0.1, 0.2, 0.5),
)  # fmt: skip
def ties(task_vectors: TaskVectors, keep: float) -> Direction:
    """Return the mean of the entries that agree with the elected sign, in the shapes of the task vectors.

    Of each task vector the share `keep` of entries of largest magnitude over all tensors stays; each entry takes the
    sign of the sum of what is left, and the mean of those that have it.
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
