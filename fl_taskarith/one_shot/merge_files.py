"""Merge model files into one, at given hyper-parameters: what `fl-taskarith merge` does without a search."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_taskarith.errors import ConfigError, WeightsError, printable
from fl_taskarith.merging.merge_rules import find_rule, merge_rules, scaled_weights
from fl_taskarith.merging.robust import TaskVectors
from fl_taskarith.one_shot.merge_checks import MERGING, check_contents, check_models
from fl_taskarith.one_shot.merge_parts import (
    DROPPED,
    Parts,
    check_inputs,
    mean_head,
    metadata_of,
    parts_of,
    vector_parts,
)
from fl_taskarith.one_shot.model_files import LazyTensors, ModelFile, files_of, is_out_of_memory, task_vector
from fl_taskarith.storage.tensor_file import read_header

COPIES = 6  # of the largest tensor of every model that a rule holds at once
SHOWN = 8  # names of tensors in a line


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    method: the name of a merge rule. value: of the rule's parameter, None if it has none. scale: λ, None for 1/T
    under a rule that is `summed`, and 1 under the others. steps, seed: for rules that take them.
    """

    method: str
    value: float | None = None
    scale: float | None = None
    steps: Sequence[float] = ()
    seed: int = 0

    def scale_of(self, number: int) -> float:
        """Return λ for so many models."""
        return find_rule(self.method).default_scale(number) if self.scale is None else self.scale


@dataclass(frozen=True)
class MergeSources:
    """The files to merge, checked against each other.

    base: θ₀, or in its absence the first model, which then gives names and types. models: the files; vectors: a task
    vector of each, read tensor by tensor. parts: what is done with which tensor.
    """

    base: ModelFile
    has_base: bool
    models: list[ModelFile]
    vectors: list[LazyTensors]
    parts: Parts


def check_settings(
    settings: MergeSettings, parameters: Mapping[str, float], data: str, number: int, has_base: bool, searched: bool
) -> None:
    """Check the settings for merging `number` models, before any of them is read.

    A rule of ours is asked what it refuses by merging zeros; one of the user's own may not be made for them.

    Args:
        parameters: hyper-parameters by name, the rule's or not.
        data: the level of the tasks of a search.

    Raises:
        ConfigError: something is missing, out of range or without an effect; or the method needs a base.
    """
    rule, method = find_rule(settings.method), settings.method
    if not number:
        raise ConfigError("There is nothing to merge: name .safetensors files of models, or their folders.")
    if foreign := parameters.keys() - {rule.parameter}:
        raise ConfigError(f"The method {method} takes no --{', --'.join(sorted(foreign))}.")
    if settings.steps and not rule.takes("steps"):
        takers = ", ".join(name for name, each in merge_rules().items() if each.takes("steps"))
        raise ConfigError(f"--steps has no effect under --method {method}: leave it out, or choose {takers}.")
    if not searched and (data or (settings.seed and not rule.takes("seed"))):
        unused = "--data" if data else f"--seed under --method {method}"
        raise ConfigError(f"{unused} has no effect without --search: leave it out.")
    if searched and (parameters or settings.scale is not None):
        own = f" and --{rule.parameter}" if rule.parameter else ""
        raise ConfigError(f"--search chooses --scale{own}: leave them out.")
    numbers = {"scale": settings.scale, rule.parameter: settings.value}
    numbers |= {f"steps {place}": steps for place, steps in enumerate(settings.steps, 1)}
    for name, value in numbers.items():
        if value is not None and not abs(value) <= torch.finfo(torch.float32).max:
            raise ConfigError(f"--{name} {value:g}: expected a finite number.")
    if settings.seed < 0:
        raise ConfigError(f"--seed {settings.seed}: expected a whole number from 0.")
    if not has_base and (rule.needs_base or settings.scale not in (None, 1.0)):
        without = ", ".join(name for name, each in merge_rules().items() if not each.needs_base)
        raise ConfigError(
            f'The method "{method}" needs the model that all were fine-tuned from: give it with --base. Without one: '
            f"{without}, at scale 1."
        )
    if rule.parameter and settings.value is None and not searched:
        raise ConfigError(f'The method "{method}" has a hyper-parameter: give --{rule.parameter}, or --search.')
    if not rule.scaled and settings.scale not in (None, 1.0):
        raise ConfigError(f'The method "{method}" has no scale: leave --scale out, or use task-arithmetic.')
    if rule.takes("steps") and len(settings.steps) != number:
        raise ConfigError(
            f'The method "{method}" needs the local steps of each of {number} models: give --steps, a number per model '
            "in their order."
        )
    if rule.name in merge_rules() and not (searched and rule.parameter):
        _direction(settings, [{"": torch.zeros(1)}] * number)


def _direction(settings: MergeSettings, vectors: TaskVectors) -> dict[str, Tensor]:
    try:
        return find_rule(settings.method).direction(vectors, settings.value, settings.steps, settings.seed)
    except ValueError as error:
        raise ConfigError(f"{settings.method}: {error}.") from error


def open_sources(base: Path | None, models: Sequence[Path], are_task_vectors: bool) -> MergeSources:
    """Open the files of θ₀ and of the models, or of their task vectors.

    Raises:
        WeightsError: a file cannot be read, or the models are not of one architecture.
        ConfigError: task vectors without a base, or in place of models or the reverse; or a model is there twice, is
            the base, or is an earlier merge.
    """
    if are_task_vectors and base is None:
        raise ConfigError("Task vectors are added to a model: give it with --base.")
    files = [ModelFile(path) for path in models]
    start = ModelFile(base) if base is not None else files[0]
    check_models(start if base is not None else None, files)
    check_inputs([start, *files])
    parts = vector_parts(start, files) if are_task_vectors else parts_of(start, files)
    check_contents(start if base is not None else None, files, parts.merged, are_task_vectors)
    minuend = start if base is not None and not are_task_vectors else None
    vectors = [task_vector(file, minuend, parts.merged) for file in files]
    return MergeSources(start, base is not None, files, vectors, parts)


def merge(sources: MergeSources, settings: MergeSettings) -> dict[str, Tensor]:
    """Return θ₀ + λ · direction, in the types and shapes of the base, without the tensors that stay as they are.

    Raises:
        ConfigError: the task vectors do not suit the method.
        WeightsError: an entry of a model or of the result is NaN or infinite.
    """
    vectors, base = sources.vectors, sources.base
    scale = settings.scale_of(len(vectors))
    direction = _direction(settings, vectors)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in direction.items()}
    if shapes != {name: base.shape(name) for name in vectors[0]}:
        raise ConfigError(f"{settings.method}: expected a tensor for every name, in the shape that the models have.")
    merged: dict[str, Tensor] = {}
    for name in sources.parts.merged:
        part = {name: direction.pop(name)}
        merged |= scaled_weights(base, part, scale) if sources.has_base else {name: part[name].to(base[name].dtype)}
    merged |= {name: mean_head(sources.models, name) for name in sources.parts.means}
    if bad := [name for name, value in merged.items() if not bool(value.isfinite().all())]:
        raise WeightsError(
            f"The merged model has entries that are not finite, or are too large for the type of the base, at λ = "
            f"{scale:g}, in {len(bad)} tensors: {_some(bad)}."
        )
    return merged


def whole_model(
    sources: MergeSources, merged: dict[str, Tensor], settings: MergeSettings
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return `merged` and what stays as in the base, in its shapes, and the metadata, which say how it was merged.

    Raises:
        WeightsError: what stays as in the base is NaN or infinite.
    """
    facts = dataclasses.asdict(settings) | {
        "scale": settings.scale_of(len(sources.models)),
        "base": str(sources.base.path.resolve()) if sources.has_base else None,
        "models": [str(model.path.resolve()) for model in sources.models],
    }
    kept = {name: sources.base[name] for name in sources.base if name not in merged}
    metadata = metadata_of(sources.base, sources.models, sources.parts) | {MERGING: json.dumps(facts)}
    return merged | kept, metadata


def describe_sources(sources: MergeSources) -> str:
    """Return lines on what is merged and what is not, and why."""
    parts = sources.parts
    entries = sum(math.prod(sources.base.shape(name) or ()) for name in parts.merged)
    lines = [f"{len(sources.vectors)} models, {len(parts.merged)} tensors of {entries:,} entries are merged"]
    if parts.means:
        lines.append(f"their mean, for the base has none: {_some(parts.means)}")
    for why, names in parts.left.items():
        place = "left out" if why == DROPPED else f"not merged, as in {sources.base.path}"
        lines.append(f"{place}: {_some(names)} ({why})")
    return "\n".join(lines)


@contextlib.contextmanager
def within_memory(models: Sequence[Path], base: Path | None) -> Iterator[None]:
    """Tell how much memory a merge of these files needs if there is less.

    Raises:
        ConfigError: there is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        needed = _needed_bytes([*models, *([base] if base is not None else [])])
        raise ConfigError(
            f"There is not enough memory to merge {len(models)} models: about {needed / 1e9:.1f} GB are needed beside "
            "what Python and torch take. Merge fewer at a time, raise the limit, or use a larger machine."
        ) from error


def _needed_bytes(paths: Sequence[Path]) -> int:
    """Return about what merging takes: the result in float32, and a few copies of the largest tensor of every model."""
    sizes: list[int] = []
    for file in files_of(paths[-1]):
        with open(file, "rb") as opened:
            header = read_header(opened)
        sizes += [math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"]
    return 4 * (sum(sizes) + COPIES * len(paths) * max(sizes, default=0))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name, 60) for name in names[:SHOWN]) + more
