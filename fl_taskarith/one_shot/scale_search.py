"""Hyper-parameters of a merging rule, chosen on validation by mean normalised accuracy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from fl_taskarith.merging.merge_rules import SCALES, Direction, find_rule, scaled_weights
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.one_shot.scoring import TaskScore, normalised_accuracy

STRIDE = 4

Evaluate = Callable[[Mapping[str, Tensor]], Sequence[TaskScore]]


@dataclass(frozen=True)
class Merged:
    """A rule at its chosen hyper-parameters.

    value: of the rule's own parameter, None if it has none. scale: λ. normalised: mean normalised accuracy on
    validation. edge: whether λ lies at an end of what was searched. direction: of the merged model from θ₀.
    """

    value: float | None
    scale: float
    normalised: float
    edge: bool
    direction: Direction


def search_merge(
    method: str,
    task_vectors: TaskVectors,
    weights: Mapping[str, Tensor],
    evaluate: Evaluate,
    own: Sequence[TaskScore],
    steps: Sequence[float],
    seed: int,
) -> Merged:
    """Try every value of the rule's parameter at every fourth λ, then the best value at all λ around its best.

    The score over λ rises and falls once, but for noise, so that this finds what the whole grid would at a quarter of
    the cost. Ties go to the smaller mean validation loss, then to what was tried first. A rule without a scale is tried
    at λ = 1.

    Args:
        task_vectors, weights: τ_t and θ₀, the same names and shapes.
        evaluate: scores of all tasks on validation, for given weights.
        own: the score of each task's own model on its task.
        steps: ‖a‖₁ of each model's training, for rules that take it.
        seed: for rules that take it.

    Raises:
        ValueError: the task vectors do not match.
    """
    rule = find_rule(method)
    tried = SCALES if rule.scaled else (1.0,)
    coarse = range(STRIDE - 1, len(tried), STRIDE) if rule.scaled else range(1)

    def rank(direction: Direction, place: int) -> tuple[float, float]:
        scores = evaluate(scaled_weights(weights, direction, tried[place]))
        loss = fmean(score.loss for score in scores)
        return normalised_accuracy(scores, own), -loss if math.isfinite(loss) else -math.inf

    best: tuple[tuple[float, float], float | None, int, Direction] | None = None
    for value in rule.searched(task_vectors):
        direction = rule.direction(task_vectors, value, steps, seed)
        for place in coarse:
            reached = rank(direction, place)
            if best is None or reached > best[0]:
                best = reached, value, place, direction
    assert best is not None
    highest, value, middle, direction = best
    chosen = middle
    for place in range(max(0, middle - STRIDE + 1), min(len(tried), middle + STRIDE)):
        if place not in coarse and (reached := rank(direction, place)) > highest:
            highest, chosen = reached, place
    edge = rule.scaled and chosen in (0, len(tried) - 1)
    return Merged(value, tried[chosen], highest[0], edge, direction)
