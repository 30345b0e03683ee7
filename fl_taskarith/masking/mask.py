"""The mask: which entries of the backbone are updated, and what masks have in common.

In memory it is boolean, in files and messages one bit per entry.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from fl_taskarith.errors import CheckpointError, printable
from fl_taskarith.storage.tensor_file import check_seal, without_seal, write_sealed

Shapes = Mapping[str, torch.Size | tuple[int, ...]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mask:
    """True where a weight is updated, one bool tensor per maskable parameter, in the model's order.

    Density is the share of True entries over all maskable ones. Only the entries that are True are trained and travel.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def full(cls, weights: Mapping[str, Tensor]) -> "Mask":
        """Return a mask of the shapes of `weights` that updates every entry."""
        return cls({name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()})

    @cached_property
    def size(self) -> int:
        """The number of maskable entries."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def updated(self) -> int:
        """The number of updated entries."""
        return sum(int(tensor.sum()) for tensor in self.tensors.values())

    @property
    def density(self) -> float:
        """updated / size."""
        return self.updated / self.size

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """Flat positions of the updated entries, int64 [n], ascending, for each tensor that has any."""
        positions = {name: tensor.flatten().nonzero().flatten() for name, tensor in self.tensors.items()}
        return {name: index for name, index in positions.items() if len(index)}

    def gather(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the updated entries of `weights` (full tensors), each tensor's as [n], in new storage."""
        return {name: weights[name].flatten().index_select(0, index) for name, index in self.indices.items()}

    @torch.no_grad()
    def scatter_(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Write values, [n] per tensor as `gather` returns them, into contiguous `weights`; other entries stay.

        Raises:
            ValueError: `values` has other names or numbers of entries than this mask: it belongs to another one.
        """
        sizes = {name: len(index) for name, index in self.indices.items()}
        given = {name: value.numel() for name, value in values.items()}
        if sizes != given:
            wrong = sorted(name for name in sizes.keys() | given.keys() if sizes.get(name) != given.get(name))
            raise ValueError(f"the values belong to another mask: {', '.join(wrong[:5])} ({len(wrong)} tensors)")
        for name, index in self.indices.items():
            weights[name].view(-1).index_copy_(0, index, values[name])

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return full tensors that hold values, [n] per tensor as `gather` returns them, and zeros elsewhere.

        Raises:
            ValueError: `values` belong to another mask.
        """
        full = {name: values[name].new_zeros(self.tensors[name].shape) for name in self.indices if name in values}
        self.scatter_(full, values)
        return full

    def to(self, device: torch.device) -> "Mask":
        """Return the mask on `device`."""
        return Mask({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def differing(self, other: "Mask") -> list[str]:
        """Return the names of the tensors that only one of the masks has, or that differ in shape."""
        mine, theirs = ({name: value.shape for name, value in mask.tensors.items()} for mask in (self, other))
        return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))

    def jaccard(self, other: "Mask") -> float:
        """Return |both| / |either| over updated entries; 1 if both are empty.

        Raises:
            ValueError: the masks are of different models.
        """
        if self.differing(other):
            raise ValueError("the masks cover different tensors, so their overlap has no meaning")
        both = sum(int((mine & other.tensors[name]).sum()) for name, mine in self.tensors.items())
        either = self.updated + other.updated - both
        return both / either if either else 1.0

    def packed(self) -> dict[str, Tensor]:
        """Return one bit per entry: uint8 [⌈n / 8⌉] per tensor, most significant bit first."""
        return {
            name: torch.from_numpy(np.packbits(tensor.flatten().cpu().numpy())) for name, tensor in self.tensors.items()
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], shapes: Shapes) -> "Mask":
        """Return the inverse of `packed`, on the CPU, for tensors of these shapes.

        Raises:
            ValueError: another number of bytes than the shape needs, another dtype, or padding bits that are set.
        """
        tensors = {}
        for name, value in packed.items():
            count = math.prod(shapes[name])
            if value.dtype != torch.uint8 or value.shape != (-(-count // 8),):
                raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} is no packed mask of {count} entries")
            bits = np.unpackbits(value.cpu().numpy())
            if bits[count:].any():
                raise ValueError(f"{name}: bits beyond the last of its {count} entries are set")
            tensors[name] = torch.from_numpy(bits[:count].astype(bool)).view(tuple(shapes[name]))
        return cls(tensors)


def save_mask(path: Path, mask: Mask, facts: Mapping[str, str]) -> None:
    """Write a mask bit-packed, with the shapes of its tensors and `facts` (strings) as metadata.

    Raises:
        CheckpointError: it cannot be written.
    """
    shapes = {name: list(tensor.shape) for name, tensor in mask.tensors.items()}
    metadata = {**facts, "shapes": json.dumps(shapes)}
    write_sealed(path, mask.packed(), metadata)


def load_mask(path: Path) -> tuple[Mask, dict[str, str]]:
    """Return a mask that `save_mask` wrote, on the CPU, and its facts.

    Raises:
        CheckpointError: missing, damaged, or not such a file; nothing in it is ever run as code.
    """
    try:
        is_sealed = check_seal(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = without_seal(file.metadata() or {})
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes = _shapes(json.loads(metadata.pop("shapes", "null")))
        if shapes.keys() != packed.keys():
            raise ValueError("its tensors are not those of its table of shapes")
        mask = Mask.unpacked({name: packed[name] for name in shapes}, shapes)
    except Exception as error:  # safetensors, JSON and numpy each have their own
        raise CheckpointError(
            f"{path} cannot be read as a mask ({printable(error)}). Expected a mask.safetensors as a run or "
            "`fl-taskarith mask` writes it."
        ) from error
    if not is_sealed:
        log.warning("The mask %s has no checksum: whether it is as it was written cannot be told.", path)
    return mask, metadata


def _shapes(table: Any) -> dict[str, tuple[int, ...]]:
    """Return the table of shapes of a mask's file.

    Raises:
        ValueError: it is no table of tensors that have entries.
    """
    if not isinstance(table, dict):
        raise ValueError("it has no table of shapes")
    for name, shape in table.items():
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
            raise ValueError(f"{name} is given the shape {shape}")
    return {name: tuple(shape) for name, shape in table.items()}


def chance_overlap(density: float, other: float) -> float:
    """Return the Jaccard overlap of independent random masks: d₁d₂ / (d₁ + d₂ − d₁d₂), and 1 if both are empty.

    This is expected |both| over expected |either|: two masks that favour the same layers exceed it without sharing more
    than those layers.
    """
    either = density + other - density * other
    return density * other / either if either else 1.0


def jaccard_matrix(masks: Sequence[Mask]) -> list[list[float]]:
    """Return |both| / |either| of each pair: [n, n], symmetric, with ones on the diagonal.

    Raises:
        ValueError: the masks are of different models.
    """
    matrix = [[1.0] * len(masks) for _ in masks]
    for first, second in combinations(range(len(masks)), 2):
        matrix[first][second] = matrix[second][first] = masks[first].jaccard(masks[second])
    return matrix


def between_pairs(matrix: Sequence[Sequence[float]]) -> list[float]:
    """Return the entries of `matrix`, [n, n], above the diagonal, row by row: one for each pair."""
    return [matrix[first][second] for first, second in combinations(range(len(matrix)), 2)]
