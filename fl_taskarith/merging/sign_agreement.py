"""FedGMA: entries on whose sign clients disagree are damped (gradient masked averaging)."""

from collections.abc import Mapping

import torch
from torch import Tensor


class SignAgreement:
    """a = |Σ_k sign τ_k| / n per entry, sign 0 = 0, folded in one at a time (Tenison et al., TMLR 2023)."""

    def __init__(self) -> None:
        self.number = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, task_vector: Mapping[str, Tensor]) -> None:
        """Fold in the signs of one task vector; it is read, not kept."""
        if not self._sums:
            self._sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in task_vector.items()}
        for name, value in task_vector.items():
            self._sums[name].add_(value.sign())
        self.number += 1

    def result(self) -> dict[str, Tensor]:
        """The agreement so far, in [0, 1], in new or reused storage: call once."""
        return {name: value.abs_().div_(self.number) for name, value in self._sums.items()}


def damp_disagreement(
    task_vector: Mapping[str, Tensor], agreement: Mapping[str, Tensor], threshold: float
) -> dict[str, Tensor]:
    """m ⊙ τ with m = 1 where the agreement is at least ρ = `threshold`, else the agreement itself."""
    return {
        name: torch.where(agreement[name] >= threshold, value, agreement[name] * value)
        for name, value in task_vector.items()
    }
