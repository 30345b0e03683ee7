"""The global model of a run, as its difference from the pretrained weights: it travels and is saved in this form."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_taskarith.masking.mask import Mask, Shapes

Weights = dict[str, Tensor]

FROZEN, MASKED = "frozen/", "mask/"


@dataclass(frozen=True)
class Frozen:
    """What stays fixed in the rounds that follow: it is sent to every client once, not in every message.

    weights: full tensors that are neither trained nor as pretrained (the head, once it is solved or trained).
    mask: which entries the rounds update; None for all entries of the trained tensors.
    """

    weights: Weights = field(default_factory=dict)
    mask: Mask | None = None

    def tensors(self) -> Weights:
        """Return the weights in their shapes, and the mask packed to uint8 [⌈n / 8⌉], for a message or a file."""
        packed = {} if self.mask is None else self.mask.packed()
        return {FROZEN + name: value for name, value in self.weights.items()} | {
            MASKED + name: value for name, value in packed.items()
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], shapes: Shapes, device: torch.device) -> "Frozen":
        """Return the inverse of `tensors`, on `device`, in the model's order; `shapes` are of all its parameters."""
        packed = {name: tensors[MASKED + name] for name in shapes if MASKED + name in tensors}
        weights = {name: tensors[FROZEN + name].to(device) for name in shapes if FROZEN + name in tensors}
        return cls(weights, Mask.unpacked(packed, shapes).to(device) if packed else None)


@dataclass(frozen=True)
class GlobalModel:
    """trained: what the rounds update, full tensors by name or, under a mask, [n] entries of each. frozen: the rest."""

    trained: Weights
    frozen: Frozen = field(default_factory=Frozen)
