"""All that a strategy of one's own takes: `strategy = "own_strategy:SignMean"`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fl_taskarith.strategies.fedavg import FedAvg, Reply
from fl_taskarith.strategies.fedbn import FedBN
from fl_taskarith.strategies.fedhbm import FedHBM
from fl_taskarith.strategies.local_ghbm import LocalGHBM
from fl_taskarith.strategies.scaffold import Scaffold


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


class ScaffoldAgain(Scaffold):
    """Likewise."""


class FedBNAgain(FedBN):
    """Likewise."""


class Mistaken(FedAvg):
    """Makes the mistake that `mistake` names."""

    mistake = ""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> Any:
        if self.mistake == "reads one":
            return next(iter(replies)).task_vector
        if self.mistake == "reads none":
            return {}
        mean = super().aggregate(weights, replies)
        first = next(iter(mean))
        returned = {
            "twice": lambda: super(Mistaken, self).aggregate(weights, replies),
            "other names": lambda: {f"x.{name}": value for name, value in mean.items()},
            "scalar": lambda: mean | {first: mean[first].mean()},
            "whole numbers": lambda: mean | {first: mean[first].long()},
            "none": lambda: None,
            "list": lambda: list(mean),
            "raises": lambda: mean["heads"],
            "keeps a number": lambda: self.keep("rounds", {"n": 3}),  # type: ignore[dict-item]
        }[self.mistake]
        return returned()


class InPlace(FedAvg):
    """Changes what it is given, which is a copy."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        mean = super().aggregate(weights, replies)
        for value in weights.values():
            value.zero_()
        return {name: value.double() for name, value in mean.items()}


class NoStrategy:
    pass
