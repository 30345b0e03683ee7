"""Federated EM for a mixture of linear regressions, one responsibility per client; pooled EM, one per point.

Tao, Chandak, Kulkarni (arXiv 2408.05819). E-step on the client: w_jk ∝ exp(−‖y_j − X_j θ_k‖² / 2σ²), mixing weights
1/K. M-step on the server: θ_k = (Σ_j w_jk X_jᵀX_j)⁻¹ Σ_j w_jk X_jᵀy_j, from sums that add up over clients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.mixtures.regression import Points

RANK_TOLERANCE = 1e-12  # eigenvalues of a cluster's Gram matrix below this share of its largest count as zero
ROUNDING = 1e-9  # of a Gram matrix, as a share of its trace
RARE = 100.0  # times its mean that a sum of squares of normal numbers never reaches


@dataclass(frozen=True)
class Statistics:
    """Σ_j w_jk X_jᵀX_j, [K, d, d], and Σ_j w_jk X_jᵀy_j, [K, d]: all that the M-step needs to know of clients."""

    grams: Tensor
    moments: Tensor

    def check(self, points: int, size: float) -> None:
        """Check that these can be sums over so many points, x ~ N(0, I), y of mean square `size`², weighted by w ≤ 1.

        Raises:
            ValueError: they cannot: a Gram matrix is not symmetric or positive semidefinite, or sums are too large.
        """
        traces = self.grams.diagonal(dim1=1, dim2=2).sum(1)
        most = RARE * points * self.grams.shape[1]
        if not float(traces.min()) >= 0 or not float(traces.sum()) <= most:
            raise ValueError(f"its Gram matrices have a trace of {float(traces.sum()):g}, above {most:g} or below 0")
        grams = self.grams / traces.clamp_min(1e-200)[:, None, None]
        if not torch.allclose(grams, grams.mT, rtol=0.0, atol=ROUNDING):
            raise ValueError("a Gram matrix is not symmetric")
        jitter = ROUNDING * torch.eye(grams.shape[1], dtype=grams.dtype)
        if bool(torch.linalg.cholesky_ex(grams + jitter).info.any()):
            raise ValueError("a Gram matrix is not positive semidefinite")
        largest = (traces * RARE * points).sqrt() * size  # ‖Σ w x y‖² ≤ Σ w ‖x‖² Σ w y²
        if not bool((self.moments.norm(dim=1) <= largest + 1e-100).all()):
            raise ValueError("the moments are larger than its Gram matrices allow")

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.grams + other.grams, self.moments + other.moments)


@dataclass(frozen=True)
class Trajectory:
    """θ after 0, 1, 2, ... iterations, [K, d] each, and whether the convergence test ended them."""

    thetas: list[Tensor]
    converged: bool

    @property
    def iterations(self) -> int:
        """Return the number of M-steps."""
        return len(self.thetas) - 1


def expectation(points: Points, theta: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return responsibilities [g, K] of g clients at `theta` [K, d], and −log-likelihood per point in nats, [g].

    Both come by log-sum-exp: with many points per client the exponents are far beyond what exp can take.
    """
    return _responsibilities(_squared_residuals(points, theta).sum(1), noise, points.outputs.shape[1])


def statistics(points: Points, responsibilities: Tensor) -> Statistics:
    """Return the sums over g clients with `responsibilities` [g, K]."""
    dimension = points.inputs.shape[2]
    grams = responsibilities.T @ points.grams.view(len(points), -1)
    return Statistics(grams.view(-1, dimension, dimension), responsibilities.T @ points.moments)


def maximisation(sums: Statistics, theta: Tensor) -> Tensor:
    """Return the new θ, [K, d]: where the normal equations leave directions open, the solution nearest to old `theta`.

    So a cluster for which no client is responsible stays where it is.
    """
    residual = sums.moments - (sums.grams @ theta[..., None])[..., 0]
    inverse: Tensor = torch.linalg.pinv(sums.grams, rtol=RANK_TOLERANCE, hermitian=True)
    return theta + (inverse @ residual[..., None])[..., 0]


def largest_move(theta: Tensor, before: Tensor) -> float:
    """Return max_k ‖θ_k − θ_k before‖₂ of [K, d] and [K, d], for the convergence test."""
    return float(torch.linalg.vector_norm(theta - before, dim=1).max())


def federated_em(points: Points, start: Tensor, noise: float, tolerance: float, max_iterations: int) -> Trajectory:
    """Run EM from `start` [K, d] until no θ_k moves by more than `tolerance`."""
    return _iterate(lambda theta: statistics(points, expectation(points, theta, noise)[0]),
                    start, tolerance, max_iterations)  # fmt: skip


def pooled_em(points: Points, start: Tensor, noise: float, tolerance: float, max_iterations: int) -> Trajectory:
    """Run EM from `start` [K, d] with a responsibility per point, which ignores that a client has one cluster."""
    inputs, outputs = points.inputs.flatten(0, 1), points.outputs.flatten()

    def sums(theta: Tensor) -> Statistics:
        weights, _ = _responsibilities(_squared_residuals(points, theta).flatten(0, 1), noise, 1)
        weighted = inputs[None] * weights.T[..., None]
        return Statistics(weighted.mT @ inputs, weighted.mT @ outputs)

    return _iterate(sums, start, tolerance, max_iterations)


def _iterate(sums: Callable[[Tensor], Statistics], start: Tensor, tolerance: float, max_iterations: int) -> Trajectory:
    thetas = [start]
    for _ in range(max_iterations):
        thetas.append(maximisation(sums(thetas[-1]), thetas[-1]))
        if largest_move(thetas[-1], thetas[-2]) <= tolerance:
            return Trajectory(thetas, True)
    return Trajectory(thetas, False)


def _squared_residuals(points: Points, theta: Tensor) -> Tensor:
    """Return (y − ⟨x, θ_k⟩)² of every point: [g, n, K]."""
    return (points.outputs[..., None] - points.inputs @ theta.T).square_()


def _responsibilities(squares: Tensor, noise: float, examples: int) -> tuple[Tensor, Tensor]:
    """Return weights [g, K] and −log-likelihoods per point [g], of squares [g, K] summed over `examples` points."""
    exponents = squares / (-2 * noise**2)
    log_sum = exponents.logsumexp(1, keepdim=True)
    constant = 0.5 * math.log(2 * math.pi * noise**2) + math.log(squares.shape[1]) / examples
    return (exponents - log_sum).exp(), constant - log_sum[:, 0] / examples
