"""FedAvgM (Hsu et al. 2019): FedAvg with momentum on the server."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedAvgM(FedAvg):
    """v ← βv + Δ, θ ← θ + η_s v, with FedAvg's Δ and β = `server-momentum`; Flower's FedAvgM computes the same."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return v, in the shapes of `weights`."""
        delta, beta = super().aggregate(weights, replies), self.config.server_momentum
        last = self.recalled("velocity", delta)
        velocity = {name: torch.add(value, last[name], alpha=beta) for name, value in delta.items()}
        self.keep("velocity", velocity)
        return velocity
