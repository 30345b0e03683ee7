"""Model files read one tensor at a time, and task vectors that exist tensor by tensor only.

Any .safetensors will do, timm's and Hugging Face's among them: names mean nothing here but that they are the same.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_taskarith.errors import WeightsError
from fl_taskarith.storage.tensor_file import check_seal

INDEX = "model.safetensors.index.json"  # of a Hugging Face folder whose tensors lie in several files
# Classifiers belong to one task each and may differ; anything else that differs is another architecture.
HEADS = ("head.*", "classifier.*", "fc.*", "*.head.*", "*.classifier.*", "lm_head.*")


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each computed by `read(name)` when asked for and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """Take the names, and what gives the tensor of a name in any shape."""
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ModelFile(LazyTensors):
    """The tensors of a .safetensors file, or of a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        """Read names and shapes, and files of ours once through to see whether they are sound.

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
        super().__init__(self._files, self._open)

    def _open(self, name: str) -> Tensor:
        # Opened each time and copied: what stays mapped would count as this process's memory, model after model.
        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of one tensor, None if there is none of that name; nothing is read."""
        return self._shapes.get(name)


def task_vector(model: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, names: Sequence[str]) -> LazyTensors:
    """Return τ = θ − θ₀ in float32 and the models' shapes, computed tensor by tensor; τ = θ without a θ₀."""

    def difference(name: str) -> Tensor:
        value = model[name].float()
        return value if base is None else value.sub_(base[name])

    return LazyTensors(names, difference)


def merged_names(base: ModelFile, models: Sequence[ModelFile]) -> tuple[list[str], list[str]]:
    """Return the names of the tensors of `base` to merge, and of those that stay as they are: integers, unlike heads.

    Raises:
        WeightsError: a model lacks a tensor that is no head, has it in another shape, or has more; names them.
    """
    merged: list[str] = []
    left: list[str] = []
    problems: list[str] = []
    for name in base:
        unlike = [model for model in models if model.shape(name) != base.shape(name)]
        if not unlike and base[name].is_floating_point():
            merged.append(name)
        elif not unlike or is_head(name):
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
    """Return whether this names a classifier's tensor."""
    return any(fnmatchcase(name, pattern) for pattern in HEADS)


def files_of(path: Path) -> list[Path]:
    """Return the .safetensors of a model: the file itself, or those that a Hugging Face folder's index names."""
    if path.is_dir() and (path / INDEX).exists():
        table = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(table.values()))]
    return [path / "model.safetensors" if path.is_dir() else path]
