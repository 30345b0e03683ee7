"""What may not be merged, and where a merged model may not be written: refused before anything is computed."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fl_taskarith.errors import ConfigError, listed
from fl_taskarith.one_shot.model_files import ModelFile, files_of
from fl_taskarith.storage.files import require_new

COMPARED = 8  # tensors that tell a model from a task vector
ALIKE = 0.5  # share of the base's length, and cosine to it, above which a file is like a model
MERGING = "merging"  # key of the metadata of a merged model: how it was made


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool = False) -> None:
    """Check that writing to `output` loses nothing: it is no input, and at most an earlier merge is there.

    Of the `inputs`, which are read, none is ever replaced, nor one that is spelt otherwise or linked; another file may
    be if `overwrite`.

    Raises:
        ConfigError: the merged model may not be written there.
    """
    for path in inputs:
        if _ids(output) & _ids(path):
            raise ConfigError(f"--output {output} would overwrite {path}, which is read: give another --output.")
    if overwrite or not is_merged(output):
        require_new([output], overwrite)


def is_merged(path: Path) -> bool:
    """Return whether this is a file that `merge` wrote."""
    try:
        with safe_open(path, "pt") as opened:
            return is_merge(opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def is_merge(metadata: Mapping[str, str]) -> bool:
    """Return whether a file's metadata say how `merge` made it."""
    try:
        facts = json.loads(metadata.get(MERGING, "null"))
    except (ValueError, RecursionError):
        return False
    return isinstance(facts, dict)


def check_models(base: ModelFile | None, models: Sequence[ModelFile]) -> None:
    """Check that no model is an earlier merge or the base, and no two are one file or hold the same tensors.

    Of files with equal names and shapes, tensor after tensor is read only as long as they are equal.

    Raises:
        ConfigError: a model should be left out; names all such.
    """
    ids = [_ids(model.path) for model in models]
    pairs = [(models[a].path, models[b].path) for a, b in combinations(range(len(models)), 2) if ids[a] == ids[b]]
    _refuse([f"{one} and {other} are one file: leave one of them out." for one, other in pairs])
    earlier = [model.path for model in models if is_merge(model.metadata)]
    problems = [f"{path} is the result of an earlier merge: leave it out of the models." for path in earlier]
    for same in _equal([*models, *([base] if base is not None else [])]):
        if base is not None and base is same[-1]:
            problems += [f"{file.path} is the base, {base.path}: leave it out of the models." for file in same[:-1]]
        else:
            names = ", ".join(str(model.path) for model in same)
            problems.append(f"{names} hold the same tensors: leave all but one of them out.")
    _refuse(problems)


def check_contents(base: ModelFile | None, files: Sequence[ModelFile], names: Sequence[str], vectors: bool) -> None:
    """Check that files hold models, or, if `vectors`, task vectors, by the largest tensors among `names`.

    Beside the base, a fine-tuned model is as long and points the same way, and a task vector is short and points
    elsewhere. Only what is plainly the other is refused. Without a base, the longest model stands for it.

    Raises:
        ConfigError: a file holds the other; names all such.
    """
    shapes = {name: next(file.shape(name) or () for file in files if name in file) for name in names}
    largest = sorted(names, key=lambda name: -math.prod(shapes[name]))[:COMPARED]

    def product(one: ModelFile, other: ModelFile) -> float:
        pairs = ((one[name].double(), other[name].double()) for name in largest if name in one and name in other)
        return sum(float((first * second).sum()) for first, second in pairs)

    lengths = [math.sqrt(product(file, file)) for file in files]
    start = files[lengths.index(max(lengths))] if base is None else base
    length, problems = math.sqrt(product(start, start)), []
    for file, own in zip(files, lengths, strict=True):
        along = product(file, start) > ALIKE * own * length
        if vectors and along and own > ALIKE * length:
            problems.append(f"{file.path} holds a model, near the base, and no task vector: leave --task-vectors out.")
        elif not vectors and not along and own < ALIKE * length:
            problems.append(
                f"{file.path} holds a task vector, by its size beside {start.path}: give --task-vectors and --base, or "
                "leave it out."
            )
    _refuse(problems)


def _equal(files: Sequence[ModelFile]) -> list[list[ModelFile]]:
    """Return the groups of two and more files with equal tensors, types included."""
    equal: list[list[ModelFile]] = []
    for alike in _groups(files, lambda file: frozenset((name, file.shape(name)) for name in file)):
        parts = [alike]
        for name in alike[0]:
            parts = [part for whole in parts for part in _groups(whole, lambda file, name=name: _digest(file, name))]  # type: ignore[misc]
        equal += parts
    return equal


def _groups(files: Sequence[ModelFile], key: Callable[[ModelFile], Hashable]) -> list[list[ModelFile]]:
    """Return the groups of two and more files with equal keys."""
    groups: dict[Hashable, list[ModelFile]] = {}
    for file in files:
        groups.setdefault(key(file), []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def _digest(file: ModelFile, name: str) -> Hashable:
    tensor = file[name]
    return tensor.dtype, hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(f"What is given cannot be merged:{listed(problems, width=1000)}")


def _ids(path: Path) -> frozenset[tuple[int, int]]:
    """Return device and inode of each file of a model; nothing where there is none to be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return frozenset((status.st_dev, status.st_ino) for status in (file.stat() for file in files_of(path)))
    return frozenset()
