"""The weights of least magnitude."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fl_taskarith.masking.rules import MaskRule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def magnitudes(weights: Mapping[str, "Tensor"], generator: "np.random.Generator") -> dict[str, "Tensor"]:
    """Return |θ₀|, in the shapes of `weights`."""
    return {name: value.abs() for name, value in weights.items()}


RULE = MaskRule("the weights of least magnitude", "baseline", scores=magnitudes)
