"""Rules of federated learning that resist task vectors which conflict with the others or lie far from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_taskarith.merging.merge_rules import Direction, by_name, merge_rule
from fl_taskarith.merging.robust import TaskVectors, coordinate_median, distances

CLIPPING_RADII = 5  # evenly from the smallest to the largest norm of a task vector


def clipping_radii(task_vectors: TaskVectors) -> Sequence[float]:
    """Return radii evenly from the smallest to the largest norm of a task vector (tensors of any shapes), 0 left out.

    Where all task vectors are zero any radius does, and 1 is returned.
    """
    lengths = distances(task_vectors)
    radii = torch.linspace(float(lengths.min()), float(lengths.max()), CLIPPING_RADII).tolist()
    return sorted({radius for radius in radii if radius > 0}) or [1.0]


@merge_rule(
    "fedgma", "the sum, damped where signs disagree", source="Tenison et al., TMLR 2023", parameter="threshold",
    meaning="agreement on a sign from which an entry is not damped, ρ",
    values=tuple(round(0.1 * step, 1) for step in range(1, 10)), summed=True,
)  # fmt: skip
def fedgma(task_vectors: TaskVectors, threshold: float) -> Direction:
    """Return m ⊙ Σ τ_t, m = 1 where |Σ sign τ_t| / T is at least ρ = `threshold`, else that agreement; same shapes.

    Raises:
        ValueError: not 0 <= ρ <= 1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"FedGMA's threshold is a share of 0 <= ρ <= 1, not {threshold}")

    def masked_sum(name: str, rows: Tensor) -> Tensor:
        agreement = rows.sign().sum(0).abs() / len(rows)
        return rows.sum(0) * torch.where(agreement >= threshold, 1.0, agreement)

    return by_name(task_vectors, masked_sum)


@merge_rule("median", "the median of every entry", source="Yin et al., ICML 2018", needs_base=False)
def median(task_vectors: TaskVectors) -> Direction:
    """Return the median of every entry, in the shapes of the task vectors."""
    return coordinate_median(task_vectors)


@merge_rule(
    "cclip", "the sum of task vectors clipped to a norm", source="Karimireddy et al., ICML 2021", parameter="radius",
    meaning="largest norm of a task vector, ρ", values=clipping_radii, summed=True,
)  # fmt: skip
def cclip(task_vectors: TaskVectors, radius: float) -> Direction:
    """Return Σ τ_t min(1, ρ/‖τ_t‖), ρ = `radius`: centred clipping once from 0, times T; same shapes.

    Raises:
        ValueError: the radius is not above 0.
    """
    if not radius > 0:
        raise ValueError(f"centred clipping needs a radius above 0, not {radius}")
    shares = (radius / distances(task_vectors)).clamp(max=1.0)
    return by_name(task_vectors, lambda name, rows: torch.tensordot(shares.to(rows), rows, dims=1))
