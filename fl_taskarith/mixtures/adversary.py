"""The attackers among the clients of a mixture: who they are, where they report to, and what their data look like."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.merging.attacks import draw_byzantine
from fl_taskarith.mixtures.clustering import FREE
from fl_taskarith.mixtures.regression import Mixture, Points
from fl_taskarith.seeding import random_generator

OWN_NORM = 3.0  # of the attackers' own θ, and the factor on θ_k at which they take gradients: published code of BR-IFCA


@dataclass(frozen=True)
class Adversary:
    """⌊α m_k⌋ Byzantine clients in every cluster k; none with fraction 0.

    attack: one of `choices.ATTACKS`. "scaled-model": data of a θ of their own with norm 3, gradients taken at 3 θ_k.
    "random-labels": y drawn without regard to x, as widely spread as before. The others keep their data and lie in
    their reports. placement: "spread" lets each report to its own cluster's model; "one-cluster" lets all report to
    cluster 0, where their share exceeds α.
    """

    mixture: Mixture
    fraction: float
    attack: str
    placement: str = "spread"

    @cached_property
    def byzantine(self) -> Tensor:
        """Return whether each client is Byzantine: bool [m]."""
        drawn = draw_byzantine(self.mixture.assignment.numpy(), self.fraction, self.mixture.seed)
        return torch.from_numpy(drawn)

    @cached_property
    def reported(self) -> Tensor:
        """Return the cluster that a Byzantine client reports to, FREE for an honest one: int64 [m]."""
        target = self.mixture.assignment if self.placement == "spread" else torch.zeros_like(self.mixture.assignment)
        return torch.where(self.byzantine, target, FREE)

    @cached_property
    def magnified(self) -> Tensor | None:
        """Return the factor on θ before a client takes its gradient, [m]; None where it is 1 for all."""
        if self.attack != "scaled-model" or not self.byzantine.any():
            return None
        return torch.where(self.byzantine, OWN_NORM, 1.0).double()

    def points_of(self, clients: Sequence[int]) -> Points:
        """Return the data of the given clients, inputs [g, n, d], those of attackers as their attack has them."""
        points = self.mixture.points_of(clients)
        if self.attack not in ("scaled-model", "random-labels"):
            return points
        outputs = points.outputs.clone()
        for place, client in enumerate(clients):
            if self.byzantine[client]:
                outputs[place] = self._false_outputs(points.inputs[place], client)
        return Points(points.inputs, outputs)

    def _false_outputs(self, inputs: Tensor, client: int) -> Tensor:
        """Return an attacker's outputs [n] for its inputs [n, d]."""
        mixture = self.mixture
        generator = random_generator(mixture.seed, "byzantine outputs", client=client)
        noise = torch.from_numpy(generator.standard_normal(mixture.examples))
        if self.attack == "scaled-model":
            predicted: Tensor = inputs @ self._own_theta
            return predicted + mixture.noise * noise
        spread: float = float(mixture.truth[mixture.cluster_of(client)].norm().square() + mixture.noise**2) ** 0.5
        return spread * noise

    @cached_property
    def _own_theta(self) -> Tensor:
        """Return the attackers' common θ: a draw of {0, 1}^d scaled to norm 3, [d]."""
        generator = random_generator(self.mixture.seed, "byzantine theta")
        drawn = generator.integers(0, 2, self.mixture.dimension).astype(np.float64)
        drawn[0] = 1.0  # never all zero
        return torch.from_numpy(OWN_NORM * drawn / np.linalg.norm(drawn))
