"""Rules that merge each matrix by its singular vectors; fused queries, keys and values count as three matrices.

Tensors that are no matrices take the mean.
"""

import torch
from torch import Tensor

from fl_taskarith.merging.matrices import by_matrix
from fl_taskarith.merging.merge_rules import Direction, merge_rule
from fl_taskarith.merging.robust import TaskVectors

COMMON = 0.8  # share of the directions that Iso-CTS takes from the sum


@merge_rule(
    "iso-c", "the sum, all singular values replaced by their mean", source="Marczak et al., ICML 2025", matrices=True
)
def iso_c(task_vectors: TaskVectors) -> Direction:
    """Return U σ̄ Vᵀ of the sum's singular value decomposition, in the shapes of the task vectors."""

    def merged(rows: Tensor) -> Tensor:
        left, sizes, right = torch.linalg.svd(rows.sum(0), full_matrices=False)
        isotropic: Tensor = sizes.mean() * left @ right
        return isotropic

    return by_matrix(task_vectors, merged, split_fused=True)


@merge_rule(
    "iso-cts", "iso-c with a fifth of its directions from single task vectors", source="Marczak et al., ICML 2025",
    matrices=True,
)  # fmt: skip
def iso_cts(task_vectors: TaskVectors) -> Direction:
    """Return the merge of Iso-CTS, in the shapes of the task vectors.

    Of r = min(out, in) directions about 80 % are the first of the sum; the rest are shared out among the task vectors,
    as the first of what each has outside the former's left vectors. Both sides are made orthogonal, with one size: the
    mean of all sizes.
    """
    return by_matrix(task_vectors, _iso_cts_matrix, split_fused=True)


def _iso_cts_matrix(rows: Tensor) -> Tensor:
    """Return the merged matrix [out, in] of rows [T, out, in]."""
    rank = min(rows.shape[1:])
    each = round((rank - int(COMMON * rank)) / len(rows))
    common = rank - each * len(rows)
    left, sizes, right = torch.linalg.svd(rows.sum(0), full_matrices=False)
    shared = left[:, :common]
    parts = [(shared, sizes[:common], right[:common])]
    for own in rows:
        left, sizes, right = torch.linalg.svd(own - shared @ (shared.mT @ own), full_matrices=False)
        parts.append((left[:, :each], sizes[:each], right[:each]))
    lefts, values, rights = zip(*parts, strict=True)
    merged: Tensor = torch.cat(values).mean() * _orthogonal(torch.cat(lefts, 1)) @ _orthogonal(torch.cat(rights))
    return merged


@merge_rule(
    "tsv-m", "each task vector's first singular vectors, made orthogonal", source="Gargiulo et al., CVPR 2025",
    matrices=True,
)  # fmt: skip
def tsv_m(task_vectors: TaskVectors) -> Direction:
    """Return the merge of task singular vectors, in the shapes of the task vectors.

    Each of T task vectors keeps its first min(out, in) / T directions with their sizes; the left vectors of all
    together are made orthogonal, and so are the right ones.
    """

    def merged(rows: Tensor) -> Tensor:
        kept = min(rows.shape[1:]) // len(rows) or 1
        lefts, sizes, rights = torch.linalg.svd(rows, full_matrices=False)
        left, right = torch.cat(list(lefts[:, :, :kept]), 1), torch.cat(list(rights[:, :kept]))
        merged: Tensor = (_orthogonal(left) * sizes[:, :kept].flatten()) @ _orthogonal(right)
        return merged

    return by_matrix(task_vectors, merged, split_fused=True)


def _orthogonal(vectors: Tensor) -> Tensor:
    """Return the polar factor of [a, b]: the nearest matrix whose rows or columns, the fewer, are orthonormal."""
    left, _, right = torch.linalg.svd(vectors, full_matrices=False)
    factor: Tensor = left @ right
    return factor
