"""FedNova (Wang et al., NeurIPS 2020): FedAvg for clients that take different numbers of local steps."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedNova(FedAvg):
    """Δ = (Σ p_k ‖a_k‖₁) Σ p_k τ_k/‖a_k‖₁, p_k = n_k / Σn, and ‖a_k‖₁ the plain SGD steps that k's steps amount to.

    It is FedAvg where all clients take as many steps (`local-steps-max` is off).
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the mean per step times the mean number of steps, in the shapes of `weights`."""
        per_step = WeightedMean()  # Σ (n/a) τ / Σ (n/a)
        examples = steps = 0.0
        for reply in replies:
            per_step.add(reply.task_vector, reply.num_examples / reply.step_coefficient_sum)
            examples += reply.num_examples
            steps += reply.num_examples * reply.step_coefficient_sum
        mean = per_step.result()
        scale = steps / examples * (per_step.total_weight / examples) if mean else 1.0
        return {name: value.mul_(scale) for name, value in mean.items()}
