"""FedAvgM (Hsu et al. 2019): FedAvg with momentum on the server."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.server_optimizer import momentum_step
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedAvgM(FedAvg):
    """v ← βv + Δ, θ ← θ + η_s v, with FedAvg's Δ and β = `server-momentum`; Flower's FedAvgM computes the same."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return v, in the shapes of `weights`."""
        delta = super().aggregate(weights, replies)
        velocity = momentum_step(delta, self.recalled("velocity", delta), self.config.server_momentum)
        self.keep("velocity", velocity)
        return velocity
