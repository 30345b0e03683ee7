"""A uniformly random choice of weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fl_taskarith.masking.rules import MaskRule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def random_order(weights: Mapping[str, "Tensor"], generator: "np.random.Generator") -> dict[str, "Tensor"]:
    """Return the place of every entry in one random order of all, int64, in the shapes of `weights`."""
    import torch

    sizes = [value.numel() for value in weights.values()]
    order = torch.from_numpy(generator.permutation(sum(sizes)))
    return {
        name: part.view(value.shape).to(value.device)
        for (name, value), part in zip(weights.items(), order.split(sizes), strict=True)
    }


RULE = MaskRule("random weights", "baseline", scores=random_order)
