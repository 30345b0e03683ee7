"""FedYogi (Reddi et al., ICLR 2021): Yogi on the server."""

from collections.abc import Mapping

from torch import Tensor

from fl_taskarith.merging.server_optimizer import Moments, yogi_moments
from fl_taskarith.strategies.fedadam import FedAdam


class FedYogi(FedAdam):
    """FedAdam with v ← v − (1 − β₂)Δ² sign(v − Δ²): the change of v does not grow with v."""

    def moments(self, delta: Mapping[str, Tensor], last: Moments) -> Moments:
        """Return m and v after Δ, in its shapes."""
        return yogi_moments(delta, last, self.config.server_beta1, self.config.server_beta2)
