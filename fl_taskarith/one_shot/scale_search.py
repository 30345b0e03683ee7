"""Hyper-parameters of a merging rule, chosen on validation by mean normalised accuracy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from fl_taskarith.merging.merge_rules import MERGE_RULES, SCALES, Direction, merge_direction, scaled_weights
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.one_shot.finetune import TaskScore

STRIDE = 4

Evaluate = Callable[[Mapping[str, Tensor]], Sequence[TaskScore]]


@dataclass(frozen=True)
class Merged:
    """A rule at its chosen hyper-parameters.

    value: of the rule's own hyper-parameter, None if it has none. scale: λ. normalised: mean normalised accuracy on
    validation. edge: whether λ or the value lies at an end of what was searched, that end not being its natural limit.
    direction: of the merged model from θ₀.
    """

    method: str
    value: float | None
    scale: float
    normalised: float
    edge: bool
    direction: Direction


def normalised_accuracy(scores: Sequence[TaskScore], own: Sequence[TaskScore]) -> float:
    """The mean over tasks of accuracy / accuracy of the task's own fine-tuned model.

    Each task's ratio is taken before the mean; dividing a running mean inside the loop over tasks, as published code
    does, weighs the first tasks by powers of T.
    """
    return fmean(merged.accuracy / alone.accuracy for merged, alone in zip(scores, own, strict=True))


def search_merge(
    method: str,
    task_vectors: TaskVectors,
    weights: Mapping[str, Tensor],
    evaluate: Evaluate,
    own: Sequence[TaskScore],
    steps: Sequence[float],
    seed: int,
    scales: Sequence[float] = SCALES,
) -> Merged:
    """Every value of the rule's hyper-parameter at every fourth λ, then the best value at all λ around its best.

    The score over λ rises and falls once, but for noise, so that this finds what the whole grid would at a quarter of
    the cost. Ties go to the smaller mean validation loss, then to what was tried first.

    Args:
        weights: θ₀.
        evaluate: scores of all tasks on validation, for given weights.
        own: the same of each task's own model, on its task.
        steps: ‖a‖₁ of each model's training, for FedNova.
        seed: for DARE.
        scales: λ, rising; a rule that has none is tried at 1.
    """
    rule = MERGE_RULES[method]
    values: Sequence[float | None] = list(rule.values(task_vectors)) if rule.parameter else [None]
    tried = list(scales) if rule.scaled else [1.0]
    coarse = range(STRIDE - 1, len(tried), STRIDE) if len(tried) >= STRIDE else range(len(tried))

    def ranked(direction: Direction, place: int) -> tuple[float, float]:
        scores = evaluate(scaled_weights(weights, direction, tried[place]))
        loss = fmean(score.loss for score in scores)
        return normalised_accuracy(scores, own), -loss if math.isfinite(loss) else -math.inf

    best: tuple[tuple[float, float], float | None, int, Direction] | None = None
    for value in values:
        direction = merge_direction(method, task_vectors, value, steps, seed)
        for place in coarse:
            rank = ranked(direction, place)
            if best is None or rank > best[0]:
                best = rank, value, place, direction
    assert best is not None
    rank, value, middle, direction = best
    chosen = middle
    for place in range(max(0, middle - STRIDE + 1), min(len(tried), middle + STRIDE)):
        if place not in coarse and (found := ranked(direction, place)) > rank:
            rank, chosen = found, place
    edge = len(tried) > 1 and chosen in (0, len(tried) - 1)
    return Merged(method, value, tried[chosen], rank[0], edge, direction)
