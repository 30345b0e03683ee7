"""Which tensors of several models are merged, which stay as in the base, and which have to be the same."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_taskarith.errors import WeightsError, listed, printable
from fl_taskarith.models.spellings import is_head
from fl_taskarith.one_shot.model_files import NUMBERS, ModelFile
from fl_taskarith.storage.tensor_file import RUN

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch normalisation, counted and not trained
INPUTS = ("mean", "std")  # keys of the metadata on which models to be merged have to agree
HEADS, COUNTED, WHOLE, UNTRAINED, DROPPED = (
    "classifiers that differ or are not said by all files to be of the same classes",
    "statistics of batch normalisation, which want estimating anew on data",
    "no floating-point numbers, the same in all",
    "not in the task vectors",
    "classifiers that the base lacks and that differ or are not said by all models to be of the same classes",
)


@dataclass(frozen=True)
class Parts:
    """The names of tensors by what is done with them.

    merged: by the rule. means: classifiers that the base lacks and all models have alike; their mean is taken. left:
    all others by why they are not merged; they stay as in the base, or are in none.
    """

    merged: list[str] = field(default_factory=list)
    means: list[str] = field(default_factory=list)
    left: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def parts_of(base: ModelFile, models: Sequence[ModelFile]) -> Parts:
    """Sort the tensors of `base` and of models of its architecture.

    Raises:
        WeightsError: a model lacks a tensor that is no classifier, has it in another shape or type, or has more; or
            tensors of integers or other types, which no mean is taken of, differ.
    """
    parts, problems = Parts(), []
    same_classes = _same_classes((base, *models))
    for name in base:
        unlike = next((model for model in models if not _alike(name, base, model)), None)
        if name.endswith(STATISTICS) and unlike is None:
            parts.left[COUNTED].append(name)
        elif is_head(name) and (unlike is not None or not same_classes):
            parts.left[HEADS].append(name)
        elif unlike is not None:
            problems.append(f"{name}: {base.about(name)}, {unlike.about(name)}")
        elif base.kind(name) in NUMBERS:
            parts.merged.append(name)
        elif any(not torch.equal(base[name], model[name]) for model in models):
            problems.append(f"{name}: {base.about(name)} holds no numbers to add, but differs between the models")
        else:
            parts.left[WHOLE].append(name)
    for name in dict.fromkeys(name for model in models for name in model if name not in base):
        holders = [model for model in models if name in model]
        alike = len(holders) == len(models) and all(_alike(name, models[0], model) for model in models)
        if not is_head(name):
            problems.append(f"{name}: {holders[0].about(name)}, missing in {base.path}")
        elif alike and _same_classes(models) and models[0].kind(name) in NUMBERS:
            parts.means.append(name)
        else:
            parts.left[DROPPED].append(name)
    if problems or not parts.merged:
        raise WeightsError(
            f"The models are not of one architecture: {len(problems)} tensors differ beside heads."
            + listed(problems or ["no tensor of floating-point numbers is the same in all of them"])
        )
    return parts


def vector_parts(base: ModelFile, vectors: Sequence[ModelFile]) -> Parts:
    """Sort the tensors of `base` where the models' files hold task vectors, of all its tensors or of some.

    Raises:
        WeightsError: the files differ in their names, or hold what is in the base in another shape or not at all.
    """
    parts, problems = Parts(), []
    same_classes = len(set(_facts((base, *vectors), "classes").values())) < 2  # task vectors seldom say theirs
    for name in dict.fromkeys(name for vector in vectors for name in vector):
        unlike = next((vector for vector in vectors if not _alike(name, base, vector)), None)
        if unlike is not None:
            problems.append(f"{name}: {base.about(name)}, {unlike.about(name)}")
        elif name.endswith(STATISTICS):
            parts.left[COUNTED].append(name)
        elif is_head(name) and not same_classes:
            parts.left[HEADS].append(name)
        elif base.kind(name) not in NUMBERS:
            problems.append(f"{name}: {base.about(name)} holds no floating-point numbers to add to")
        else:
            parts.merged.append(name)
    if problems or not parts.merged:
        raise WeightsError(
            f"Not in every task vector and the base, in one shape: {len(problems)} tensors."
            + listed(problems or ["the task vectors hold no tensors to add"])
        )
    if untrained := [name for name in base if not any(name in vector for vector in vectors)]:
        parts.left[UNTRAINED] = untrained
    return parts


def check_inputs(files: Sequence[ModelFile]) -> None:
    """Check that files which say how a model's inputs are made agree on it.

    Raises:
        WeightsError: they differ; says how.
    """
    for key in INPUTS:
        facts = _facts(files, key)
        if len(set(facts.values())) > 1:
            lines = listed(f"{value} in {path}" for path, value in facts.items())
            raise WeightsError(f"The models do not take the same inputs: their metadata differ in {key}.{lines}")


def metadata_of(base: ModelFile, models: Sequence[ModelFile], parts: Parts) -> dict[str, str]:
    """Return the metadata of a merged model, which is no run's: the base's, and what all agree on if it lacks it."""
    agreed = {key: value for key, value in models[0].metadata.items()
              if all(model.metadata.get(key) == value for model in models)}  # fmt: skip
    if any(why in parts.left for why in (HEADS, DROPPED)):
        agreed = {key: value for key, value in agreed.items() if key not in ("classes", "head")}
    return {key: value for key, value in ({"format": "pt"} | agreed | base.metadata).items() if key != RUN}


def mean_head(models: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Return the mean of the models' tensors of this name, in their shape and the first one's type."""
    values = [model[name] for model in models]
    wide = torch.promote_types(values[0].dtype, torch.float32)
    return torch.stack([value.to(wide) for value in values]).mean(0).to(values[0].dtype)


def _alike(name: str, one: ModelFile, other: ModelFile) -> bool:
    """Whether both have a tensor of this name, in one shape, of numbers in both or of one type."""
    kinds = {file.kind(name) for file in (one, other)}
    return one.shape(name) == other.shape(name) and (len(kinds) == 1 or kinds <= set(NUMBERS)) and name in one


def _same_classes(files: Sequence[ModelFile]) -> bool:
    """Whether all files state the same classes, or none states any."""
    stated = _facts(files, "classes")
    return len(stated) in (0, len(files)) and len(set(stated.values())) < 2


def _facts(files: Sequence[ModelFile], key: str) -> dict[str, str]:
    """Return what the metadata of files say under a key, by path; spaces within JSON do not matter."""
    facts: dict[str, str] = {}
    for file in files:
        if (text := file.metadata.get(key)) is not None:
            with contextlib.suppress(ValueError, RecursionError):
                text = json.dumps(json.loads(text))
            facts[str(file.path)] = printable(text, 10_000)
    return facts
