"""Model, tasks and heads of one data level: fine-tuning a model per task there, and scoring weights on all tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import scaled_weights
from fl_taskarith.models.heads import LinearHead
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.finetune import Spread, Training, fine_tune_all, plan_training, solve_heads
from fl_taskarith.one_shot.tasks import Task, folder_tasks, make_tasks
from fl_taskarith.storage.paths import resolve
from fl_taskarith.workspace.workspace import Workspace


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
