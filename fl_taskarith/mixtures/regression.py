"""A mixture of K linear regressions spread over clients: the truth, each client's data, and where to start.

Client j belongs to one cluster z_j. Its n points have x ~ N(0, I_d) and y = ⟨x, θ*_{z_j}⟩ + ε, ε ~ N(0, σ²). Everything
is float64, and a client's data are a function of the seed and its number alone: more clients change nobody's data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.mixtures.matching import pairwise_distances
from fl_taskarith.seeding import random_generator


@dataclass(frozen=True)
class Points:
    """The data of g clients with n points each: inputs [g, n, d], outputs [g, n], float64."""

    inputs: Tensor
    outputs: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def grams(self) -> Tensor:
        """Return X_jᵀX_j of every client: [g, d, d]."""
        return self.inputs.mT @ self.inputs

    @cached_property
    def moments(self) -> Tensor:
        """Return X_jᵀy_j of every client: [g, d]."""
        return torch.einsum("gnd,gn->gd", self.inputs, self.outputs)


@dataclass(frozen=True)
class Mixture:
    """A mixture of K linear regressions, and which client has data of which.

    clients, clusters, dimension, examples: m, K, d and n. noise: σ, in units of y. centres: "equidistant" places θ* at
    pairwise distance `separation` (the last one at `farthest` from all others if that is above 0), which needs d >= K;
    "bernoulli" draws them from {0, 1}^d and scales to norm 1, as the published setting of BR-IFCA does. sizes: "random"
    draws z_j uniformly once per client, "equal" deals the clusters out one after another.
    """

    clients: int
    clusters: int
    dimension: int
    examples: int
    noise: float
    centres: str = "equidistant"
    sizes: str = "random"
    separation: float = 1.0
    farthest: float = 0.0
    seed: int = 0

    @cached_property
    def truth(self) -> Tensor:
        """Return θ*_k: [K, d]. No rotation is drawn: x is isotropic, so rotating all θ* would change nothing."""
        if self.centres == "equidistant":
            scales = torch.full((self.clusters,), self.separation / math.sqrt(2), dtype=torch.float64)
            if self.farthest and self.clusters > 1:
                scales[-1] = math.sqrt(self.farthest**2 - self.separation**2 / 2)
            return torch.eye(self.clusters, self.dimension, dtype=torch.float64) * scales[:, None]
        return self._bernoulli(random_generator(self.seed, "regression truth"))

    @cached_property
    def least_separation(self) -> float:
        """Return Δ_min, the smallest distance between two θ*; with one cluster, its norm."""
        if self.clusters == 1:
            return float(self.truth.norm())
        distances = pairwise_distances(self.truth, self.truth)
        return float(distances[~torch.eye(self.clusters, dtype=torch.bool)].min())

    def cluster_of(self, client: int) -> int:
        """Return z_j, from 0 to K − 1."""
        if self.sizes == "equal":
            return client % self.clusters
        return int(random_generator(self.seed, "regression cluster", client=client).integers(self.clusters))

    @cached_property
    def assignment(self) -> Tensor:
        """Return z_j of every client: int64 [m]."""
        return torch.tensor([self.cluster_of(client) for client in range(self.clients)])

    def points_of(self, clients: Sequence[int]) -> Points:
        """Return the data of the given clients, in that order: inputs [g, n, d]."""
        inputs = np.empty((len(clients), self.examples, self.dimension))
        noise = np.empty((len(clients), self.examples))
        for place, client in enumerate(clients):
            generator = random_generator(self.seed, "regression points", client=client)
            generator.standard_normal(out=inputs[place])
            generator.standard_normal(out=noise[place])
        own = self.truth[torch.tensor([self.cluster_of(client) for client in clients])]
        x = torch.from_numpy(inputs)
        return Points(x, torch.einsum("gnd,gd->gn", x, own) + self.noise * torch.from_numpy(noise))

    def all_points(self) -> Points:
        """Return the data of all m clients."""
        return self.points_of(range(self.clients))

    def start(self, kind: str, radius: float) -> Tensor:
        """Return θ before the first round, [K, d].

        "ball" is uniform in the ball of radius `radius` · Δ_min around each θ*_k. "random" is another draw of the law
        of Bernoulli centres, as published code starts BR-IFCA: nothing ties an estimate to a cluster.
        """
        generator = random_generator(self.seed, "regression start")
        if kind == "random":
            return self._bernoulli(generator)
        directions = generator.standard_normal((self.clusters, self.dimension))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = generator.random((self.clusters, 1)) ** (1 / self.dimension)
        return self.truth + radius * self.least_separation * torch.from_numpy(lengths * directions)

    def _bernoulli(self, generator: np.random.Generator) -> Tensor:
        """Draw K distinct vectors of {0, 1}^d other than zero, each scaled to norm 1: [K, d].

        Raises:
            ValueError: there are fewer.
        """
        if self.clusters > 2 ** min(self.dimension, 53) - 1:
            raise ValueError(f"there are no {self.clusters} different vectors of 0 and 1 in dimension {self.dimension}")
        rows: list[np.ndarray] = []
        while len(rows) < self.clusters:
            row = generator.integers(0, 2, self.dimension)
            if row.any() and not any(np.array_equal(row, other) for other in rows):
                rows.append(row)
        drawn = np.array(rows, dtype=np.float64)
        return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
