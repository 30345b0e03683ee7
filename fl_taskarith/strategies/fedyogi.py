"""FedYogi (Reddi et al., ICLR 2021): Yogi on the server."""

from collections.abc import Mapping

from torch import Tensor

from fl_taskarith.merging.server_optimizer import Moments, yogi_moments
from fl_taskarith.strategies.fedadam import FedAdam


class FedYogi(FedAdam):
    """FedAdam with v ← v − (1 − β₂)Δ² sign(v − Δ²): v changes by a step that does not depend on how large it is."""

    def moments(self, delta: Mapping[str, Tensor], last: Moments) -> Moments:
        """m and v after Δ."""
        return yogi_moments(delta, last, self.config.server_beta1, self.config.server_beta2)
