"""Model files read one tensor at a time, and task vectors that exist tensor by tensor only.

Any .safetensors will do, timm's and Hugging Face's among them: names mean nothing here but that they are the same.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fl_taskarith.errors import WeightsError, printable
from fl_taskarith.models.spellings import quantised_names, unsupported
from fl_taskarith.storage.tensor_file import check_seal, without_seal

INDEX = "model.safetensors.index.json"  # of a Hugging Face folder whose tensors lie in several files
NUMBERS = ("F64", "F32", "F16", "BF16")  # safetensors' words for the types that are averaged


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
    """The tensors of a .safetensors file, or of a Hugging Face folder; reading one that is not finite is an error."""

    def __init__(self, path: Path) -> None:
        """Read names, shapes and types, and files of ours once through to see whether they are sound.

        Raises:
            WeightsError: missing, damaged, or not such a file or folder.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        try:
            for file in files_of(path):
                if kind := unsupported(file):
                    raise ValueError(kind)
                check_seal(file)
                with safe_open(file, "pt") as opened:
                    self.metadata |= without_seal(opened.metadata() or {})
                    for name in opened.keys():  # noqa: SIM118
                        if name in self._files:
                            raise ValueError(
                                f"{name} stands in two of its files, {self._files[name].name} and {file.name}"
                            )
                        self._files[name] = file
                        self._shapes[name] = tuple(opened.get_slice(name).get_shape())
                        self._kinds[name] = opened.get_slice(name).get_dtype()
            for name, stated in index_of(path).items():
                if (there := self._files.get(name)) != path / stated:
                    where = "in none of its files" if there is None else f"in {there.name}"
                    raise ValueError(f"{INDEX} names {stated} for {printable(name)}, which stands {where}")
        except Exception as error:  # safetensors, JSON and the file system each have their own
            if is_out_of_memory(error):
                raise MemoryError from error
            raise WeightsError(
                f"{path} cannot be read as a model ({printable(error, 300)}). Expected a .safetensors file, or a "
                f"folder that holds model.safetensors or {INDEX}."
            ) from error
        if codes := quantised_names(self._files):
            raise WeightsError(
                f"{path} is quantised ({', '.join(codes[:3])}): its entries are codes and scales, which cannot be "
                "averaged. Convert it to float16 or float32 first."
            )
        super().__init__(self._files, self._open)

    def _open(self, name: str) -> Tensor:
        # Opened each time and copied: what stays mapped would count as this process's memory, model after model.
        try:
            with safe_open(self._files[name], "pt") as opened:
                tensor: Tensor = opened.get_tensor(name).clone()
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            finite = not tensor.is_floating_point() or bool(wide.isfinite().all())
        except Exception as error:  # types and sizes that torch does not have, for example
            if is_out_of_memory(error):
                raise MemoryError from error
            raise WeightsError(f"{printable(name)} in {self.path} cannot be read ({printable(error, 300)}).") from error
        if not finite:
            raise WeightsError(f"{self.path} has NaN or infinite entries, in {printable(name)}: leave this file out.")
        return tensor

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of one tensor, None if there is none of that name; nothing is read."""
        return self._shapes.get(name)

    def kind(self, name: str) -> str | None:
        """Return safetensors' word for the type of one tensor, None if there is none of that name."""
        return self._kinds.get(name)

    def about(self, name: str) -> str:
        """Return type, shape and file of one tensor in words."""
        what = f"{self._kinds[name]} {self._shapes[name]}" if name in self else "missing"
        return f"{what} in {self.path}"


def task_vector(model: ModelFile, base: ModelFile | None, names: Sequence[str]) -> LazyTensors:
    """Return τ = θ − θ₀ in the models' shapes, in float32 or wider, tensor by tensor; τ = θ without a θ₀."""

    def difference(name: str) -> Tensor:
        value = model[name]
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        return value if base is None else value.sub_(base[name])

    return LazyTensors(names, difference)


def files_of(path: Path) -> list[Path]:
    """Return the .safetensors of a model: the file itself, or those that a Hugging Face folder's index names.

    Raises:
        ValueError: the index is none, or leads out of its folder.
    """
    if names := set(index_of(path).values()):
        return [path / name for name in sorted(names)]
    return [path / "model.safetensors" if path.is_dir() else path]


def index_of(path: Path) -> dict[str, str]:
    """Return which file of a Hugging Face folder holds the tensor of each name; {} without an index.

    Raises:
        ValueError: the index is none, or leads out of its folder.
    """
    if not path.is_dir() or not (path / INDEX).exists():
        return {}
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    found = index.get("weight_map") if isinstance(index, dict) else None
    table: dict[str, Any] = found if isinstance(found, dict) and found else {"": None}
    if wrong := [name for name in table.values() if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{INDEX} names no files of its folder, but {wrong[0]}")
    return table


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch, safetensors or the system says that there is no memory left."""
    words = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
