"""FedYogi (Reddi et al., ICLR 2021): Yogi on the server."""

import torch
from torch import Tensor

from fl_taskarith.strategies.fedadam import FedAdam


class FedYogi(FedAdam):
    """FedAdam with v ← v − (1 − β₂)Δ² sign(v − Δ²): the change of v does not grow with v."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return v after a round with Δ² = `square`, in its shape."""
        return v - (1 - self.config.server_beta2) * square * torch.sign(v - square)
