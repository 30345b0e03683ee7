"""IFCA on linear regression: each client picks the cluster model that fits it best, and reports its gradient there.

Ghosh et al. (NeurIPS 2020); the robust form of Tao, Yang, Kulkarni (arXiv 2306.00638). The loss has the factor ½:
F_j(θ) = ‖y_j − X_j θ‖² / 2n, so its gradient is X_jᵀ(X_j θ − y_j) / n and its Hessian near the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.mixtures.regression import Points

FREE = -1  # in an assignment: the client picks its cluster itself
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
