"""FedNova (Wang et al., NeurIPS 2020): FedAvg for clients that take different numbers of local steps."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.aggregate import NormalisedMean
from fl_taskarith.strategies.fedavg import FedAvg, Reply


class FedNova(FedAvg):
    """Δ = (Σ p_k ‖a_k‖₁) Σ p_k τ_k/‖a_k‖₁, p_k = n_k / Σn; FedAvg where all take as many steps (`local-steps-max`)."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the mean per step times the mean number of steps, in the shapes of `weights`."""
        mean = NormalisedMean()
        for reply in replies:
            mean.add(reply.task_vector, reply.num_examples, reply.step_coefficient_sum)
        return mean.result()
