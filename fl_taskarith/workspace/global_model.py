"""The global model of a run, as what differs from the pretrained weights: the form in which it travels and is saved."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask, Shapes

Weights = dict[str, Tensor]

FROZEN, MASKED = "frozen/", "mask/"


@dataclass(frozen=True)
class Frozen:
    """What is fixed before the rounds that follow: sent to every client once, not in every message.

    weights: full tensors that are not trained and not as pretrained (the head, once it is solved or trained).
    mask: which entries the rounds update; None for all entries of the trained tensors.
    """

    weights: Weights = field(default_factory=dict)
    mask: Mask | None = None

    def tensors(self) -> Weights:
        """For a message or a file: the weights, and the mask with one bit per entry."""
        packed = {} if self.mask is None else self.mask.packed()
        return {FROZEN + name: value for name, value in self.weights.items()} | {
            MASKED + name: value for name, value in packed.items()
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], shapes: Shapes, device: torch.device) -> "Frozen":
        """The inverse of `tensors`, on `device`, in the model's order; `shapes` of all its parameters by name."""
        packed = {name: tensors[MASKED + name] for name in shapes if MASKED + name in tensors}
        weights = {name: tensors[FROZEN + name].to(device) for name in shapes if FROZEN + name in tensors}
        return cls(weights, Mask.unpacked(packed, shapes).to(device) if packed else None)


@dataclass(frozen=True)
class GlobalModel:
    """trained: what the rounds update, full tensors by name or, under a mask, [n] entries of each; frozen: the rest."""

    trained: Weights
    frozen: Frozen = field(default_factory=Frozen)
