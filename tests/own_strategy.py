"""All that a strategy of one's own takes: `strategy = "own_strategy:SignMean"`."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_taskarith.strategies.fedavg import FedAvg, Reply
from fl_taskarith.strategies.fedhbm import FedHBM
from fl_taskarith.strategies.local_ghbm import LocalGHBM


class SignMean(FedAvg):
    """The mean of the signs of the task vectors, and how many rounds there were."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        signs = ({name: value.sign() for name, value in reply.task_vector.items()} for reply in replies)
        mean = super().aggregate(weights, (Reply(0, each, 1.0) for each in signs))
        counted = self.recalled("rounds", {"count": torch.zeros(())})
        self.keep("rounds", {"count": counted["count"] + 1})
        return mean


class LocalGHBMAgain(LocalGHBM):
    """Its clients would train as those of FedAvg."""


class FedHBMAgain(FedHBM):
    """Likewise."""


class NoStrategy:
    pass
