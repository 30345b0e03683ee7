"""Merge rules of a user's own, outside the package."""

import torch

from fl_taskarith.merging.merge_rules import by_name, merge_rule

TaskVectors = list[dict[str, torch.Tensor]]


@merge_rule("shrunken-mean", "the mean, shrunken", parameter="shrink", meaning="factor on the mean", values=(0.5, 1.0))
def shrunken_mean(task_vectors: TaskVectors, shrink: float) -> dict[str, torch.Tensor]:
    return by_name(task_vectors, lambda name, rows: shrink * rows.mean(0))


def first(task_vectors: TaskVectors) -> dict[str, torch.Tensor]:
    """The first task vector."""
    return dict(task_vectors[0])


def mistaken(task_vectors: TaskVectors) -> object:
    """Returns one number for every tensor."""
    return {name: rows.mean() for name, rows in task_vectors[0].items()}


def raising(task_vectors: TaskVectors, other: int) -> object:
    """Takes an argument that no rule is given."""
    return task_vectors[other]
