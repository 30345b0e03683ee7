"""Merge model files into one, at given hyper-parameters: what `fl-taskarith merge` does without a search."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.merging.merge_rules import find_rule, merge_rules, scaled_weights
from fl_taskarith.one_shot.merge_checks import MERGING, check_models
from fl_taskarith.one_shot.model_files import LazyTensors, ModelFile, merged_names, task_vector
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.tensor_file import sealed


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    method: the name of a merge rule. value: of the rule's parameter, None if it has none. scale: λ, None for the one at
    which equal models merge into themselves. steps, seed: for rules that take them.
    """

    method: str
    value: float | None = None
    scale: float | None = None
    steps: Sequence[float] = ()
    seed: int = 0


@dataclass(frozen=True)
class MergeSources:
    """The files to merge, checked against each other.

    base: θ₀, or in its absence the first model, which then gives names and types. models: the files; vectors: a task
    vector of each, read tensor by tensor. left: names of tensors that stay as in `base`.
    """

    base: ModelFile
    has_base: bool
    models: list[ModelFile]
    vectors: list[LazyTensors]
    left: list[str]


def open_sources(base: Path | None, models: Sequence[Path], are_task_vectors: bool) -> MergeSources:
    """Open the files of θ₀ and of the models, or of their task vectors.

    Raises:
        WeightsError: a file cannot be read, or the models are not of one architecture.
        ConfigError: task vectors without a base; or a model is there twice, is the base, or is an earlier merge.
    """
    if are_task_vectors and base is None:
        raise ConfigError("Task vectors are added to a model: give it with --base.")
    files = [ModelFile(path) for path in models]
    start = ModelFile(base) if base is not None else files[0]
    check_models(start if base is not None else None, files)
    if are_task_vectors:  # they may hold the trained tensors only
        names = [name for name in start if all(name in file for file in files)]
        if unknown := sorted({name for file in files for name in file} - set(names)):
            raise WeightsError(f"Not in every task vector and the base: {', '.join(unknown[:10])} ({len(unknown)}).")
        left = [name for name in start if name not in names]
    else:
        names, left = merged_names(start, files)
    minuend = start if base is not None and not are_task_vectors else None
    return MergeSources(start, base is not None, files, [task_vector(file, minuend, names) for file in files], left)


def merge(sources: MergeSources, settings: MergeSettings) -> dict[str, Tensor]:
    """Return θ₀ + λ · direction, in the types and shapes of the base, without the tensors that stay as they are.

    Raises:
        ConfigError: the hyper-parameter is missing, superfluous or out of range; or the method needs a base.
        WeightsError: an entry is NaN or infinite.
    """
    _check(sources, settings)
    rule, vectors = find_rule(settings.method), sources.vectors
    scale = rule.default_scale(len(vectors)) if settings.scale is None else settings.scale
    try:
        direction = rule.direction(vectors, settings.value, settings.steps, settings.seed)
    except ValueError as error:
        raise ConfigError(f"{settings.method}: {error}.") from error
    if bad := [name for name, value in direction.items() if not bool(value.isfinite().all())]:
        raise WeightsError(f"The merged task vector has entries that are not finite: {', '.join(bad[:5])} ({len(bad)} "
                           "tensors).")  # fmt: skip
    if not sources.has_base:
        return {name: value.to(sources.base[name].dtype) for name, value in direction.items()}
    merged: dict[str, Tensor] = {}
    for name in sources.vectors[0]:
        merged |= scaled_weights(sources.base, {name: direction.pop(name)}, scale)
    return merged


def write_merged(sources: MergeSources, merged: dict[str, Tensor], facts: dict[str, object], output: Path) -> None:
    """Write `merged`, and what stays as in the base, with the base's metadata and `facts` about the merging.

    The tensors in `merged` have the shapes of the base.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {name: (merged[name] if name in merged else sources.base[name]).contiguous() for name in sources.base}
    metadata = {"format": "pt"} | sources.base.metadata | {MERGING: json.dumps(facts)}
    make_folder(output.parent)
    write_atomically(output, sealed(tensors, metadata))


def describe_sources(sources: MergeSources) -> str:
    """Return one line on what is merged and what is not."""
    names = list(sources.vectors[0])
    entries = sum(math.prod(sources.base.shape(name) or ()) for name in names)
    left = f"; as in {sources.base.path}: {', '.join(sources.left[:8])}" if sources.left else ""
    more = f" and {len(sources.left) - 8} more" if len(sources.left) > 8 else ""
    return f"{len(sources.vectors)} models, {len(names)} tensors of {entries:,} entries are merged{left}{more}"


def _check(sources: MergeSources, settings: MergeSettings) -> None:
    rule, method = find_rule(settings.method), settings.method
    if not sources.has_base and (rule.needs_base or settings.scale not in (None, 1.0)):
        without = ", ".join(name for name, each in merge_rules().items() if not each.needs_base)
        raise ConfigError(
            f'The method "{method}" needs the model that all were fine-tuned from: give it with --base. Without one: '
            f"{without}, at scale 1."
        )
    if rule.parameter and settings.value is None:
        raise ConfigError(f'The method "{method}" has a hyper-parameter: give --{rule.parameter}, or --search.')
    if not rule.scaled and settings.scale not in (None, 1.0):
        raise ConfigError(f'The method "{method}" has no scale: leave --scale out, or use task-arithmetic.')
    if rule.takes("steps") and len(settings.steps) != len(sources.vectors):
        raise ConfigError(
            f'The method "{method}" needs the local steps of each of {len(sources.vectors)} models: give --steps, a '
            "number per model in their order."
        )
