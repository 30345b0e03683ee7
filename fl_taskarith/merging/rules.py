"""The aggregation rules by name, over the task vectors of one round or one cluster. A new rule is a line here."""

from collections.abc import Sequence

from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.merging.robust import (
    TaskVectors,
    coordinate_median,
    geometric_median,
    krum,
    trimmed_count,
    trimmed_mean,
)

RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")


def aggregate_by(rule: str, task_vectors: TaskVectors, weights: Sequence[float], share: float) -> dict[str, Tensor]:
    """The aggregate of `task_vectors` under `rule`.

    Args:
        weights: numbers of examples, which "mean" alone looks at.
        share: β, the share of attackers that "trimmed-mean" drops at each end and that "krum" reckons with.
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


def _krum(task_vectors: TaskVectors, share: float) -> dict[str, Tensor]:
    """Krum with f = ⌊βn⌋, or with the most that n vectors can bear; one or two have no majority: their median."""
    number = len(task_vectors)
    if number < 3:
        return coordinate_median(task_vectors)
    return krum(task_vectors, min(trimmed_count(share, number), (number - 3) // 2))
