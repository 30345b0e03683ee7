"""FedVARP (Jhunjhunwala et al., UAI 2022): what clients that are not in the round sent last takes their place."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_taskarith.strategies.fedavg import FedAvg, Reply

MEAN = "mean"


class FedVARP(FedAvg):
    """v = mean_S(τ_k − y_k) + mean over all K of y; then y_k ← τ_k for the clients S of the round. y starts at zero.

    Clients count alike. v has the expectation of FedAvg's mean, where a mean of y alone is stale. The server keeps K
    task vectors and their mean, each client's under its own kind, so that checkpoints hold them.
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return v, in the shapes of `weights`."""
        mean = self.recalled(MEAN, weights)
        change = {name: torch.zeros_like(value) for name, value in mean.items()}
        count = 0
        for reply in replies:
            last = self.recalled(f"client-{reply.client}", weights)
            for name, value in reply.task_vector.items():
                change[name] += value - last[name]
            self.keep(f"client-{reply.client}", {name: value.clone() for name, value in reply.task_vector.items()})
            count += 1
        clients = self.config.num_clients
        self.keep(MEAN, {name: torch.add(value, change[name], alpha=1 / clients) for name, value in mean.items()})
        return {name: torch.add(value, change[name], alpha=1 / count) for name, value in mean.items()}
