"""BR-IFCA (Tao, Yang, Kulkarni, arXiv 2306.00638), and the two-stage baseline that it is compared with.

Each round every client reports a cluster and its gradient there; per cluster the server takes a robust aggregate g_k of
what was reported and moves θ_k ← θ_k − γ g_k. A cluster that nobody reports to stays. Several servers with rules and
models of their own can share one pass over the clients' data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.merging.attacks import corrupted
from fl_taskarith.merging.robust import geometric_median
from fl_taskarith.merging.rules import aggregate_by
from fl_taskarith.mixtures.adversary import Adversary
from fl_taskarith.mixtures.clustering import Reports, client_reports
from fl_taskarith.mixtures.regression import Points

THETA = "theta"  # the one tensor of a task vector here
RESTARTS = 5  # of k-means; the one of least summed distance is taken


@dataclass(frozen=True)
class Server:
    """One run of BR-IFCA.

    Attributes:
        rule, share: of `merging.rules.aggregate_by`.
        start: θ before the first round, [K, d].
        labels: the cluster of every client, int64 [m], where the server has fixed it (two-stage); None lets them pick.
    """

    rule: str
    share: float
    start: Tensor
    labels: Tensor | None = None


def br_ifca(
    points: Points,
    servers: Sequence[Server],
    adversary: Adversary,
    *,
    scale: float,
    step: float,
    rounds: int,
    after_round: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """θ after `rounds` rounds of every server, [A, K, d]; all servers start with as many models.

    Args:
        points: the data of all clients, attackers' as their attack has them.
        scale: of attacks that have one.
        step: γ.
        after_round: called with each round's number, from 1, and θ [A, K, d] after it.
    """
    thetas = torch.stack([server.start for server in servers])
    assigned = torch.stack([adversary.reported if server.labels is None else server.labels for server in servers])
    for number in range(1, rounds + 1):
        reports = client_reports(points, thetas, assigned, adversary.magnified)
        gradients = [_aggregated(server, told, adversary, scale, thetas.shape[1])
                     for server, told in zip(servers, reports, strict=True)]  # fmt: skip
        thetas = thetas - step * torch.stack(gradients)
        if after_round is not None:
            after_round(number, thetas)
    return thetas


def _aggregated(server: Server, reports: Reports, adversary: Adversary, scale: float, clusters: int) -> Tensor:
    """g_k for every cluster, zero where nobody reported: [K, d]."""
    result = torch.zeros(clusters, reports.gradients.shape[1], dtype=reports.gradients.dtype)
    for cluster in range(clusters):
        members = (reports.clusters == cluster).nonzero()[:, 0]
        if len(members):
            honest = [{THETA: row} for row in reports.gradients[members].unbind()]
            sent = corrupted(honest, adversary.byzantine[members].tolist(), adversary.attack, scale)
            result[cluster] = aggregate_by(server.rule, sent, [1.0] * len(sent), server.share)[THETA]
    return result


def two_stage(points: Points, clusters: int, share: float, generator: np.random.Generator) -> Server:
    """The baseline of Ghosh et al. (arXiv 1906.06629): every client's own least squares, robust k-means, fixed labels.

    Its third stage is `br_ifca` of the returned server: trimmed-mean gradient descent per cluster from the centres. A
    client with fewer points than dimensions sends the solution of least norm.
    """
    solutions = torch.linalg.lstsq(points.inputs, points.outputs[..., None], driver="gelsd").solution[..., 0]
    centres, labels = robust_k_means(solutions, clusters, share, generator)
    return Server("trimmed-mean", share, centres, labels)


def robust_k_means(
    vectors: Tensor, clusters: int, share: float, generator: np.random.Generator, max_iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Centres [K, d] and labels int64 [m] of `vectors` [m, d]; a far outlier moves no centre by much.

    Lloyd's iteration from k-means++ seeds. A centre is the mean of its members without the share β that lies farthest
    from their geometric median. The best of several seedings by the summed distance of the nearest 1 − β of vectors.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    kept = len(vectors) - int(share * len(vectors))
    for _ in range(RESTARTS):
        centres = _plus_plus(vectors, clusters, kept, generator)
        labels = torch.cdist(vectors, centres).argmin(1)
        for _ in range(max_iterations):
            centres = torch.stack([_centre(vectors[labels == k], share, centres[k]) for k in range(clusters)])
            before, labels = labels, torch.cdist(vectors, centres).argmin(1)
            if torch.equal(before, labels):
                break
        cost = float(torch.cdist(vectors, centres).min(1).values.sort().values[:kept].sum())
        if best is None or cost < best[0]:
            best = (cost, centres, labels)
    assert best is not None
    return best[1:]


def _plus_plus(vectors: Tensor, clusters: int, kept: int, generator: np.random.Generator) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): each next centre drawn by squared distance to the nearest.

    Only the `kept` vectors nearest to a centre so far can be drawn, for outliers would nearly always be.
    """
    chosen = [int(generator.integers(len(vectors)))]
    while len(chosen) < clusters:
        squares = torch.cdist(vectors, vectors[chosen]).min(1).values.square()
        squares[squares.argsort(stable=True)[kept:]] = 0.0
        weights = (squares / squares.sum()).numpy() if squares.sum() > 0 else None
        chosen.append(int(generator.choice(len(vectors), p=weights)))
    return vectors[chosen]


def _centre(members: Tensor, share: float, empty: Tensor) -> Tensor:
    """The robust mean of a cluster's members, or `empty` if it has none."""
    if not len(members):
        return empty
    middle = geometric_median([{THETA: row} for row in members.unbind()])[THETA]
    nearest = (members - middle).norm(dim=1).argsort(stable=True)
    return members[nearest[: len(members) - int(share * len(members))]].mean(0)
