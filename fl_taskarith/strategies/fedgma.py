"""FedGMA (Tenison et al., TMLR 2023): FedAvg, damped where clients disagree on a sign."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.aggregate import SignAgreement, WeightedMean, damp_disagreement
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedGMA(FedAvg):
    """m ⊙ Σ p_k τ_k, m = 1 where |Σ_k sign τ_k| / |S| is at least ρ = `gma-threshold`, else that share itself."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the weighted mean times m, in the shapes of `weights`."""
        mean, agreement = WeightedMean(), SignAgreement()
        for reply in replies:
            mean.add(reply.task_vector, reply.num_examples)
            agreement.add(reply.task_vector)
        return damp_disagreement(mean.result(), agreement.result(), self.config.gma_threshold)
