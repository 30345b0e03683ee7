"""FedAdam (Reddi et al., ICLR 2021): Adam on the server."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedAdam(FedAvg):
    """θ ← θ + η_s m/(√v + τ), with m ← β₁m + (1 − β₁)Δ and v ← β₂v + (1 − β₂)Δ² of FedAvg's Δ.

    This is Algorithm 2 of the paper: no bias correction, v starts at τ². Flower's FedAdam corrects for bias and starts
    v at 0, so the two differ in their first rounds. Keys: `server-beta1`, `server-beta2`, `server-tau`.
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return m/(√v + τ), in the shapes of `weights`."""
        delta, beta1, tau = super().aggregate(weights, replies), self.config.server_beta1, self.config.server_tau
        m, v = self.recalled("m", delta), self.recalled("v", delta, start=tau**2)
        m = {name: beta1 * m[name] + (1 - beta1) * value for name, value in delta.items()}
        v = {name: self.second_moment(v[name], value.square()) for name, value in delta.items()}
        self.keep("m", m)
        self.keep("v", v)
        return {name: value / (v[name].sqrt() + tau) for name, value in m.items()}

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v after a round with Δ² = `square`, in its shape."""
        return self.config.server_beta2 * v + (1 - self.config.server_beta2) * square
