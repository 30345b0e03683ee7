"""FedExP (Jhunjhunwala et al., ICLR 2023): a server step that grows as the clients' updates point apart."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean, task_vector_norm
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedExP(FedAvg):
    """The mean task vector, clients alike, times max(1, Σ ‖τ_k‖² / 2M(‖mean‖² + ε)), M clients, ε = `exp-epsilon`."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the mean times the step, in the shapes of `weights`."""
        mean, squares = WeightedMean(), 0.0
        for reply in replies:
            squares += task_vector_norm(reply.task_vector) ** 2
            mean.add(reply.task_vector, 1.0)
        result = mean.result()
        divisor = 2 * mean.total_weight * (task_vector_norm(result) ** 2 + self.config.exp_epsilon)
        step = max(1.0, squares / divisor) if divisor else 1.0
        return {name: step * value for name, value in result.items()}
