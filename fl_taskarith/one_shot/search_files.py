"""Hyper-parameters for merging model files, chosen on the validation split of each model's own task."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import MERGE_RULES, scaled_weights
from fl_taskarith.models.heads import LinearHead
from fl_taskarith.one_shot.benchmark import prepare
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.finetune import TaskScore, backbone_names, score_tasks, solve_heads
from fl_taskarith.one_shot.merge_files import MergeSettings, MergeSources
from fl_taskarith.one_shot.model_files import ModelFile
from fl_taskarith.one_shot.scale_search import normalised_accuracy, search_merge
from fl_taskarith.one_shot.tasks import Task


def search_files(sources: MergeSources, settings: MergeSettings, one_shot: OneShot, level: str = "") -> MergeSettings:
    """`settings` with the value and λ of the best mean normalised accuracy; prints them, and accuracies per task.

    A task is scored by its model's own classifier (head.weight, head.bias in timm's layout) where the file has one of
    its size, else by the ridge head of its training data on the features of θ₀.

    Args:
        one_shot: its tasks are those of the models, in order; its settings name the architecture and input size.
        level: of data heterogeneity; "" for the first.

    Raises:
        ConfigError: no base, as many tasks as models are needed, or the level is not known.
        WeightsError: the base is no model of that architecture in a layout that timm knows.
    """
    level = level or next(iter(one_shot.data))
    if not sources.has_base:
        raise ConfigError("--search loads the model that all were fine-tuned from: give it with --base.")
    if level not in one_shot.data:
        raise ConfigError(f"--data {level}: expected one of {', '.join(one_shot.data)}.")
    if one_shot.number != len(sources.vectors):
        raise ConfigError(
            f"{len(sources.vectors)} models for {one_shot.number} tasks: expected one per task, in order."
        )
    started_from = {**one_shot.settings, "weights": str(sources.base.path.resolve())}
    home, tasks = prepare(dataclasses.replace(one_shot, settings=started_from), one_shot.data[level], settings.seed)
    names = backbone_names(home)
    unlike = [name for name in names if sources.base.shape(name) != tuple(home.shapes[name])]
    if unlike:
        raise ConfigError(
            f"{', '.join(unlike[:5])} ({len(unlike)} tensors) are not in {sources.base.path} as the model at "
            f"input-size = {home.config.input_size} has them: name the files' model and input size in "
            f"{one_shot.source}."
        )
    vectors = [vector.of(names) for vector in sources.vectors]
    ridge = solve_heads(home, tasks, one_shot.shared_head)
    heads = [_own_head(model, task) or head for model, task, head in zip(sources.models, tasks, ridge, strict=True)]

    def alone(split: str) -> list[TaskScore]:
        return [
            score_tasks(home, scaled_weights(home.pretrained, vector, 1.0), [getattr(task, split)], [head])[0]
            for vector, task, head in zip(vectors, tasks, heads, strict=True)
        ]

    def score(split: str, weights: dict[str, Tensor]) -> list[TaskScore]:
        return score_tasks(home, weights, [getattr(task, split) for task in tasks], heads)

    own = alone("validation")
    if any(not each.accuracy for each in own):
        raise ConfigError("A model gets nothing right on its own task: are the files in the order of the tasks?")
    try:
        found = search_merge(
            settings.method, vectors, home.pretrained, lambda weights: score("validation", dict(weights)), own,
            settings.steps, settings.seed,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"{settings.method}: {error}.") from error
    chosen = dataclasses.replace(settings, value=found.value, scale=found.scale if _scaled(settings) else None)
    own_test = alone("test")
    test = score("test", scaled_weights(home.pretrained, found.direction, found.scale))
    print(*_report(chosen, tasks, test, own_test, found.normalised, found.edge), sep="\n")
    return chosen


def _scaled(settings: MergeSettings) -> bool:
    return MERGE_RULES[settings.method].scaled


def _own_head(model: ModelFile, task: Task) -> LinearHead | None:
    shape = model.shape("head.weight")
    if shape is None or shape[0] != len(task.classes) or model.shape("head.bias") != (shape[0],):
        return None
    device = task.train.labels.device
    return LinearHead(model["head.weight"].float().to(device), model["head.bias"].float().to(device))


def _report(
    chosen: MergeSettings,
    tasks: Sequence[Task],
    test: Sequence[TaskScore],
    own: Sequence[TaskScore],
    validation: float,
    edge: bool,
) -> list[str]:
    parameter = MERGE_RULES[chosen.method].parameter
    words = [f"λ = {chosen.scale:g}" + (" (at an end of the range)" if edge else "")] if chosen.scale else []
    words += [f"{parameter} = {chosen.value:g}"] if parameter else []
    lines = [f"{chosen.method}: {', '.join(words) or 'nothing to choose'}; validation, normalised: {validation:.4f}"]
    lines += [
        f"  {task.name}: test accuracy {merged.accuracy:.4f}, its own model {alone.accuracy:.4f}"
        for task, merged, alone in zip(tasks, test, own, strict=True)
    ]
    return [*lines, f"  mean normalised test accuracy {normalised_accuracy(test, own):.4f}"]
