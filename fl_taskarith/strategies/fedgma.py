"""FedGMA (Tenison et al., TMLR 2023): FedAvg, damped where clients disagree on a sign."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedGMA(FedAvg):
    """m ⊙ Σ p_k τ_k, m = 1 where a = |Σ_k sign τ_k| / |S| is at least ρ = `gma-threshold`, else m = a; sign 0 = 0."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the weighted mean times m, in the shapes of `weights`."""
        mean, signs, number = WeightedMean(), dict[str, Tensor](), 0
        for reply in replies:
            mean.add(reply.task_vector, reply.num_examples)
            for name, value in reply.task_vector.items():
                signs.setdefault(name, torch.zeros_like(value, dtype=torch.float32)).add_(value.sign())
            number += 1
        result = mean.result()
        for name, value in result.items():
            agreement = signs[name].abs_().div_(number)
            result[name] = torch.where(agreement >= self.config.gma_threshold, value, agreement * value)
        return result
