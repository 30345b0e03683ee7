"""How far estimated parameters lie from the true ones when nobody knows which estimate belongs to which cluster."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def pairwise_distances(estimates: Tensor, truth: Tensor) -> Tensor:
    """‖θ_k − θ*_j‖₂ for all pairs: [K, K], from differences (no cancellation for close ones)."""
    distances: Tensor = torch.linalg.vector_norm(estimates[:, None] - truth[None], dim=2)
    return distances


def largest_matched_distance(estimates: Tensor, truth: Tensor) -> float:
    """min over permutations π of max_k ‖θ_k − θ*_π(k)‖, the error of federated EM (arXiv 2408.05819).

    The permutation of least sum (Hungarian algorithm) need not have the least maximum, so the smallest distance is
    sought below which a perfect matching exists, by bisection over the K² distances.
    """
    distances = pairwise_distances(estimates, truth).numpy()
    if len(set(distances.argmin(1))) == len(distances):
        return float(distances.min(1).max())  # everybody's nearest is another's: no matching can do better
    candidates = np.unique(distances)
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        forbidden = (distances > candidates[middle]).astype(float)
        rows, columns = linear_sum_assignment(forbidden)
        if forbidden[rows, columns].any():
            low = middle + 1
        else:
            high = middle
    return float(candidates[low])


def mean_matched_distance(estimates: Tensor, truth: Tensor) -> float:
    """min over permutations π of (1/K) Σ_k ‖θ_k − θ*_π(k)‖, by the Hungarian algorithm."""
    distances = pairwise_distances(estimates, truth).numpy()
    rows, columns = linear_sum_assignment(distances)
    return float(distances[rows, columns].mean())


def mean_nearest_distance(estimates: Tensor, truth: Tensor) -> float:
    """(1/K) Σ_k min_j ‖θ_k − θ*_j‖, the published metric of BR-IFCA: two estimates of one cluster count as two hits."""
    return float(pairwise_distances(estimates, truth).min(1).values.mean())


def cluster_accuracy(chosen: Tensor, true: Tensor, clusters: int) -> float:
    """Share of clients whose chosen cluster is theirs, under the best one-to-one renaming of clusters; nan for none."""
    if not len(chosen):
        return float("nan")
    counts = torch.zeros(clusters, clusters, dtype=torch.int64)
    counts.index_put_((chosen, true), torch.ones_like(chosen), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return float(counts.numpy()[rows, columns].sum() / len(chosen))
