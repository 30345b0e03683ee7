"""Which cluster fits every client best in every round, without computing every residual in every round.

The residual norm r_jk = ‖y_j − X_j θ_k‖ changes by at most ‖X_j‖₂ ‖δ_k‖ when θ_k moves by δ_k. So norms measured once
give an upper bound for the chosen cluster and lower bounds for the others; while the first is below the others the
choice stands, and only where it is not are norms measured again (Elkan, ICML 2003, does this for k-means). The choices
are those of `clustering.client_reports`.
"""

import math

import torch
from torch import Tensor

from fl_taskarith.mixtures.clustering import FREE, residuals
from fl_taskarith.mixtures.regression import Points

SLACK = 1 + 1e-6  # factor on ‖X_j‖₂, for rounding errors that add up


class ClusterChoice:
    """The choices of g clients among K models of each of A servers."""

    def __init__(self, points: Points, assigned: Tensor, magnified: Tensor | None = None) -> None:
        """`assigned` int64 [A, g] and `magnified` [g] as for `clustering.client_reports`."""
        self.points, self.assigned, self.magnified = points, assigned, magnified
        self.reach = SLACK * spectral_bounds(points.inputs) * (1.0 if magnified is None else magnified)  # [g]
        self.clusters = torch.where(assigned == FREE, 0, assigned)
        self._thetas: Tensor | None = None
        self._own = torch.empty(assigned.shape, dtype=torch.float64)  # at least r of the chosen: [A, g]
        self._others = torch.empty(0)  # at most r of the others: [A, K, g], ∞ at the chosen

    def follow(self, thetas: Tensor) -> Tensor:
        """Return the clusters at `thetas` [A, K, d], int64 [A, g]; clients whose bounds decide are not measured."""
        if self._thetas is None:
            self._others = self._own.new_empty(*thetas.shape[:2], len(self.points))
            unsure = torch.arange(len(self.points))
        else:
            steps = (thetas - self._thetas).norm(dim=2)  # [A, K]
            self._own += steps.gather(1, self.clusters) * self.reach
            self._others -= steps[..., None] * self.reach
            sure = (self._own < self._others.amin(1)) | (self.assigned != FREE)
            unsure = (~sure.all(0)).nonzero()[:, 0]
        self._thetas = thetas
        for clients in unsure.split(100) if len(unsure) else ():
            self._measure(clients, thetas)
        return self.clusters

    def _measure(self, clients: Tensor, thetas: Tensor) -> None:
        """Measure the residual norms of `clients`, int64 [c], and let these choose again."""
        points = Points(self.points.inputs[clients], self.points.outputs[clients])
        magnified = None if self.magnified is None else self.magnified[clients]
        norms = residuals(points, thetas, magnified).square().sum(1).sqrt().permute(1, 2, 0)  # [A, K, c]
        assigned = self.assigned[:, clients]
        chosen = torch.where(assigned == FREE, norms.argmin(1), assigned)[:, None]
        self.clusters = self.clusters.index_copy(1, clients, chosen[:, 0])
        self._own[:, clients] = norms.gather(1, chosen)[:, 0]
        self._others[..., clients] = norms.scatter(1, chosen, math.inf)


def spectral_bounds(inputs: Tensor) -> Tensor:
    """Return an upper bound of ‖X_j‖₂ of each client, [g, n, d] to [g]: ‖(XᵀX)⁴‖_F^(1/8), as ‖(XᵀX)⁴‖₂ = ‖X‖₂⁸."""
    grams = inputs @ inputs.mT if inputs.shape[1] < inputs.shape[2] else inputs.mT @ inputs
    squares = grams @ grams
    bounds: Tensor = (squares @ squares).flatten(1).norm(dim=1) ** (1 / 8)
    return bounds
