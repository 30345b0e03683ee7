"""Multi-round calibration of a mask (Iurada et al., "TaLoS", ICLR 2025, Sec. 4.2), and what a ranking keeps."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.masking.mask import Mask
from fl_taskarith.masking.rules import mask_rule
from fl_taskarith.seeding import random_generator

Sums = Callable[[int, Mask], tuple[Mapping[str, Tensor], int]]
"""From the calibration round, counted from 1, and the entries still alive: summed scores of every maskable tensor, in
its shape, and over how many examples. They are scores of the damped model (`damped`): without damping, more rounds
would only average sampling noise."""

TIED_SHARE = 0.01  # of the kept entries: if ties decide about more of them, the scores are no ranking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A mask and how it came about.

    threshold: the score of the last round that separates: the largest kept one, or the smallest under a rule that keeps
    the largest. densities: after each round.
    """

    mask: Mask
    threshold: float
    densities: tuple[float, ...]


def calibrate(
    sums: Sums, maskable: Mask, rule: str, *, density: float | None, threshold: float | None, rounds: int
) -> Calibration:
    """Drop entries over `rounds` rounds; each scores again, has one global threshold, and never takes an entry back.

    Round r of R keeps density^(r/R) of all maskable entries, so the last keeps exactly round(density · N). Under an
    absolute threshold instead, each round keeps the entries alive within it, and the density follows. A warning is
    logged for the first round in which equal scores leave the choice of many entries open (`Selection.arbitrary`).

    Args:
        maskable: all entries that may be updated.
        rule: a `mask-rule`, which decides whether small or large scores are kept.
        density: in (0, 1], or None under a threshold.
        threshold: on the mean score, or None under a density.

    Raises:
        ConfigError: nothing is left within the threshold, or the density is less than one entry.
        WeightsError: a score is NaN or infinite.
    """
    if (density is None) == (threshold is None):
        raise ValueError("give either a density or a threshold")
    largest = mask_rule(rule).keeps_largest
    alive, cut, densities, warned = maskable, 0.0, [], False
    for calibration_round in range(1, rounds + 1):
        summed, examples = sums(calibration_round, alive)
        scores = summed if examples == 1 else {name: value / examples for name, value in summed.items()}
        if not all(bool(value.isfinite().all()) for value in scores.values()):
            raise WeightsError(
                f'A score of mask-rule = "{rule}" is NaN or infinite in calibration round {calibration_round}: are the '
                "weights sound?"
            )
        if density is not None:
            count = min(round(density ** (calibration_round / rounds) * maskable.size), alive.updated)
            if count < 1:
                raise ConfigError(f"density = {density:g} of {maskable.size} maskable weights is less than one weight.")
            selection = keep_extreme(scores, alive, count, largest)
            alive, cut = selection.mask, selection.threshold
            if selection.arbitrary and not warned:
                warned = True
                log.warning("%s", _many_tied(selection, rule, calibration_round, rounds))
        else:
            assert threshold is not None
            alive, cut = keep_within(scores, alive, threshold, largest), threshold
            if not alive.updated:
                raise ConfigError(_nothing_within(threshold, largest, scores))
        densities.append(alive.density)
    return Calibration(alive, cut, tuple(densities))


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
    """Select the `count` entries alive with the smallest (or `largest`) scores, of their shapes, over all tensors.

    There is one global threshold. Of the entries equal to it just so many are kept that the number is exact: the first
    in the model's order where they are few; where the choice is `arbitrary`, a random sample that is the same every
    time, so that no layer is favoured.

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


def damped(weights: Mapping[str, Tensor], alive: Mask, soft_zero: float) -> dict[str, Tensor]:
    """Return θ where alive and soft_zero · θ where dropped ("soft zero" of TaLoS), in new tensors of their shapes."""
    return {name: torch.where(alive.tensors[name], value, value * soft_zero) for name, value in weights.items()}


def _many_tied(selection: Selection, rule: str, calibration_round: int, rounds: int) -> str:
    remedy = (
        "raise calibration-size (or calibration-per-client), or density, lower logit-scale, or set fisher-labels = "
        '"expected" or another mask-rule'
        if mask_rule(rule).scores is None
        else "change density, or set another mask-rule or mask-exclude"
    )
    return (
        f'The mask is partly arbitrary: in calibration round {calibration_round} of {rounds}, mask-rule = "{rule}" '
        f"finds {selection.tied} weights tied at the threshold, a score of {selection.threshold:.3g}, and keeps a "
        f"random {selection.tied_kept} of them among the {selection.mask.updated} kept. To rank them, {remedy}."
    )


def _nothing_within(threshold: float, largest: bool, scores: Mapping[str, Tensor]) -> str:
    values = torch.stack([score.max() if largest else score.min() for score in scores.values()])
    nearest = values.max() if largest else values.min()
    return (
        f"sensitivity-threshold = {threshold:g} leaves no weight to update: the {'largest' if largest else 'smallest'} "
        f"sensitivity is {nearest.item():.3g}. Choose a threshold on the other side of it, or a density."
    )
