"""Linear classifiers in closed form from sums that add up over clients: ridge, LDA and nearest class mean.

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
SHRINKAGE_GRID = tuple(float(value) for value in np.logspace(-4, 0, 17))
LARGEST_FEATURE = 1e4  # mean absolute size of a feature, far beyond any that a normalisation layer lets pass
ROUNDING = 1e-6  # of products of features, relative to their sizes
LOG_SCALE_BOUNDS = (-5.0, 8.0)  # natural logarithms of the logit scales that are searched
LOG_SCALE_EDGE = 1e-3  # an optimum this close to the lower bound lies at it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RidgeStatistics:
    """Sufficient statistics of every head here, of one-hot targets y and features h; d features, c classes, float64.

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
    """Solve the ridge head of some statistics for any penalty, from one eigendecomposition.

    As in every `HeadSolver`, a larger value of the parameter that `setting` names regularises more; `grid` are the
    values that are tried, `edges` those of them beyond which others could be.
    """

    setting = "ridge-lambda"
    grid = RIDGE_GRID
    edges: tuple[float, ...] = (RIDGE_GRID[0], RIDGE_GRID[-1])

    def __init__(self, statistics: RidgeStatistics) -> None:
        count = statistics.count
        self.mean, centred_gram, self.inverse_std = _standardisation(statistics)
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


class DiscriminantSolver:
    """Solve linear discriminant analysis of some statistics for any shrinkage, from one eigendecomposition.

    Features z, standardised as for ridge, are taken as Gaussian around the mean μ_c of their class with one covariance
    for all classes, estimated within them, S_w = (Σ z zᵀ − Σ_c n_c μ_c μ_cᵀ) / (n − c), and shrunk to
    S = (1 − g) S_w + g · mean(diag S_w) · I.
    """

    setting = "lda-shrinkage"
    grid = SHRINKAGE_GRID
    edges: tuple[float, ...] = (SHRINKAGE_GRID[0],)  # nothing is beyond 1

    def __init__(self, statistics: RidgeStatistics) -> None:
        self.statistics = statistics
        counts, count = statistics.class_counts, float(statistics.count)
        _, centred_gram, inverse_std = _standardisation(statistics)
        means = _class_means(statistics)
        within = inverse_std[:, None] * centred_gram * inverse_std - (means.T * counts) @ means
        within = within / max(1.0, count - int((counts > 0).sum()))
        spread = float(within.diagonal().mean())
        # Without two different examples of a class the sums say nothing of the spread: any multiple of the identity.
        self.spread = spread if spread > count * torch.finfo(torch.float64).eps else 1.0
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(within)

    def solve(self, shrinkage: float) -> LinearHead:
        """Return the log-posterior of each class up to a constant: weight [c, d] and bias [c], float64.

        Scores are μ_cᵀ S⁻¹ z − ½ μ_cᵀ S⁻¹ μ_c + log(n_c / n).
        """
        spectrum = (1 - shrinkage) * self.eigenvalues.clamp_min(0) + shrinkage * self.spread
        counts = self.statistics.class_counts
        priors = torch.where(counts > 0, counts / self.statistics.count, 1.0).log()
        return _gaussian_head(self.statistics, (self.eigenvectors / spectrum) @ self.eigenvectors.T, priors)


HeadSolver = RidgeSolver | DiscriminantSolver


def nearest_class_mean(statistics: RidgeStatistics) -> LinearHead:
    """Return the head whose highest score is that of the nearest class mean, weight [c, d] and bias [c], float64.

    Distances are Euclidean between features z standardised as for ridge, for those are linear in them up to what the
    classes share: scores are −½‖z − μ_c‖² + ½‖z‖². A cosine divides by ‖z‖, which a linear layer cannot.
    """
    width, classes = statistics.class_sums.shape
    inverse = torch.eye(width, dtype=torch.float64, device=statistics.gram.device)
    return _gaussian_head(statistics, inverse, inverse.new_zeros(classes))


def _standardisation(statistics: RidgeStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean [d], the Gram matrix of centred features [d, d], and 1 / standard deviation [d]."""
    count = statistics.count
    mean = statistics.feature_sum / count
    centred_gram = statistics.gram - count * torch.outer(mean, mean)
    variance = (centred_gram.diagonal() / count).clamp_min(0)
    # A constant feature has no spread to divide by; it cannot tell classes apart and gets weight 0. Its variance
    # here is a difference of two sums over n examples, so it is zero only to about n rounding errors.
    floor = count * torch.finfo(torch.float64).eps * (statistics.gram.diagonal() / count)
    return mean, centred_gram, torch.where(variance > floor, variance.rsqrt(), 0.0)


def _class_means(statistics: RidgeStatistics) -> Tensor:
    """Return the mean standardised features of each class, [c, d]; zero for a class without examples."""
    mean, _, inverse_std = _standardisation(statistics)
    counts = statistics.class_counts[:, None]
    return torch.where(counts > 0, (statistics.class_sums.T / counts.clamp_min(1.0) - mean) * inverse_std, 0.0)


def _gaussian_head(statistics: RidgeStatistics, inverse: Tensor, offsets: Tensor) -> LinearHead:
    """Return the head of scores μ_cᵀ P z − ½ μ_cᵀ P μ_c + offset_c, standardised z and μ_c; P [d, d], offsets [c].

    A class without examples is never predicted: its score is below the least bias of the others for every h, and that
    of the best class is not, since the first terms of the classes add up to zero when weighted by their examples.
    """
    mean, _, inverse_std = _standardisation(statistics)
    means = _class_means(statistics)
    weight = means @ inverse
    bias = offsets - 0.5 * (weight * means).sum(1)
    present = statistics.class_counts > 0
    bias = torch.where(present, bias, bias[present].min() - torch.log(statistics.count + 1))
    weight = weight * inverse_std
    return LinearHead(weight, bias - weight @ mean)


def choose_strength(solver: HeadSolver, features: Tensor, labels: Tensor) -> float:
    """Return the value of the solver's grid with the best accuracy on validation features [n, d], labels int64 [n].

    Ties go to the larger one; a warning is logged where it lies at an edge of the grid.
    """

    def accuracy(strength: float) -> float:
        return (solver.solve(strength).scores(features).argmax(1) == labels).double().mean().item()

    chosen = max(solver.grid, key=lambda strength: (accuracy(strength), strength))
    if chosen in solver.edges:
        log.warning("%s = %g lies at the edge of the searched grid: it is not tuned.", solver.setting, chosen)
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
            "logit-scale = %.3g lies at the lower edge of the searched range: on the %d validation images the head's "
            "scores tell no more than chance. Raise validation-size, or set the head's parameter and logit-scale.",
            scale, len(labels),
        )  # fmt: skip
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
        "logit-scale.", len(labels), smallest, tolerance,
    )  # fmt: skip
    return smallest
