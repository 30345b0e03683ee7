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
LARGEST_FEATURE = 1e4  # mean absolute size of a feature, far beyond any that a normalisation layer lets pass
ROUNDING = 1e-6  # of products of features, relative to their sizes
LOG_SCALE_BOUNDS = (-5.0, 8.0)  # natural logarithms of the logit scales that are searched
LOG_SCALE_EDGE = 1e-3  # an optimum this close to the lower bound lies at it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RidgeStatistics:
    """Sufficient statistics of a ridge regression of one-hot targets y on features h; d features, c classes, float64.

    count: examples, [1]; feature_sum: Σ h, [d]; gram: Σ h hᵀ, [d, d]; class_sums: Σ h yᵀ, [d, c]; class_counts: [c].
    """

    count: Tensor
    feature_sum: Tensor
    gram: Tensor
    class_sums: Tensor
    class_counts: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "RidgeStatistics":
        """Sum up features [n, d] with labels int64 [n]."""
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
        """Return the shape of each tensor by its name, for d features and c classes."""
        nothing = RidgeStatistics.of(torch.zeros(0, features), torch.zeros(0, dtype=torch.int64), classes)
        return {name: tuple(value.shape) for name, value in nothing.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the five tensors by name, of the `shapes` given there, for a message."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, examples: int) -> None:
        """Check that these can be the sums over so many examples.

        The matrix of all products of [1, h, y], added up, must be positive semidefinite, like any such sum: that ties
        features, classes and counts to one another.

        Raises:
            ValueError: they cannot, or features are larger than any model's.
        """
        counts, most = self.class_counts, examples * LARGEST_FEATURE**2
        if float(self.count) != examples or float(counts.sum()) != examples:
            raise ValueError(f"it counts {float(self.count):g} examples, {float(counts.sum()):g} by class: {examples}")
        if not bool(((counts >= 0) & (counts == counts.round())).all()):
            raise ValueError("its numbers of examples per class are no whole numbers from 0")
        if not float(self.gram.diagonal().max()) <= most:
            raise ValueError(f"its features have squares of {float(self.gram.diagonal().max()):g}, above {most:g}")
        middle = torch.cat([self.feature_sum[:, None], self.gram, self.class_sums], 1)
        first = torch.cat([self.count, self.feature_sum, counts])
        products = torch.cat([first[None], middle, torch.cat([counts[:, None], self.class_sums.T, counts.diag()], 1)])
        scales = products.diagonal().clamp_min(0.0).sqrt()
        scales = torch.where(scales > 0, scales, 1.0)
        products = products / scales[:, None] / scales
        if not torch.allclose(products, products.T, rtol=0.0, atol=ROUNDING):
            raise ValueError("its Gram matrix is not symmetric")
        products.diagonal().add_(ROUNDING)
        if int(torch.linalg.cholesky_ex(products).info):
            raise ValueError("its sums are of no features and classes: their products are not positive semidefinite")

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        mine, theirs = self.tensors(), other.tensors()
        return RidgeStatistics(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class LinearHead:
    """Scores = features · weightᵀ + bias; weight [c, d] and bias [c]."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """Return the scores [n, c] of features [n, d]."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias

    def scaled(self, factor: float) -> "LinearHead":
        """Return the head whose scores are `factor` times as large."""
        return LinearHead(self.weight * factor, self.bias * factor)


class RidgeSolver:
    """Solve the ridge head of some statistics for any penalty, from one eigendecomposition."""

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
        """Return argmin_W Σ ‖y − Wᵀz − b‖² + λ‖W‖² over standardised features z, with an unpenalised intercept b.

        W = (ZᵀZ + λI)⁻¹ ZᵀY with centred Y, then weight = Wᵀ diag(1/std), [c, d], and bias = ȳ − weight · mean, [c], so
        that the result acts on raw features. float64.
        """
        shrunk = self.projected / (self.eigenvalues.clamp_min(0) + ridge_lambda)[:, None]
        weight = (self.inverse_std[:, None] * (self.eigenvectors @ shrunk)).T
        return LinearHead(weight, self.class_mean - weight @ self.mean)


def choose_ridge_lambda(solver: RidgeSolver, features: Tensor, labels: Tensor) -> float:
    """Return the penalty of `RIDGE_GRID` with the best accuracy on validation features [n, d] and labels int64 [n].

    Ties go to the larger one; a warning is logged where it lies at an end of the grid.
    """

    def accuracy(ridge_lambda: float) -> float:
        return (solver.solve(ridge_lambda).scores(features).argmax(1) == labels).double().mean().item()

    chosen = max(RIDGE_GRID, key=lambda ridge_lambda: (accuracy(ridge_lambda), ridge_lambda))
    if chosen in (RIDGE_GRID[0], RIDGE_GRID[-1]):
        log.warning("ridge-lambda = %g lies at the edge of the searched grid: it is not tuned.", chosen)
    return chosen


def fit_logit_scale(scores: Tensor, labels: Tensor) -> float:
    """Return the factor s > 0 that minimises the cross-entropy of softmax(s · scores), scores [n, c], labels int64 [n].

    s is the inverse temperature of temperature scaling (Guo et al., ICML 2017): ridge scores lie near 0 and 1, so their
    own softmax is almost uniform. The loss is convex in s, but has no minimum if all n examples are classified rightly.
    Then, or if the largest scale searched is as good as the minimum to within the tolerance below, s is the smallest
    scale whose mean loss is within that tolerance of the least: ln((n + 2) / (n + 1)) nats, the loss at the confidence
    (n + 1) / (n + 2) that Laplace's rule of succession gives after n successes in n trials. A warning is logged then,
    and where the minimum lies at the smallest scale because the scores are no better than chance.
    """
    low, high = LOG_SCALE_BOUNDS

    def cross_entropy(log_scale: float) -> float:
        return functional.cross_entropy(scores * float(np.exp(log_scale)), labels).item()

    optimum = minimize_scalar(cross_entropy, bounds=LOG_SCALE_BOUNDS, method="bounded", options={"xatol": 1e-6})
    scale = float(np.exp(optimum.x))
    if optimum.x < low + LOG_SCALE_EDGE:
        log.warning(
            "logit-scale = %.3g lies at the lower edge of the searched range: on the %d validation images the ridge "
            "head's scores tell no more than chance. Raise validation-size, or set ridge-lambda and logit-scale.",
            scale,
            len(labels),
        )
        return scale
    tolerance = math.log((len(labels) + 2) / (len(labels) + 1))
    bound = min(cross_entropy(high), float(optimum.fun)) + tolerance
    if cross_entropy(high) > bound:
        return scale
    if cross_entropy(low) > bound:
        low = bisect(lambda log_scale: cross_entropy(log_scale) - bound, low, high)
    smallest = float(np.exp(low))
    log.warning(
        "The %d validation images do not determine logit-scale: the head makes no error on them that would bound it: "
        "%.4g is taken, the smallest scale within %.2g nats of the least loss. Raise validation-size, or set "
        "logit-scale.",
        len(labels),
        smallest,
        tolerance,
    )
    return smallest
