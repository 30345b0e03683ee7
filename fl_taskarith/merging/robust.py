"""Aggregation rules that are robust to outliers. Pure: lists of task vectors in, one task vector out.

Every client counts alike, since a client might lie about its number of examples. Coordinate-wise rules look at each
entry alone; the others measure distances over all tensors of a task vector together. Tensors are looked up one name at
a time, so a mapping may read them from a file; results have their shapes. Sums are float32, or float64 of float64.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fl_taskarith.config.choices import CLUSTER_RULES
from fl_taskarith.merging.aggregate import WeightedMean, check_names
from fl_taskarith.merging.grouped import (
    Groups,
    flat,
    geometric_medians,
    krum_choice,
    means,
    middle_mean,
    one_group,
    per_size,
)  # fmt: skip

TaskVectors = Sequence[Mapping[str, Tensor]]


def coordinate_median(task_vectors: TaskVectors) -> dict[str, Tensor]:
    """Return the median of every entry, the mean of the middle two for an even number (Yin et al. 2018, Definition 1).

    NaN sorts above every number, so a median is finite while fewer than half of the vectors are not.

    Raises:
        ValueError: no task vectors, or they differ in names or shapes.
    """
    return _coordinate_wise(task_vectors, median_dropped(len(task_vectors)))


def trimmed_mean(task_vectors: TaskVectors, share: float) -> dict[str, Tensor]:
    """Return the mean of every entry without its ⌊βn⌋ smallest and largest, β = `share` (ibid., Definition 2).

    Raises:
        ValueError: `share` is not in [0, ½); no task vectors, or they differ in names or shapes.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"trimmed share {share}: expected 0 <= share < 0.5")
    return _coordinate_wise(task_vectors, trimmed_count(share, len(task_vectors)))


def median_dropped(number: int) -> int:
    """Return how many of n the median drops at each end: all but the middle one or two."""
    return (number - 1) // 2


def trimmed_count(share: float, number: int) -> int:
    """Return ⌊βn⌋, how many of n are dropped at each end, for β as its decimal digits say: 0.29 of 100 is 29."""
    return math.floor(share * number + 1e-9)


def geometric_median(
    task_vectors: TaskVectors, tolerance: float = 1e-6, max_iterations: int = 100
) -> dict[str, Tensor]:
    """Return the point of least summed distance Σ ‖v − τ_k‖ to all task vectors, by Weiszfeld's iteration.

    It starts at their mean, takes the steps of Vardi & Zhang (PNAS 2000) where v meets a task vector, and stops when v
    moves by less than `tolerance` times the mean distance. Where a task vector itself is as good, it is returned, for
    Weiszfeld's iteration converges slowly to such a minimum. Task vectors with a NaN or infinite entry are left out.

    Raises:
        ValueError: no (finite) task vectors, or they differ in names or shapes.
    """
    names = names_of(task_vectors)
    rows = [stacked(task_vectors, name) for name in names]
    groups = one_group(len(task_vectors), rows[0].device)
    medians = geometric_medians(rows, groups, tolerance, max_iterations)
    return {name: median[0] for name, median in zip(names, medians, strict=True)}


def krum(task_vectors: TaskVectors, byzantine: int, selected: int = 1) -> dict[str, Tensor]:
    """Return the task vector closest to its n − f − 2 nearest others, f = `byzantine` (Blanchard et al. 2017).

    The score of a vector is the sum of squared distances to those others; ties go to the first. With `selected` m above
    1 the mean of the m best (Multi-Krum).

    Raises:
        ValueError: not 0 <= 2f + 2 < n or not 1 <= m <= n - f; no task vectors, or they differ in names or shapes.
    """
    names, number = names_of(task_vectors), len(task_vectors)
    if byzantine < 0 or 2 * byzantine + 2 >= number:
        raise ValueError(f"Krum tolerates f < (n - 2) / 2 Byzantine clients: f = {byzantine}, n = {number}")
    if not 1 <= selected <= number - byzantine:
        raise ValueError(f"Multi-Krum selects from 1 to n - f = {number - byzantine} vectors, not {selected}")
    best = krum_choice((stacked(task_vectors, name)[None] for name in names), byzantine, selected)[0].tolist()
    return _combined([task_vectors[index] for index in best], torch.full((selected,), 1 / selected))


def centred_clipping(
    task_vectors: TaskVectors, radius: float, iterations: int = 1, start: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return v ← v + mean_k (τ_k − v) · min(1, ρ/‖τ_k − v‖), ρ = `radius`, from `start` (Karimireddy et al. 2021).

    `start` None is v = 0; with one iteration that is the mean of norm-clipped task vectors. ρ = ∞ gives the mean. A
    task vector with a NaN or infinite entry is clipped to nothing: it counts in the mean and moves v by 0.

    Raises:
        ValueError: `radius` is not above 0 or `iterations` below 1; no (finite) task vectors, or they differ in names
            or shapes.
    """
    if not radius > 0 or iterations < 1:
        raise ValueError(f"centred clipping needs radius > 0 and iterations >= 1, not {radius} and {iterations}")
    vectors = _finite(task_vectors)
    if start is None:
        start = {name: torch.zeros_like(_promoted(value)) for name, value in vectors[0].items()}
    centre = dict(start)
    for _ in range(iterations):
        shares = (radius / distances(vectors, centre)).clamp(max=1.0) / len(task_vectors)
        rest = 1.0 - float(shares.sum())  # v + Σ s_k (τ_k − v) = (1 − Σ s_k) v + Σ s_k τ_k
        moves = _combined(vectors, shares)
        centre = {name: torch.add(move, centre[name], alpha=rest) for name, move in moves.items()}
    return centre


def aggregate_by(rule: str, task_vectors: TaskVectors, weights: Sequence[float], share: float) -> dict[str, Tensor]:
    """Return the aggregate of `task_vectors`, tensors of any shape by name, under `rule`.

    Args:
        weights: numbers of examples, used by "mean" alone.
        share: β, the share of attackers that "trimmed-mean" drops at each end and that "krum" assumes.

    Raises:
        ValueError: the rule is unknown, the share is not in [0, ½), or the task vectors do not match.
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
    raise ValueError(f"{rule} is none of {', '.join(CLUSTER_RULES)}")


def aggregate_groups(rule: str, rows: Tensor, groups: Groups, share: float) -> Tensor:
    """Return `aggregate_by` of every group's rows with equal weights: [N, d] to [B, d].

    Raises:
        ValueError: the rule is unknown, or under "geometric-median" a group has no finite row.
    """
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
    raise ValueError(f"{rule} is none of {', '.join(CLUSTER_RULES)}")


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


def distances(task_vectors: TaskVectors, centre: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return ‖τ_k − centre‖₂ of each task vector over all tensors together, float64 [n] on the CPU; ‖τ_k‖₂ for None.

    Raises:
        ValueError: no task vectors, or they differ in names or shapes.
    """
    squares = torch.zeros(len(task_vectors), dtype=torch.float64)
    for name in names_of(task_vectors):
        rows = stacked(task_vectors, name)
        rows = rows if centre is None else rows - centre[name]
        squares += torch.linalg.vector_norm(flat(rows), dim=1).double().square().cpu()
    return squares.sqrt()


def stacked(task_vectors: TaskVectors, name: str) -> Tensor:
    """Return the tensors called `name` of all task vectors, [n, ...], float32, or float64 if they are float64.

    Raises:
        ValueError: their shapes differ.
    """
    tensors = [vector[name] for vector in task_vectors]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"{name} has different shapes: {', '.join(map(str, sorted(shapes)))}")
    return _promoted(torch.stack(tensors))


def _coordinate_wise(task_vectors: TaskVectors, dropped: int) -> dict[str, Tensor]:
    """Return the mean of every entry without its `dropped` smallest and largest values."""
    return {name: middle_mean(stacked(task_vectors, name)[None], dropped)[0] for name in names_of(task_vectors)}


def _combined(task_vectors: TaskVectors, weights: Tensor) -> dict[str, Tensor]:
    """Return Σ w_k τ_k, in new tensors."""
    result = {}
    for name in names_of(task_vectors):
        rows = stacked(task_vectors, name)
        result[name] = torch.tensordot(weights.to(rows), rows, dims=1)
    return result


def _finite(task_vectors: TaskVectors) -> TaskVectors:
    """Return the task vectors without a NaN or infinite entry."""
    finite = [vector for vector, length in zip(task_vectors, distances(task_vectors), strict=True) if length.isfinite()]
    if not finite:
        raise ValueError("no task vector is finite")
    return finite


def names_of(task_vectors: TaskVectors) -> list[str]:
    """Return the names that all task vectors, of any shapes, have, in the first one's order.

    Raises:
        ValueError: no task vectors, or one has a tensor that another lacks.
    """
    if not task_vectors:
        raise ValueError("there are no task vectors to aggregate")
    for vector in task_vectors:
        check_names(vector, task_vectors[0])
    return list(task_vectors[0])


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
