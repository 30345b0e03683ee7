"""Model files read one tensor at a time, and task vectors that exist tensor by tensor only.

Any .safetensors will do, timm's and Hugging Face's among them: names mean nothing here but that they are the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_taskarith.errors import WeightsError
from fl_taskarith.storage.tensor_file import check_seal

INDEX = "model.safetensors.index.json"  # of a Hugging Face folder whose tensors lie in several files
# Classifiers belong to one task each and may differ; anything else that differs is another architecture.
HEADS = ("head.*", "classifier.*", "fc.*", "*.head.*", "*.classifier.*", "lm_head.*")


class ModelFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, or of a Hugging Face folder, each read when asked for and not kept."""

    def __init__(self, path: Path) -> None:
        """Reads names and shapes, and files of ours once through to see whether they are sound.

        Raises:
            WeightsError: missing, damaged, or not such a file or folder.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            for file in files_of(path):
                check_seal(file)
                with safe_open(file, "pt") as opened:
                    self.metadata |= opened.metadata() or {}
                    for name in opened.keys():  # noqa: SIM118
                        self._files[name] = file
                        self._shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise WeightsError(
                f"{path} cannot be read as a model ({error}). Expected a .safetensors file, or a folder that holds "
                f"model.safetensors or {INDEX}."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew each time and copied: what stays mapped would count as this process's memory, model after model.
        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of one tensor, None if there is none of that name; nothing is read."""
        return self._shapes.get(name)


class TaskVector(Mapping[str, Tensor]):
    """τ = θ − θ₀ in float32 for the tensors `names`, each computed when asked for; τ = θ without a θ₀."""

    def __init__(self, model: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, names: Sequence[str]) -> None:
        self._model, self._base, self._names = model, base, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        value = self._model[name].float()
        return value if self._base is None else value.sub_(self._base[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def of(self, names: Sequence[str]) -> "TaskVector":
        """The part of it that has these names."""
        return TaskVector(self._model, self._base, names)


def merged_names(base: ModelFile, models: Sequence[ModelFile]) -> tuple[list[str], list[str]]:
    """Names of the tensors of `base` to merge, and of those that stay as they are there: integers and unlike heads.

    Raises:
        WeightsError: a model lacks a tensor that is no head, has it in another shape, or has more; names them.
    """
    merged: list[str] = []
    left: list[str] = []
    problems: list[str] = []
    for name in base:
        unlike = [model for model in models if model.shape(name) != base.shape(name)]
        if not unlike:
            (merged if base[name].is_floating_point() else left).append(name)
        elif is_head(name):
            left.append(name)
        else:
            problems.append(f"{name} is {base.shape(name)} in {base.path} and {unlike[0].shape(name)} in "
                            f"{unlike[0].path}")  # fmt: skip
    for model in models:
        problems += [f"{name} is in {model.path} alone" for name in model if name not in base and not is_head(name)]
    if problems or not merged:
        raise WeightsError(
            f"The models are not of one architecture: {len(problems)} tensors differ beside heads.\n  "
            + "\n  ".join(problems[:20] or ["no tensor is the same in all of them"])
        )
    return merged, left


def is_head(name: str) -> bool:
    """Whether this names a classifier's tensor."""
    return any(fnmatchcase(name, pattern) for pattern in HEADS)


def files_of(path: Path) -> list[Path]:
    """The .safetensors of a model: the file itself, or those of a Hugging Face folder as its index names them."""
    if path.is_dir() and (path / INDEX).exists():
        table = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(table.values()))]
    return [path / "model.safetensors" if path.is_dir() else path]


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise WeightsError if an entry is NaN or infinite."""
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise WeightsError(f"{what} has entries that are not finite: {', '.join(bad[:5])} ({len(bad)} tensors).")
