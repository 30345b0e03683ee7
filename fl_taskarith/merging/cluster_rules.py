"""The aggregation rules by name, over task vectors of a round or a cluster, or over all clusters at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.grouped import Groups, geometric_medians, krum_choice, means, middle_mean, per_size
from fl_taskarith.merging.robust import (
    TaskVectors,
    coordinate_median,
    geometric_median,
    krum,
    median_dropped,
    trimmed_count,
    trimmed_mean,
)

RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")


def aggregate_by(rule: str, task_vectors: TaskVectors, weights: Sequence[float], share: float) -> dict[str, Tensor]:
    """Return the aggregate of `task_vectors`, tensors of any shape by name, under `rule`.

    Args:
        weights: numbers of examples, used by "mean" alone.
        share: β, the share of attackers that "trimmed-mean" drops at each end and that "krum" assumes.
    """
    if rule == "mean":
        mean = WeightedMean()
        for task_vector, weight in zip(task_vectors, weights, strict=True):
            mean.add(task_vector, weight)
        return mean.result()
    if rule == "median":
        return coordinate_median(task_vectors)
    if rule == "trimmed-mean":
        return trimmed_mean(task_vectors, share)
    if rule == "geometric-median":
        return geometric_median(task_vectors)
    if rule == "krum":
        return _krum(task_vectors, share)
    raise ValueError(f"{rule} is none of {', '.join(RULES)}")


def aggregate_groups(rule: str, rows: Tensor, groups: Groups, share: float) -> Tensor:
    """Return `aggregate_by` of every group's rows with equal weights: [N, d] to [B, d]."""
    if rule == "mean":
        return per_size(groups, rows, means)
    if rule == "median":
        return per_size(groups, rows, lambda same: middle_mean(same, median_dropped(same.shape[1])))
    if rule == "trimmed-mean":
        return per_size(groups, rows, lambda same: middle_mean(same, trimmed_count(share, same.shape[1])))
    if rule == "geometric-median":
        return geometric_medians([rows], groups)[0]
    if rule == "krum":
        return per_size(groups, rows, lambda same: _krum_rows(same, share))
    raise ValueError(f"{rule} is none of {', '.join(RULES)}")


def _krum(task_vectors: TaskVectors, share: float) -> dict[str, Tensor]:
    """Return Krum with the f of `_tolerated`; the median of one or two task vectors, which have no majority."""
    number = len(task_vectors)
    return coordinate_median(task_vectors) if number < 3 else krum(task_vectors, _tolerated(share, number))


def _krum_rows(rows: Tensor, share: float) -> Tensor:
    """Return `_krum` of b groups of n rows each, [b, n, d] to [b, d]."""
    number = rows.shape[1]
    if number < 3:
        return middle_mean(rows, median_dropped(number))
    return rows[torch.arange(len(rows)), krum_choice([rows], _tolerated(share, number))[:, 0]]


def _tolerated(share: float, number: int) -> int:
    """Return f = ⌊βn⌋, or the most Byzantine clients that Krum of n tolerates."""
    return min(trimmed_count(share, number), (number - 3) // 2)
