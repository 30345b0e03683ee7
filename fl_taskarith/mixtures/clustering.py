"""IFCA on linear regression: each client picks the cluster model that fits it best, and reports its gradient there.

Ghosh et al. (NeurIPS 2020); the robust form of Tao, Yang, Kulkarni (arXiv 2306.00638). The loss has the factor ½:
F_j(θ) = ‖y_j − X_j θ‖² / 2n, so its gradient is X_jᵀ(X_j θ − y_j) / n and its Hessian near the identity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.mixtures.regression import Points

FREE = -1  # in an assignment: the client picks its cluster itself
SLACK = 1 + 1e-6  # factor on ‖X_j‖₂, for rounding errors that add up
CHUNK_BYTES = 8e6  # of inputs per pass, so that the second product finds them in the processor's cache


@dataclass(frozen=True)
class Reports:
    """What g clients report: cluster, int64 [g]; F_j there, [g]; ∇F_j there, [g, d]."""

    clusters: Tensor
    losses: Tensor
    gradients: Tensor


def client_reports(
    points: Points, thetas: Tensor, assigned: Tensor | None = None, magnified: Tensor | None = None
) -> list[Reports]:
    """Return the reports of g clients to each of A servers with K cluster models, `thetas` [A, K, d].

    Args:
        assigned: int64 [A, g], the cluster a client reports to, or FREE for the one of least loss.
        magnified: [g], factor on θ before loss and gradient are taken; None is 1. An attacker may take 3.
    """
    examples = points.inputs.shape[1]
    errors = residuals(points, thetas, magnified)
    losses = errors.square().sum(1) / (2 * examples)  # [g, A, K]
    chosen = losses.argmin(2)
    if assigned is not None:
        chosen = torch.where(assigned.T == FREE, chosen, assigned.T)
    at_chosen = errors.gather(3, chosen[:, None, :, None].expand(-1, examples, -1, 1))[..., 0]  # [g, n, A]
    gradients = (points.inputs.mT @ at_chosen) / examples  # [g, d, A]
    own_losses = losses.gather(2, chosen[..., None])[..., 0]
    return [Reports(*each) for each in zip(chosen.T, own_losses.T, gradients.permute(2, 0, 1), strict=True)]


def gradients_at(points: Points, thetas: Tensor, clusters: Tensor, magnified: Tensor | None = None) -> Tensor:
    """Return ∇F_j of g clients at the model of one cluster per server, `clusters` int64 [A, g]: [A, g, d].

    This is for many rounds over the same points: clients with n >= d / 2 points compute X_jᵀX_j and X_jᵀy_j once, and
    a gradient from these takes no more multiplications than one from the points.
    """
    _, examples, dimension = points.inputs.shape
    own = thetas[torch.arange(len(thetas))[:, None], clusters].permute(1, 2, 0)  # [g, d, A]
    if magnified is not None:
        own = own * magnified.view(-1, 1, 1)
    if dimension <= 2 * examples:
        sums = (points.grams @ own - points.moments[..., None]).mT
    else:
        chunk = max(1, int(CHUNK_BYTES / points.inputs[0].nbytes))  # clients
        parts = (tensor.split(chunk) for tensor in (points.inputs, points.outputs, own))
        sums = torch.cat([_moments(*part) for part in zip(*parts, strict=True)])
    return sums.div_(examples).transpose(0, 1).contiguous()


def _moments(inputs: Tensor, outputs: Tensor, thetas: Tensor) -> Tensor:
    """Return X_jᵀ(X_j θ − y_j) of each client at models of its own, [g, d, A]: [g, A, d]."""
    errors = (inputs @ thetas).sub_(outputs[..., None]).mT.contiguous()
    return torch.from_numpy(errors.numpy() @ inputs.numpy())  # twice as fast as torch's on few rows


def residuals(points: Points, thetas: Tensor, magnified: Tensor | None = None) -> Tensor:
    """Return X_j θ − y_j of every client at every model of `thetas` [A, K, d]: [g, n, A, K]."""
    clients, examples, _ = points.inputs.shape
    predicted = points.inputs.flatten(0, 1) @ thetas.flatten(0, 1).T
    predicted = predicted.view(clients, examples, *thetas.shape[:2])
    if magnified is not None:
        predicted *= magnified.view(-1, 1, 1, 1)
    return predicted.sub_(points.outputs[:, :, None, None])


class ClusterChoice:
    """The choices of g clients among K models of each of A servers, those of `client_reports`, in every round.

    The residual norm r_jk = ‖y_j − X_j θ_k‖ changes by at most ‖X_j‖₂ ‖δ_k‖ when θ_k moves by δ_k. So norms measured
    once give an upper bound for the chosen cluster and lower bounds for the others; while the first is below the others
    the choice stands, and only where it is not are norms measured again (Elkan, ICML 2003, does this for k-means).
    """

    def __init__(self, points: Points, assigned: Tensor, magnified: Tensor | None = None) -> None:
        """`assigned` int64 [A, g] and `magnified` [g] as for `client_reports`."""
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
