"""The magnitude that a share of a task vector's entries reaches, exactly, with one tensor in memory at a time."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BITS = 16  # of the 32 that are counted in one pass


def magnitude_threshold(task_vector: Mapping[str, Tensor], keep: float) -> float:
    """Return the smallest of the ⌈keep · N⌉ largest |τ_j| over all tensors, of any shape, together.

    Float32 numbers that are not negative sort as their bits do, so two passes, over the upper and the lower 16 bits,
    find it by counting. Entries of at least that magnitude are kept, ties included; 0 keeps everything.

    Raises:
        ValueError: `keep` is not above 0 and at most 1, or an entry is not finite.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"the share of entries kept must be above 0 and at most 1, not {keep}")
    total = sum(task_vector[name].numel() for name in task_vector)
    wanted = math.ceil(keep * total - 1e-9)
    upper, above = _counted(task_vector, wanted, lambda bits: bits >> BITS)
    lower, _ = _counted(task_vector, wanted - above, lambda bits: (bits & (2**BITS - 1))[bits >> BITS == upper])
    return float(torch.tensor((upper << BITS) + lower, dtype=torch.int32).view(torch.float32))


def _counted(task_vector: Mapping[str, Tensor], wanted: int, digits: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Return the largest digit that at least `wanted` entries reach, and how many entries lie above it."""
    counts = torch.zeros(2**BITS, dtype=torch.int64)
    for name in task_vector:
        magnitudes = task_vector[name].flatten().float().abs()
        if not bool(magnitudes.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite")
        counts += torch.bincount(digits(magnitudes.contiguous().view(torch.int32)).long(), minlength=2**BITS).cpu()
    reached = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(reached, torch.tensor(wanted)))
    return 2**BITS - 1 - position, int(reached[position - 1]) if position else 0
