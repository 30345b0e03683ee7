"""BR-IFCA (Tao, Yang, Kulkarni, arXiv 2306.00638), and the two-stage baseline that it is compared with.

Each round every client reports a cluster and its gradient there; per cluster the server takes a robust aggregate g_k of
what was reported and moves θ_k ← θ_k − γ g_k. A cluster that nobody reports to stays. Several servers with rules and
models of their own can share one pass over the clients' data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.merging.attacks import corrupted_groups
from fl_taskarith.merging.grouped import Groups, geometric_medians, means, per_size
from fl_taskarith.merging.robust import aggregate_groups
from fl_taskarith.mixtures.adversary import Adversary
from fl_taskarith.mixtures.clustering import ClusterChoice, gradients_at
from fl_taskarith.mixtures.regression import Points

RESTARTS, MOST_ITERATIONS = 5, 100  # of k-means: seedings, and steps of each


@dataclass(frozen=True)
class Server:
    """One run of BR-IFCA.

    rule, share: of `merging.robust.aggregate_groups`. start: θ before the first round, [K, d]. labels: the cluster of
    every client, int64 [m], where the server has fixed it (two-stage); None lets them pick.
    """

    rule: str
    share: float
    start: Tensor
    labels: Tensor | None = None


def br_ifca(
    points: Points, servers: Sequence[Server], adversary: Adversary, *, scale: float, step: float, rounds: int
) -> Tensor:
    """Return θ after `rounds` rounds of every server, [A, K, d]; all servers have the same number K of models.

    Args:
        points: the data of all clients, attackers' as their attack has them.
        scale: the factor of attacks that have one.
        step: γ.
    """
    thetas = torch.stack([server.start for server in servers])
    assigned = torch.stack([adversary.reported if server.labels is None else server.labels for server in servers])
    choice = ClusterChoice(points, assigned, adversary.magnified)
    rosters: list[Roster | None] = [None] * len(servers)
    for _ in range(rounds):
        clusters = choice.follow(thetas)
        gradients = gradients_at(points, thetas, clusters, adversary.magnified)
        moved = torch.zeros_like(thetas)
        for index, server in enumerate(servers):
            if (roster := rosters[index]) is None or not torch.equal(roster.clusters, clusters[index]):
                rosters[index] = roster = Roster(clusters[index])
            sent = corrupted_groups(gradients[index], adversary.byzantine, roster.groups, adversary.attack, scale)
            moved[index, roster.present] = aggregate_groups(server.rule, sent, roster.groups, server.share)
        thetas = thetas - step * moved
    return thetas


class Roster:
    """Which clients report to which cluster of a server, `clusters` int64 [m], and the clusters that have reports."""

    def __init__(self, clusters: Tensor) -> None:
        self.clusters = clusters
        self.present, owner = clusters.unique(return_inverse=True)
        self.groups = Groups(owner, len(self.present))


def two_stage(points: Points, clusters: int, share: float, generator: np.random.Generator) -> Server:
    """Run the first two stages of Ghosh et al. (arXiv 1906.06629): least squares per client, then robust k-means.

    The third stage is `br_ifca` of the returned server: trimmed-mean gradient descent per cluster from the centres. A
    client with fewer points than dimensions sends the solution of least norm.
    """
    solutions = torch.linalg.lstsq(points.inputs, points.outputs[..., None], driver="gelsd").solution[..., 0]
    centres, labels = robust_k_means(solutions, clusters, share, generator)
    return Server("trimmed-mean", share, centres, labels)


def robust_k_means(
    vectors: Tensor, clusters: int, share: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return centres [K, d] and labels int64 [m] of `vectors` [m, d], robust to outliers.

    Lloyd's iteration from k-means++ seeds. A centre is the mean of its members without the share β that lies farthest
    from their geometric median. Of several seedings the one with the least summed distance of the nearest 1 − β of
    vectors is returned.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    inliers = len(vectors) - int(share * len(vectors))
    for _ in range(RESTARTS):
        centres = _plus_plus(vectors, clusters, inliers, generator)
        labels = torch.cdist(vectors, centres).argmin(1)
        for _ in range(MOST_ITERATIONS):
            centres = _centres(vectors, labels, share, centres)
            before, labels = labels, torch.cdist(vectors, centres).argmin(1)
            if torch.equal(before, labels):
                break
        cost = float(torch.cdist(vectors, centres).min(1).values.sort().values[:inliers].sum())
        if best is None or cost < best[0]:
            best = (cost, centres, labels)
    assert best is not None
    return best[1:]


def _plus_plus(vectors: Tensor, clusters: int, inliers: int, generator: np.random.Generator) -> Tensor:
    """Return K of the `vectors` [m, d] as k-means++ seeds (Arthur & Vassilvitskii 2007): [K, d].

    Each next seed is drawn with a chance in proportion to its squared distance to the nearest so far. Only `inliers` of
    the vectors, those nearest to a seed, can be drawn, for outliers would nearly always be.
    """
    chosen = [int(generator.integers(len(vectors)))]
    while len(chosen) < clusters:
        squares = torch.cdist(vectors, vectors[chosen]).min(1).values.square()
        squares[squares.argsort(stable=True)[inliers:]] = 0.0
        weights = (squares / squares.sum()).numpy() if squares.sum() > 0 else None
        chosen.append(int(generator.choice(len(vectors), p=weights)))
    return vectors[chosen]


def _centres(vectors: Tensor, labels: Tensor, share: float, empty: Tensor) -> Tensor:
    """Return the robust mean of every cluster's members, or its row of `empty` [K, d] if it has none: [K, d]."""
    roster = Roster(labels)
    owner = roster.groups.owner
    middles = geometric_medians([vectors], roster.groups)[0]
    away = (vectors - middles[owner]).norm(dim=1)
    nearest = away.argsort(stable=True)  # then by cluster, so that each one's members lie together by distance
    nearest = nearest[owner[nearest].argsort(stable=True)]
    sizes = owner.bincount()
    place = torch.arange(len(vectors)) - (sizes.cumsum(0) - sizes)[owner[nearest]]
    inliers = sizes - torch.tensor([int(share * size) for size in sizes.tolist()])
    nearest = nearest[place < inliers[owner[nearest]]]
    result = empty.clone()
    result[roster.present] = per_size(Groups(owner[nearest], roster.groups.number), vectors[nearest], means)
    return result
