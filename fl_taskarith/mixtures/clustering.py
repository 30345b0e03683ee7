"""IFCA on linear regression: each client picks the cluster model that fits it best, and reports its gradient there.

Ghosh et al. (NeurIPS 2020); the robust form of Tao, Yang, Kulkarni (arXiv 2306.00638). The loss has the factor ½:
F_j(θ) = ‖y_j − X_j θ‖² / 2n, so its gradient is X_jᵀ(X_j θ − y_j) / n and its Hessian near the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.mixtures.regression import Points

FREE = -1  # of an assignment: the client picks its cluster itself
CHUNK_BYTES = 8e6  # of inputs gone through at a time, so that the second pass finds them in the processor's cache


@dataclass(frozen=True)
class Reports:
    """What g clients say: cluster, int64 [g]; F_j there, [g]; ∇F_j there, [g, d]."""

    clusters: Tensor
    losses: Tensor
    gradients: Tensor


def client_reports(
    points: Points, thetas: Tensor, assigned: Tensor | None = None, magnified: Tensor | None = None
) -> list[Reports]:
    """The reports of g clients to A servers with K cluster models each, `thetas` [A, K, d], in one go.

    Args:
        assigned: int64 [A, g], the cluster a client reports to, or FREE for the one of least loss.
        magnified: [g], factor on θ before loss and gradient are taken; None is 1. An attacker may take 3.
    """
    chunk = _chunk(points)
    parts = []
    for index, part in enumerate(points.split(chunk)):
        where = slice(index * chunk, index * chunk + len(part))
        parts.append(_reports(part, thetas, None if assigned is None else assigned[:, where],
                              None if magnified is None else magnified[where]))  # fmt: skip
    clusters, losses, gradients = (torch.cat(kind, dim=1) for kind in zip(*parts, strict=True))
    return [Reports(*server) for server in zip(clusters, losses, gradients, strict=True)]


def gradients_at(points: Points, thetas: Tensor, clusters: Tensor, magnified: Tensor | None = None) -> Tensor:
    """∇F_j of g clients at the model of a cluster each per server, `clusters` int64 [A, g]: [A, g, d].

    For round after round of the same points: the data of a client with n >= d / 2 points are gone through once, for
    X_jᵀX_j and X_jᵀy_j, which then make a gradient at no more multiplications.
    """
    _, examples, dimension = points.inputs.shape
    own = thetas[torch.arange(len(thetas))[:, None], clusters].permute(1, 2, 0)  # [g, d, A]
    if magnified is not None:
        own = own * magnified.view(-1, 1, 1)
    if dimension <= 2 * examples:
        sums = (points.grams @ own - points.moments[..., None]).mT
    else:
        chunk = _chunk(points)
        sums = torch.cat([_moments(part, theta) for part, theta in zip(points.split(chunk), own.split(chunk),
                                                                       strict=True)])  # fmt: skip
    return sums.div_(examples).transpose(0, 1).contiguous()


def _moments(points: Points, thetas: Tensor) -> Tensor:
    """X_jᵀ(X_j θ − y_j) of each client at models of its own, [g, d, A]: [g, A, d]."""
    errors = (points.inputs @ thetas).sub_(points.outputs[..., None]).mT.contiguous()
    return torch.from_numpy(errors.numpy() @ points.inputs.numpy())  # twice as fast as torch's on few rows


def residuals(points: Points, thetas: Tensor, magnified: Tensor | None = None) -> Tensor:
    """X_j θ − y_j of every client at every model: [g, n, A, K]."""
    clients, examples, _ = points.inputs.shape
    predicted = points.inputs.flatten(0, 1) @ thetas.flatten(0, 1).T
    predicted = predicted.view(clients, examples, *thetas.shape[:2])
    if magnified is not None:
        predicted *= magnified.view(-1, 1, 1, 1)
    return predicted.sub_(points.outputs[:, :, None, None])


def _chunk(points: Points) -> int:
    """How many clients at a time."""
    return max(1, int(CHUNK_BYTES / points.inputs[0].nbytes))


def _reports(
    points: Points, thetas: Tensor, assigned: Tensor | None, magnified: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters [A, g], losses [A, g] and gradients [A, g, d] of a few clients."""
    examples = points.inputs.shape[1]
    errors = residuals(points, thetas, magnified)
    losses = errors.square().sum(1) / (2 * examples)  # [g, A, K]
    chosen = losses.argmin(2)
    if assigned is not None:
        chosen = torch.where(assigned.T == FREE, chosen, assigned.T)
    at_chosen = errors.gather(3, chosen[:, None, :, None].expand(-1, examples, -1, 1))[..., 0]  # [g, n, A]
    gradients = (points.inputs.mT @ at_chosen) / examples  # [g, d, A]
    return chosen.T, losses.gather(2, chosen[..., None])[..., 0].T, gradients.permute(2, 0, 1)
