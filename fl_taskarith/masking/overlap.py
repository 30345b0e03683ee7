"""How much masks have in common, and how much two random masks of the same densities would."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fl_taskarith.masking.mask import Mask


@dataclass(frozen=True)
class Spread:
    """Mean and extremes of some numbers."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Describe at least one number.

        Raises:
            ValueError: there is none.
        """
        if not values:
            raise ValueError("no numbers to describe")
        return cls(sum(values) / len(values), min(values), max(values))


def chance_overlap(density: float, other: float) -> float:
    """Return the Jaccard overlap of independent random masks: d₁d₂ / (d₁ + d₂ − d₁d₂), and 1 if both are empty.

    This is expected |both| over expected |either|: two masks that favour the same layers exceed it without sharing more
    than those layers.
    """
    either = density + other - density * other
    return density * other / either if either else 1.0


def jaccard_matrix(masks: Sequence[Mask]) -> list[list[float]]:
    """Return |both| / |either| of each pair: [n, n], symmetric, with ones on the diagonal.

    Raises:
        ValueError: the masks are of different models.
    """
    matrix = [[1.0] * len(masks) for _ in masks]
    for first, second in combinations(range(len(masks)), 2):
        matrix[first][second] = matrix[second][first] = masks[first].jaccard(masks[second])
    return matrix


def between_pairs(matrix: Sequence[Sequence[float]]) -> list[float]:
    """Return the entries of `matrix`, [n, n], above the diagonal, row by row: one for each pair."""
    return [matrix[first][second] for first, second in combinations(range(len(matrix)), 2)]
