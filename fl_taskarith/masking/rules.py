"""Which entries a rule keeps, at exactly the number asked for, whatever the ties."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask

LARGEST_FIRST = ("most-sensitive", "highest-magnitude")


def keep_extreme(scores: Mapping[str, Tensor], alive: Mask, count: int, largest: bool) -> tuple[Mask, float]:
    """The `count` entries alive with the smallest (or `largest`) scores over all tensors together, and the k-th score.

    One global threshold; among entries equal to it those first in the model's order are kept, so the number is exact.

    Args:
        scores: one tensor per name of `alive`, of its shape.
        count: entries to keep, 1..alive.updated.

    Raises:
        ValueError: a score is NaN, or `count` is out of range.
    """
    if not 1 <= count <= alive.updated:
        raise ValueError(f"{count} entries to keep of {alive.updated}")
    candidates = torch.cat([scores[name][tensor] for name, tensor in alive.tensors.items()])
    if candidates.isnan().any():
        raise ValueError("a score is NaN")
    ordered = -candidates if largest else candidates
    threshold = torch.kthvalue(ordered, count).values
    kept = ordered < threshold
    ties = (ordered == threshold).nonzero().flatten()
    kept[ties[: count - int(kept.sum())]] = True
    return _among(alive, kept), abs(threshold.item()) if largest else threshold.item()


def keep_within(scores: Mapping[str, Tensor], alive: Mask, threshold: float, largest: bool) -> Mask:
    """The entries alive whose score is at most `threshold` (or, `largest`, at least)."""
    kept = {}
    for name, tensor in alive.tensors.items():
        kept[name] = tensor & (scores[name] >= threshold if largest else scores[name] <= threshold)
    return Mask(kept)


def data_free_scores(rule: str, weights: Mapping[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
    """What a rule that needs no data ranks by: |θ₀|, or a random order of all entries drawn from `generator`."""
    if rule != "random":
        return {name: value.abs() for name, value in weights.items()}
    sizes = [value.numel() for value in weights.values()]
    order = torch.from_numpy(generator.permutation(sum(sizes)))
    return {
        name: part.view(value.shape).to(value.device)
        for (name, value), part in zip(weights.items(), order.split(sizes), strict=True)
    }


def _among(alive: Mask, kept: Tensor) -> Mask:
    """The mask that is True where `kept`, bool [alive.updated], holds among the entries alive."""
    tensors, start = {}, 0
    for name, tensor in alive.tensors.items():
        number = int(tensor.sum())
        chosen = torch.zeros_like(tensor)
        chosen[tensor] = kept[start : start + number]
        tensors[name], start = chosen, start + number
    return Mask(tensors)
