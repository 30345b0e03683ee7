"""How far estimated parameters lie from the true ones when nobody knows which estimate belongs to which cluster."""

from bisect import bisect_left

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def pairwise_distances(estimates: Tensor, truth: Tensor) -> Tensor:
    """Return ‖θ_k − θ*_j‖₂ of all pairs of [K, d] and [K, d]: [K, K], from differences (no cancellation)."""
    distances: Tensor = torch.linalg.vector_norm(estimates[:, None] - truth[None], dim=2)
    return distances


def largest_matched_distance(estimates: Tensor, truth: Tensor) -> float:
    """Return min over permutations π of max_k ‖θ_k − θ*_π(k)‖, [K, d] each: the error of federated EM (2408.05819).

    The permutation of least sum (Hungarian algorithm) need not have the least maximum, so the smallest distance is
    sought below which a perfect matching exists, by bisection over the K² distances.
    """
    distances = pairwise_distances(estimates, truth).numpy()
    if len(set(distances.argmin(1))) == len(distances):
        return float(distances.min(1).max())  # each estimate is nearest to a θ* of its own: no matching can do better

    def matches(bound: float) -> bool:
        beyond = distances > bound
        return not beyond[linear_sum_assignment(beyond)].any()

    candidates = np.unique(distances)
    return float(candidates[bisect_left(candidates, True, key=matches)])


def mean_matched_distance(estimates: Tensor, truth: Tensor) -> float:
    """Return min over permutations π of (1/K) Σ_k ‖θ_k − θ*_π(k)‖, [K, d] each, by the Hungarian algorithm."""
    distances = pairwise_distances(estimates, truth).numpy()
    return float(distances[linear_sum_assignment(distances)].mean())


def mean_nearest_distance(estimates: Tensor, truth: Tensor) -> float:
    """Return (1/K) Σ_k min_j ‖θ_k − θ*_j‖, [K, d] each: two estimates of one cluster count as two hits (2306.00638)."""
    return float(pairwise_distances(estimates, truth).min(1).values.mean())


def cluster_accuracy(chosen: Tensor, true: Tensor, clusters: int) -> float:
    """Return the share of clients in their cluster, int64 [m] each, under the best renaming; NaN without clients."""
    if not len(chosen):
        return float("nan")
    counts = torch.bincount(clusters * chosen + true, minlength=clusters**2).view(clusters, clusters).numpy()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(chosen))
