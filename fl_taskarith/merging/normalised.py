"""FedNova: task vectors of clients that took different numbers of steps, averaged per step."""

from collections.abc import Mapping

from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean


class NormalisedMean:
    """(Σ p_k ‖a_k‖₁) · Σ p_k τ_k / ‖a_k‖₁ with p_k = w_k / Σ w, folded in one at a time (Wang et al., NeurIPS 2020).

    ‖a_k‖₁ says how many plain SGD steps client k's local ones amount to (`optim.step_coefficient_sum`); where it is the
    same for all this is the weighted mean.
    """

    def __init__(self) -> None:
        self._per_step = WeightedMean()  # Σ (w/a) τ / Σ (w/a)
        self._weights = self._steps = 0.0

    def add(self, task_vector: Mapping[str, Tensor], weight: float, step_coefficient_sum: float) -> None:
        """Fold in one task vector; it is read, not kept.

        Raises:
            ValueError: its names or shapes differ from the first one's, or a number is not positive.
        """
        if step_coefficient_sum <= 0:
            raise ValueError(f"the sum of step coefficients {step_coefficient_sum} is not positive")
        self._per_step.add(task_vector, weight / step_coefficient_sum)
        self._weights += weight
        self._steps += weight * step_coefficient_sum

    def result(self) -> dict[str, Tensor]:
        """The average so far, in new or reused storage: call once."""
        mean = self._per_step.result()
        scale = self._steps / self._weights * (self._per_step.total_weight / self._weights) if mean else 1.0
        return {name: value.mul_(scale) for name, value in mean.items()}
