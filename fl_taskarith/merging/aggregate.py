"""Aggregation of task vectors τ_k = θ_k − θ, as plain dictionaries of tensors. Pure: no Flower, no data set."""

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightedMean:
    """Σ w_k τ_k / Σ w_k, folded in one task vector at a time: memory does not grow with the number of clients.

    Sums are float32 (float64 of float64), in the order of the calls, so equal orders give equal bits.
    """

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, task_vector: Mapping[str, Tensor], weight: float) -> None:
        """Fold in one task vector; it is read, not kept.

        Raises:
            ValueError: its names or shapes differ from the first one's, or `weight` is not positive.
        """
        if weight <= 0:
            raise ValueError(f"weight {weight} is not positive")
        if not self._sums:
            self._sums = {
                name: value.to(torch.promote_types(value.dtype, torch.float32)) * weight
                for name, value in task_vector.items()
            }
            self.total_weight = weight
            return
        if task_vector.keys() != self._sums.keys():
            different = sorted(task_vector.keys() ^ self._sums.keys())
            raise ValueError(f"tensors in one task vector and not in another: {', '.join(different)}")
        for name, value in task_vector.items():
            if value.shape != self._sums[name].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, before {tuple(self._sums[name].shape)}")
            self._sums[name].add_(value, alpha=weight)
        self.total_weight += weight

    def result(self) -> dict[str, Tensor]:
        """The mean so far, in new or reused storage: call once."""
        return {name: value.div_(self.total_weight) for name, value in self._sums.items()}


def apply_task_vector(
    weights: Mapping[str, Tensor], task_vector: Mapping[str, Tensor], step: float
) -> dict[str, Tensor]:
    """θ + step · τ for the tensors that τ has, the others as they are (McMahan et al. 2017, with a server step)."""
    return {
        name: torch.add(value, task_vector[name], alpha=step) if name in task_vector else value
        for name, value in weights.items()
    }


def task_vector_norm(task_vector: Mapping[str, Tensor]) -> float:
    """‖τ‖₂ over all tensors together; NaN or infinite if any entry is. One synchronisation per call."""
    if not task_vector:
        return 0.0
    norms = [torch.linalg.vector_norm(value) for value in task_vector.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
