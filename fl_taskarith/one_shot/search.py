"""Hyper-parameters of a merging rule, chosen on validation by mean normalised accuracy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from fl_taskarith.merging.one_shot import MERGE_RULES, SCALES, Direction, merge_direction, scaled_weights
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.one_shot.finetune import TaskScore

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
    """Every value of the rule's hyper-parameter times every λ; ties go to the smaller mean validation loss.

    Args:
        weights: θ₀.
        evaluate: scores of all tasks on validation, for given weights.
        own: the same of each task's own model, on its task.
        steps: ‖a‖₁ of each model's training, for FedNova.
        seed: for DARE.
    """
    rule = MERGE_RULES[method]
    values: Sequence[float | None] = list(rule.values(task_vectors)) if rule.parameter else [None]
    tried = list(scales) if rule.scaled else [1.0]
    best: Merged | None = None
    best_rank = (-math.inf, -math.inf)
    for value in values:
        direction = merge_direction(method, task_vectors, value, steps, seed)
        for scale in tried:
            scores = evaluate(scaled_weights(weights, direction, scale))
            normalised, loss = normalised_accuracy(scores, own), fmean(score.loss for score in scores)
            rank = (normalised, -loss if math.isfinite(loss) else -math.inf)
            if best is None or rank > best_rank:
                edge = len(tried) > 1 and scale in (tried[0], tried[-1])
                best, best_rank = Merged(method, value, scale, normalised, edge, direction), rank
    assert best is not None
    return best
