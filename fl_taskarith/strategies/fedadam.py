"""FedAdam (Reddi et al., ICLR 2021): Adam on the server."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fl_taskarith.merging.server_optimizer import Moments, adam_moments, adaptive_direction
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedAdam(FedAvg):
    """θ ← θ + η_s m/(√v + τ), with moments of FedAvg's Δ as in Algorithm 2: no bias correction, v starts at τ².

    Flower's FedAdam corrects for bias and starts v at 0, so the two differ in their first rounds. Keys: `server-beta1`,
    `server-beta2`, `server-tau`.
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return m/(√v + τ), in the shapes of `weights`."""
        delta, tau = super().aggregate(weights, replies), self.config.server_tau
        moments = self.moments(delta, Moments(self.recalled("m", delta), self.recalled("v", delta, start=tau**2)))
        self.keep("m", moments.first)
        self.keep("v", moments.second)
        return adaptive_direction(moments, tau)

    def moments(self, delta: Mapping[str, Tensor], last: Moments) -> Moments:
        """Return m and v after Δ, in its shapes."""
        return adam_moments(delta, last, self.config.server_beta1, self.config.server_beta2)
