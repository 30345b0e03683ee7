"""Hyper-parameters for merging model files, chosen on the validation split of each model's own task."""

import dataclasses
from functools import partial

from fl_taskarith.errors import ConfigError
from fl_taskarith.merging.merge_rules import find_rule, scaled_weights
from fl_taskarith.models.heads import LinearHead
from fl_taskarith.one_shot.benchmark_file import OneShot
from fl_taskarith.one_shot.finetune import backbone_names
from fl_taskarith.one_shot.merge_files import MergeSettings, MergeSources
from fl_taskarith.one_shot.model_files import LazyTensors, ModelFile
from fl_taskarith.one_shot.scoring import Merged, Workbench, normalised_accuracy, search_merge
from fl_taskarith.one_shot.tasks import Task


def search_files(sources: MergeSources, settings: MergeSettings, one_shot: OneShot, level: str = "") -> MergeSettings:
    """Return `settings` with the parameter and λ of the best mean normalised accuracy; print them and accuracies.

    A task is scored by its model's own classifier (head.weight, head.bias in timm's layout) where the file has one of
    its size, else by the ridge head of its training data on the features of θ₀.

    Args:
        one_shot: its tasks are those of the models, in order; its settings name the architecture and input size.
        level: of data heterogeneity; "" for the first.

    Raises:
        ConfigError: the benchmark's model has other tensors than the base, or none of its tasks can be made.
        WeightsError: the base is no model of that architecture in a layout that timm knows.
    """
    bench = _workbench(sources, one_shot, level or next(iter(one_shot.data)), settings.seed)
    names = [name for name in backbone_names(bench.home) if name in sources.parts.merged]
    if not names:
        raise ConfigError(f"{sources.models[0].path} has no tensor that {one_shot.source} merges.")
    vectors = [LazyTensors(names, vector.__getitem__) for vector in sources.vectors]
    own = bench.divisors("validation", vectors)
    try:
        best = search_merge(
            settings.method, vectors, bench.home.pretrained, partial(bench.scores, "validation"), own, settings.steps,
            settings.seed,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"{settings.method}: {error}.") from error
    print(f"{_describe(settings.method, best)}; validation, normalised: {best.normalised:.4f}")
    own = bench.divisors("test", vectors)
    test = bench.scores("test", scaled_weights(bench.home.pretrained, best.direction, best.scale))
    for task, merged, alone in zip(bench.tasks, test, own, strict=True):
        print(f"  {task.name}: test accuracy {merged.accuracy:.4f}, its own model {alone.accuracy:.4f}")
    print(f"  mean normalised test accuracy {normalised_accuracy(test, own):.4f}")
    return dataclasses.replace(
        settings, value=best.value, scale=best.scale if find_rule(settings.method).scaled else None
    )


def check_search(one_shot: OneShot, level: str, has_base: bool, number: int) -> None:
    """Check a search over `number` models at a level of data heterogeneity, "" for the first, before any is read.

    Raises:
        ConfigError: no base, as many tasks as models are needed, or the level is not known.
    """
    if not has_base:
        raise ConfigError("--search loads the model that all were fine-tuned from: give it with --base.")
    if level and level not in one_shot.data:
        raise ConfigError(f"--data {level}: expected one of {', '.join(one_shot.data)}.")
    if one_shot.number != number:
        raise ConfigError(f"{number} models for {one_shot.number} tasks: expected one per task, in order.")


def _workbench(sources: MergeSources, one_shot: OneShot, level: str, seed: int) -> Workbench:
    """Return the tasks of a level with the base as their model, and with the models' own heads where they fit."""
    settings = {**one_shot.settings, "weights": str(sources.base.path.resolve())}
    bench = Workbench(dataclasses.replace(one_shot, settings=settings), one_shot.data[level], seed)
    unlike = [name for name in backbone_names(bench.home)
              if sources.base.shape(name) != tuple(bench.home.shapes[name])]  # fmt: skip
    if unlike:
        raise ConfigError(
            f"{', '.join(unlike[:5])} ({len(unlike)} tensors) are not in {sources.base.path} as the model at "
            f"input-size = {bench.home.config.input_size} has them: name the files' model and input size in "
            f"{one_shot.source}."
        )
    bench.heads = [_own_head(model, task) or ridge
                   for model, task, ridge in zip(sources.models, bench.tasks, bench.heads, strict=True)]  # fmt: skip
    return bench


def _own_head(model: ModelFile, task: Task) -> LinearHead | None:
    shape = model.shape("head.weight")
    if shape is None or shape[0] != len(task.classes) or model.shape("head.bias") != (shape[0],):
        return None
    device = task.train.labels.device
    return LinearHead(model["head.weight"].float().to(device), model["head.bias"].float().to(device))


def _describe(method: str, best: Merged) -> str:
    """Return for example "ties: λ = 0.4, keep = 0.2"."""
    rule = find_rule(method)
    words = [f"λ = {best.scale:g}" + (" (at an end of the range)" if best.edge else "")] if rule.scaled else []
    words += [f"{rule.parameter} = {best.value:g}"] if rule.parameter else []
    return f"{method}: {', '.join(words) or 'nothing to choose'}"
