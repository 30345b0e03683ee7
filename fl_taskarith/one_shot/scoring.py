"""Model, tasks and heads of one data level: a model per task fine-tuned there, weights scored on all tasks, and a
merging rule's hyper-parameters chosen on validation by mean normalised accuracy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import SCALES, Direction, find_rule, scaled_weights
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.models.heads import LinearHead
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.finetune import Spread, Training, fine_tune_all, plan_training, solve_heads
from fl_taskarith.one_shot.tasks import Task, folder_tasks, make_tasks
from fl_taskarith.storage.paths import resolve
from fl_taskarith.workspace.workspace import Workspace

STRIDE = 4  # of λ, at first


@dataclass(frozen=True)
class TaskScore:
    """Accuracy in [0, 1] and mean cross-entropy of one task on one split."""

    accuracy: float
    loss: float


class Workbench:
    """The model of this process alone, whose head the tasks exchange, the tasks, and a head for each."""

    def __init__(self, one_shot: OneShot, overlap: float, seed: int) -> None:
        """Load the model and make the tasks.

        Raises:
            ConfigError: an overlap of data sets that have nothing in common.
        """
        config = one_shot.config(seed)
        self.home, self.seed = Workspace(config), seed
        if one_shot.family != "folders":
            self.tasks = make_tasks(self.home.data, one_shot.family, one_shot.number, overlap, seed)
        elif overlap:
            raise ConfigError("Data sets in folders of their own have nothing in common: set overlap = 0.")
        else:
            folders = [resolve(folder, "folders") for folder in one_shot.folders]
            self.tasks = folder_tasks(folders, config.input_size, self.home.device, seed)
        self.heads: list[LinearHead] = solve_heads(self.home, self.tasks, one_shot.shared_head)

    def plan(self, spread: Spread) -> list[Training]:
        """Plan the training of every task."""
        return plan_training(self.home.config, len(self.tasks), spread, self.seed)

    def fine_tune(self, plans: Sequence[Training]) -> list[dict[str, Tensor]]:
        """Fine-tune a model per task as its plan says; return the task vectors, in the model's shapes."""
        return fine_tune_all(self.home, self.tasks, self.heads, plans, self.seed)

    def scores(self, split: str, weights: Mapping[str, Tensor]) -> list[TaskScore]:
        """Score `weights`, by name in the model's shapes, on a split of every task."""
        return self._scores(weights, split, self.tasks, self.heads)

    def own_scores(self, split: str, task_vectors: Sequence[Mapping[str, Tensor]]) -> list[TaskScore]:
        """Score θ₀ plus each task vector, tensors in the model's shapes, on a split of its own task."""
        scores = []
        for vector, task, head in zip(task_vectors, self.tasks, self.heads, strict=True):
            scores += self._scores(scaled_weights(self.home.pretrained, vector, 1.0), split, [task], [head])
        return scores

    def divisors(self, split: str, task_vectors: Sequence[Mapping[str, Tensor]]) -> list[TaskScore]:
        """Return `own_scores` of task vectors in the model's shapes, each accuracy above 0 so that it can divide.

        Raises:
            ConfigError: names the tasks whose own model gets nothing right.
        """
        scores = self.own_scores(split, task_vectors)
        if unusable := [task.name for task, score in zip(self.tasks, scores, strict=True) if not score.accuracy]:
            raise ConfigError(
                f"The fine-tuned models of {', '.join(unusable)} get nothing right on the {split} images of their own "
                "task: lower learning-rate, or give model files in the order of the tasks."
            )
        return scores

    def _scores(
        self, weights: Mapping[str, Tensor], split: str, tasks: Sequence[Task], heads: Sequence[LinearHead]
    ) -> list[TaskScore]:
        """Score the backbone `weights` (θ₀ where they lack a tensor) under every task's own head."""
        self.home.load(self.home.pretrained | dict(weights))
        splits: list[ImageSet] = [getattr(task, split) for task in tasks]
        together = ImageSet(torch.cat([each.images for each in splits]), torch.cat([each.labels for each in splits]))
        parts = self.home.features(together).split([len(each) for each in splits])
        scores = []
        for features, examples, head in zip(parts, splits, heads, strict=True):
            logits = head.scores(features)
            accuracy = (logits.argmax(1) == examples.labels).double().mean().item()
            scores.append(TaskScore(accuracy, nn.functional.cross_entropy(logits, examples.labels).item()))
        return scores


def normalised_accuracy(scores: Sequence[TaskScore], own: Sequence[TaskScore]) -> float:
    """Return the mean over tasks of accuracy / accuracy of the task's own fine-tuned model.

    Each task's ratio is taken before the mean; dividing a running mean inside the loop over tasks, as published code
    does, weighs the first tasks by powers of T.
    """
    return fmean(merged.accuracy / alone.accuracy for merged, alone in zip(scores, own, strict=True))


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
    method: str, task_vectors: TaskVectors, weights: Mapping[str, Tensor],
    evaluate: Callable[[Mapping[str, Tensor]], Sequence[TaskScore]], own: Sequence[TaskScore], steps: Sequence[float],
    seed: int,
) -> Merged:  # fmt: skip
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
