"""Which entries a ranking keeps: exactly the number asked for, whatever the ties."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask
from fl_taskarith.seeding import random_generator

TIED_SHARE = 0.01  # of the kept entries: if ties decide about more of them, the scores are no ranking


@dataclass(frozen=True)
class Selection:
    """The entries that are kept.

    threshold: the score of the last one kept, by rank. tied: entries alive with exactly that score. tied_kept: how many
    of those are kept. arbitrary: another choice among them could differ in more than `TIED_SHARE` of the kept entries.
    """

    mask: Mask
    threshold: float
    tied: int
    tied_kept: int
    arbitrary: bool


def keep_extreme(scores: Mapping[str, Tensor], alive: Mask, count: int, largest: bool) -> Selection:
    """Select the `count` entries alive with the smallest (or `largest`) scores over all tensors together.

    There is one global threshold. Of the entries equal to it just so many are kept that the number is exact: the first
    in the model's order where they are few; where the choice is `arbitrary`, a random sample that is the same every
    time, so that no layer is favoured.

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
    mask = Mask({name: torch.zeros_like(tensor) for name, tensor in alive.tensors.items()})
    for name, part in zip(alive.tensors, kept.split([int(each.sum()) for each in alive.tensors.values()]), strict=True):
        mask.tensors[name][alive.tensors[name]] = part
    cut = abs(threshold.item()) if largest else threshold.item()
    return Selection(mask, cut, len(ties), tied_kept, arbitrary)


def keep_within(scores: Mapping[str, Tensor], alive: Mask, threshold: float, largest: bool) -> Mask:
    """Select the entries alive whose score, in the same shapes, is at most `threshold` (or, `largest`, at least)."""
    return Mask(
        {
            name: tensor & (scores[name] >= threshold if largest else scores[name] <= threshold)
            for name, tensor in alive.tensors.items()
        }
    )
