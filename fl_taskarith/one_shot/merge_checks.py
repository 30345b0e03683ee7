"""What may not be merged, and where a merged model may not be written: found before anything is computed."""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fl_taskarith.errors import ConfigError
from fl_taskarith.one_shot.model_files import ModelFile, files_of
from fl_taskarith.storage.files import require_new

MERGING = "merging"  # key of the metadata of a merged model: how it was made

FileIds = frozenset[tuple[int, int]]


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool = False) -> None:
    """That writing to `output` loses nothing: it is no input, and what is there, if anything, is an earlier merge.

    Args:
        inputs: the files and folders that are read. An output that is one of them under another spelling, by a
            symbolic or by a hard link, is found.
        overwrite: whether any other file may be replaced; an input never is.

    Raises:
        ConfigError: the merged model may not be written there.
    """
    for path in inputs:
        if _ids(output) & _ids(path):
            raise ConfigError(f"--output {output} would overwrite {path}, which is read: give another --output.")
    if not overwrite and is_merged(output):
        return
    require_new([output], overwrite)


def is_merged(path: Path) -> bool:
    """Whether this is a file that `merge` wrote."""
    try:
        with safe_open(path, "pt") as opened:
            return MERGING in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def check_files(base: Path | None, models: Sequence[Path]) -> None:
    """That no two of the models are one file, and none is the base; reads nothing.

    Raises:
        ConfigError: two are; names them all.
    """
    ids = [_ids(path) for path in models]
    problems = [
        f"{models[one]} and {models[other]} are one file: leave one of them out."
        for one, other in combinations(range(len(models)), 2)
        if ids[one] and ids[one] == ids[other]
    ]
    if base is not None and (own := _ids(base)):
        problems += [_is_base(path, base) for path, found in zip(models, ids, strict=True) if found == own]
    _refuse(problems)


def check_contents(base: ModelFile | None, models: Sequence[ModelFile]) -> None:
    """That no model is an earlier merge, and no two files hold the same tensors, the base's included.

    Of files with equal names and shapes, tensor after tensor is read only as long as they are equal.

    Raises:
        ConfigError: a model should be left out; names all such.
    """
    problems = [
        f"{model.path} is the result of an earlier merge: leave it out of the models."
        for model in models
        if MERGING in model.metadata
    ]
    for same in _equal([*models, *([base] if base is not None else [])]):
        if base is not None and any(file is base for file in same):
            problems += [_is_base(file.path, base.path) for file in same if file is not base]
        else:
            names = ", ".join(str(model.path) for model in same)
            problems.append(f"{names} hold the same tensors: leave all but one of them out.")
    _refuse(problems)


def _equal(files: Sequence[ModelFile]) -> list[list[ModelFile]]:
    """Groups of two and more files with equal tensors, types included."""
    by_shape: dict[object, list[ModelFile]] = {}
    for file in files:
        by_shape.setdefault(frozenset((name, file.shape(name)) for name in file), []).append(file)
    groups = list(by_shape.values())
    equal: list[list[ModelFile]] = []
    for group in groups:
        parts = [group]
        for name in group[0]:
            parts = [part for whole in parts if len(whole) > 1 for part in _split(whole, name)]
        equal += [part for part in parts if len(part) > 1]
    return equal


def _split(files: Sequence[ModelFile], name: str) -> list[list[ModelFile]]:
    parts: dict[tuple[torch.dtype, bytes], list[ModelFile]] = {}
    for file in files:
        tensor = file[name]
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        parts.setdefault((tensor.dtype, hashlib.sha256(content).digest()), []).append(file)
    return list(parts.values())


def _is_base(model: Path, base: Path) -> str:
    return f"{model} is the base, {base}: leave it out of the models."


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("What is given cannot be merged:\n  " + "\n  ".join(problems))


def _ids(path: Path) -> FileIds:
    """Device and inode of the files of a model, of its folder's index too; empty where there is none to be read."""
    ids = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for file in files_of(path):
            status = file.stat()
            ids.add((status.st_dev, status.st_ino))
    return frozenset(ids)
