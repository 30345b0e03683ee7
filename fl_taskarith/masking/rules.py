"""Which entries a rule keeps, at exactly the number asked for, whatever the ties."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask
from fl_taskarith.seeding import random_generator

LARGEST_FIRST = ("most-sensitive", "highest-magnitude")


TIED_SHARE = 0.01  # of the kept entries: more of them chosen among equal scores than this is no ranking


@dataclass(frozen=True)
class Kept:
    """The entries that a rule keeps.

    threshold: the score of the last one kept, by rank. tied: entries alive with exactly that score. tied_kept: how many
    of those are kept. arbitrary: another choice among them could differ in more than `TIED_SHARE` of the kept entries.
    """

    mask: Mask
    threshold: float
    tied: int
    tied_kept: int
    arbitrary: bool


def keep_extreme(scores: Mapping[str, Tensor], alive: Mask, count: int, largest: bool) -> Kept:
    """The `count` entries alive with the smallest (or `largest`) scores over all tensors together.

    One global threshold, and among entries equal to it just so many that the number is exact: those first in the
    model's order where they are few; where the choice is `Kept.arbitrary`, a random sample that is the same every time,
    so that no layer is favoured.

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
    tied_kept = count - int(kept.sum())
    arbitrary = min(tied_kept, len(ties) - tied_kept) > TIED_SHARE * count
    if arbitrary:
        order = random_generator(0, "entries of equal score").permutation(len(ties))
        ties = ties[torch.from_numpy(order).to(ties.device)]
    kept[ties[:tied_kept]] = True
    cut = abs(threshold.item()) if largest else threshold.item()
    return Kept(_among(alive, kept), cut, len(ties), tied_kept, arbitrary)


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
