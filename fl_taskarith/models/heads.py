"""The ridge head: a linear classifier in closed form from sums that add up over clients.

Because the sums are additive, the head of the federation equals the head of the pooled data at any class skew
(Fed3R, Fanì et al., ICML 2024). Everything is float64; features stay in float32.
"""

import logging
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.optimize import bisect, minimize_scalar
from torch import Tensor
from torch.nn import functional

RIDGE_GRID = tuple(float(value) for value in np.logspace(-2, 6, 17))
LOG_SCALE_BOUNDS = (-5.0, 8.0)  # natural logarithms of the logit scales that are searched
LOG_SCALE_EDGE = 1e-3  # an optimum this close to the lower bound lies at it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RidgeStatistics:
    """Sufficient statistics of a ridge regression on one-hot targets; d features, c classes, all float64.

    count: [1] examples; feature_sum: [d]; gram: [d, d] = sum of h hᵀ; class_sums: [d, c] = sum of h yᵀ;
    class_counts: [c].
    """

    count: Tensor
    feature_sum: Tensor
    gram: Tensor
    class_sums: Tensor
    class_counts: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "RidgeStatistics":
        """The statistics of features [n, d] with labels int64 [n]."""
        features = features.double()
        targets = functional.one_hot(labels, num_classes).double()
        return cls(
            count=torch.tensor([float(len(labels))], dtype=torch.float64, device=features.device),
            feature_sum=features.sum(0),
            gram=features.T @ features,
            class_sums=features.T @ targets,
            class_counts=targets.sum(0),
        )

    @staticmethod
    def shapes(features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The shape of each, by name, for d features and c classes."""
        return {
            "count": (1,),
            "feature_sum": (features,),
            "gram": (features, features),
            "class_sums": (features, classes),
            "class_counts": (classes,),
        }

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a message."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        mine, theirs = self.tensors(), other.tensors()
        return RidgeStatistics(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class LinearHead:
    """Scores = features · weightᵀ + bias; weight [c, d] and bias [c]."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """[n, d] to [n, c]."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias

    def scaled(self, factor: float) -> "LinearHead":
        """The head whose scores are `factor` times as large."""
        return LinearHead(self.weight * factor, self.bias * factor)


class RidgeSolver:
    """Solves the ridge head of some statistics for any penalty, from one eigendecomposition."""

    def __init__(self, statistics: RidgeStatistics) -> None:
        count = statistics.count
        self.mean = statistics.feature_sum / count
        centred_gram = statistics.gram - count * torch.outer(self.mean, self.mean)
        variance = (centred_gram.diagonal() / count).clamp_min(0)
        # A constant feature has no spread to divide by; it cannot tell classes apart and gets weight 0. Its variance
        # here is a difference of two sums over n examples, so it is zero only to about n rounding errors.
        floor = count * torch.finfo(torch.float64).eps * (statistics.gram.diagonal() / count)
        self.inverse_std = torch.where(variance > floor, variance.rsqrt(), 0.0)
        self.class_mean = statistics.class_counts / count
        correlation = statistics.class_sums - count * torch.outer(self.mean, self.class_mean)
        standardised = self.inverse_std[:, None] * centred_gram * self.inverse_std
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(standardised)
        self.projected = self.eigenvectors.T @ (self.inverse_std[:, None] * correlation)

    def solve(self, ridge_lambda: float) -> LinearHead:
        """argmin_W Σ ‖y − Wᵀz − b‖² + λ‖W‖² over standardised features z and an unpenalised intercept b, folded back.

        W = (ZᵀZ + λI)⁻¹ ZᵀY with centred Y, then weight = Wᵀ diag(1/std) and bias = ȳ − weight · mean, so that the
        result acts on raw features. float64.
        """
        shrunk = self.projected / (self.eigenvalues.clamp_min(0) + ridge_lambda)[:, None]
        weight = (self.inverse_std[:, None] * (self.eigenvectors @ shrunk)).T
        return LinearHead(weight, self.class_mean - weight @ self.mean)


def choose_ridge_lambda(solver: RidgeSolver, features: Tensor, labels: Tensor) -> float:
    """The penalty of `RIDGE_GRID` with the best accuracy on validation features [n, d]; ties go to the larger one.

    A warning is logged where it lies at an end of the grid.
    """

    def accuracy(ridge_lambda: float) -> float:
        return (solver.solve(ridge_lambda).scores(features).argmax(1) == labels).double().mean().item()

    chosen = max(RIDGE_GRID, key=lambda ridge_lambda: (accuracy(ridge_lambda), ridge_lambda))
    if chosen in (RIDGE_GRID[0], RIDGE_GRID[-1]):
        log.warning("ridge-lambda = %g lies at the edge of the searched grid: it is not tuned.", chosen)
    return chosen


def fit_logit_scale(scores: Tensor, labels: Tensor) -> float:
    """The factor s > 0 that minimises the cross-entropy of softmax(s · scores), scores [n, c], labels int64 [n].

    Ridge scores lie near 0 and 1, so their own softmax is almost uniform; s is the inverse temperature of temperature
    scaling (Guo et al., ICML 2017). The loss is convex in s, but without an error among the n examples it falls for
    ever and has no minimum. Then, and where an error is so narrow that the largest scale searched is as good as the
    minimum to within the tolerance below, s is the smallest scale whose mean loss exceeds the least one by that
    tolerance: ln((n + 2) / (n + 1)) nats, the loss of a classifier as sure as Laplace's rule of succession allows after
    n of n right, (n + 1) / (n + 2). A warning is logged then, and where the minimum lies at the smallest scale searched
    because the scores tell no more than chance.
    """
    low, high = LOG_SCALE_BOUNDS

    def cross_entropy(log_scale: float) -> float:
        return functional.cross_entropy(scores * float(np.exp(log_scale)), labels).item()

    found = minimize_scalar(cross_entropy, bounds=LOG_SCALE_BOUNDS, method="bounded", options={"xatol": 1e-6})
    if found.x < low + LOG_SCALE_EDGE:
        log.warning(
            "logit-scale = %.3g lies at the lower edge of the searched range: on the %d validation images the ridge "
            "head's scores tell no more than chance. Raise validation-size, or set ridge-lambda and logit-scale.",
            np.exp(found.x),
            len(labels),
        )
        return float(np.exp(found.x))
    tolerance = math.log((len(labels) + 2) / (len(labels) + 1))
    excess = min(cross_entropy(high), float(found.fun)) + tolerance
    if cross_entropy(high) > excess:
        return float(np.exp(found.x))
    log_scale = low
    if cross_entropy(low) > excess:
        log_scale = bisect(lambda log_scale: cross_entropy(log_scale) - excess, low, high)
    smallest = float(np.exp(log_scale))
    log.warning(
        "The %d validation images do not determine logit-scale: the head makes no error on them that would bound it: "
        "%.4g is taken, the smallest scale within %.2g nats of the least loss. Raise validation-size, or set "
        "logit-scale.",
        len(labels),
        smallest,
        tolerance,
    )
    return smallest
