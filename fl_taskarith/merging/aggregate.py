"""Averages of task vectors τ_k = θ_k − θ, added up one at a time: memory does not grow with the number of clients.

A task vector is a dictionary of tensors of any shape, the same names and shapes for all clients. Pure: no Flower.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fl_taskarith.errors import ConfigError


class WeightedMean:
    """Σ w_k τ_k / Σ w_k.

    Sums are float32 (float64 of float64), in the order of the calls, so equal orders give equal bits.
    """

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, task_vector: Mapping[str, Tensor], weight: float) -> None:
        """Add one task vector; no reference to it is kept.

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
        check_names(task_vector, self._sums)
        for name, value in task_vector.items():
            if value.shape != self._sums[name].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, before {tuple(self._sums[name].shape)}")
            self._sums[name].add_(value, alpha=weight)
        self.total_weight += weight

    def result(self) -> dict[str, Tensor]:
        """Return the mean, in the shapes of the task vectors. It overwrites the sums: call once."""
        return {name: value.div_(self.total_weight) for name, value in self._sums.items()}


def apply_task_vector(
    weights: Mapping[str, Tensor], task_vector: Mapping[str, Tensor], step: float, *, overwrite: bool = False
) -> dict[str, Tensor]:
    """Return θ + step · τ for the tensors of τ, in their shapes; the others as they are (McMahan et al. 2017).

    With `overwrite` the results take τ's memory: at tens of millions of weights, fresh memory costs more than the sum.
    """
    return {
        name: torch.add(value, task_vector[name], alpha=step, out=task_vector[name] if overwrite else None)
        if name in task_vector
        else value
        for name, value in weights.items()
    }


def checked_direction(direction: object, like: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a direction in the dtypes of `like`, if it is one: tensors of any of the names of `like`, in their shapes.

    Args:
        source: the setting that names what returned it, for the message.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(direction, Mapping):
        raise ConfigError(f"{source} returned a {type(direction).__name__}: expected a dictionary of tensors by name.")
    if unknown := sorted(map(str, direction.keys() - like.keys())):
        raise ConfigError(
            f"{source} returned {len(unknown)} tensors that are not trained: {', '.join(unknown[:3])}. Expected names "
            f"such as {next(iter(like), '')}."
        )
    for name, value in direction.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != like[name].shape:
            came = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"{source} returned {came} for {name}: expected floating-point numbers {list(like[name].shape)}."
            )
    return {name: value.to(like[name].dtype) for name, value in direction.items()}


def mean_pairwise_cosine(mean_norm: float, norms: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the mean cosine over all pairs of task vectors, pairs weighted by p_i‖τ_i‖ · p_j‖τ_j‖, from norms alone.

    With p = w / Σw: (‖Σ p τ‖² − Σ p²‖τ‖²) / ((Σ p‖τ‖)² − Σ p²‖τ‖²), whose numerator is the sum of p_i p_j ⟨τ_i, τ_j⟩
    over i ≠ j. None for fewer than two that are not zero.

    Args:
        mean_norm: ‖Σ p τ‖.
        norms: ‖τ‖ of each.
        weights: w of each.
    """
    lengths = [weight / sum(weights) * norm for weight, norm in zip(weights, norms, strict=True)]
    squares = sum(length**2 for length in lengths)
    pairs = sum(lengths) ** 2 - squares
    return (mean_norm**2 - squares) / pairs if pairs > 0 else None


def task_vector_norm(task_vector: Mapping[str, Tensor]) -> float:
    """Return ‖τ‖₂ over all tensors, of any shape, together; NaN or infinite if any entry is. One synchronisation."""
    if not task_vector:
        return 0.0
    norms = [torch.linalg.vector_norm(value) for value in task_vector.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def check_names(task_vector: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Check that two task vectors, whatever the shapes, have tensors of the same names.

    Raises:
        ValueError: one has a tensor that the other lacks.
    """
    if task_vector.keys() != other.keys():
        different = sorted(task_vector.keys() ^ other.keys())
        raise ValueError(f"tensors in one task vector and not in another: {', '.join(different)}")
