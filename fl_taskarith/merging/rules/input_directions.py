"""Rules that merge each matrix by the directions of the inputs that its task vectors were made of; no data are needed.

Tensors that are no matrices take the mean. Fused queries, keys and values have the same inputs, so one Gram.
"""

import torch
from torch import Tensor

from fl_taskarith.merging.input_covariance import BoundedSum, CovarianceSum
from fl_taskarith.merging.matrices import by_matrix
from fl_taskarith.merging.merge_rules import Direction, merge_rule
from fl_taskarith.merging.robust import TaskVectors

EPSILON = 1e-3
WUDI_STEPS, WUDI_RATE = 300, 1e-5
ACE_EPSILON, ACE_SPREAD, ACE_RANK = 1e-2, 0.3, 0.3


@merge_rule(
    "covariance", "a sum where inputs differ, a mean where they agree", source="closed form of WUDI's objective",
    parameter="shrinkage", meaning="of every Gram matrix towards the identity, s; 1 gives the mean",
    values=(0.0, 0.01, 0.1), streams=True, matrices=True,
)  # fmt: skip
def covariance(task_vectors: TaskVectors, shrinkage: float) -> Direction:
    """Return X of `merging.input_covariance` for ε = 1e-3, in the shapes of the task vectors.

    Raises:
        ValueError: not 0 <= s <= 1.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"the shrinkage is a share of 0 <= s <= 1, not {shrinkage}")
    return by_matrix(task_vectors, lambda rows: _sums(rows).result(rows.mean(0), EPSILON, shrinkage))


@merge_rule(
    "covariance-bounded", "covariance whose directions are shared out; its norm is at most the sum of the norms",
    matrices=True,
)  # fmt: skip
def covariance_bounded(task_vectors: TaskVectors) -> Direction:
    """Return Σ T P of `merging.input_covariance` for ε = 1e-3, in the shapes of the task vectors."""
    return by_matrix(task_vectors, lambda rows: _sums(rows, BoundedSum).result(rows, EPSILON))


@merge_rule(
    "wudi", "300 steps of Adam from the sum, against interference along inputs",
    source="Cheng et al., ICML 2025", matrices=True,
)  # fmt: skip
def wudi(task_vectors: TaskVectors) -> Direction:
    """Return X after 300 steps of Adam at 1e-5 from Σ T on Σ ‖(X − T) Tᵀ‖² / ‖T‖², in the shapes of the task vectors.

    The steps have the size that the paper chose for CLIP, whatever the size of the task vectors.
    """

    def merged(rows: Tensor) -> Tensor:
        sums = _sums(rows)
        found = torch.nn.Parameter(rows.sum(0))
        optimizer = torch.optim.Adam([found], lr=WUDI_RATE)
        for _ in range(WUDI_STEPS):
            found.grad = sums.gradient(found.detach())
            optimizer.step()
        return found.detach()

    return by_matrix(task_vectors, merged)


@merge_rule(
    "ace", "covariances of centred task vectors, and a spectral correction", source="arXiv 2603.02945, CVPR 2026",
    matrices=True,
)  # fmt: skip
def ace(task_vectors: TaskVectors) -> Direction:
    """Return ACE-Merging's X, in the shapes of the task vectors.

    With Σ_t = TᵀT of T centred over its rows, X = (Σ T (Σ_t + εI)) (Σ (Σ_t + εI) + C)⁻¹ at ε = 1e-2, where every row of
    C is the mean row of Σ Σ_t. Where the log traces of Σ_t spread by more than 0.3 (variance over squared mean), each
    Σ_t and its ε are divided by its trace, C by the mean trace, and the mean of the largest 30 % of the singular values
    of X + Σ T (Σ_t − their mean) is added along those directions.
    """
    return by_matrix(task_vectors, _ace_matrix)


def _ace_matrix(rows: Tensor) -> Tensor:
    """Return the merged matrix [out, in] of rows [T, out, in]."""
    centred = (rows - rows.mean(1, keepdim=True)).double()
    grams = centred.mT @ centred
    traces = grams.diagonal(dim1=1, dim2=2).sum(1)
    if not bool((traces > 0).all()):  # nothing varies over the rows of a task vector
        return rows.mean(0)
    logs = traces.log()
    unlike = bool(logs.var(correction=0) > ACE_SPREAD * logs.mean() ** 2)
    epsilon = torch.full_like(traces, ACE_EPSILON)
    mean_row = grams.sum(0).mean(0)
    if unlike:
        grams, epsilon, mean_row = grams / traces[:, None, None], epsilon / traces, mean_row / traces.mean()
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    whole = grams + epsilon[:, None, None] * identity
    values = rows.double()
    found: Tensor = torch.linalg.solve(whole.sum(0) + mean_row, (values @ whole).sum(0), left=False)
    if unlike:
        left, sizes, right = torch.linalg.svd(found + (values @ (grams - grams.mean(0))).sum(0), full_matrices=False)
        kept = max(1, int(ACE_RANK * len(sizes)))
        found = found + sizes[:kept].mean() * left[:, :kept] @ right[:kept]
    return found.to(rows)


def _sums(rows: Tensor, kind: type[CovarianceSum] = CovarianceSum) -> CovarianceSum:
    """Return the sums over rows [T, out, in], each of weight 1."""
    sums = kind()
    for matrix in rows:
        sums.add(matrix)
    return sums
