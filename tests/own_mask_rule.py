"""All that a mask rule of one's own takes: `mask-rule = "own_mask_rule:FIRST"`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.masking.rules import MaskRule


def places(weights: Mapping[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
    scores, start = {}, 0
    for name, value in weights.items():
        scores[name] = torch.arange(start, start + value.numel()).view(value.shape)
        start += value.numel()
    return scores


FIRST = MaskRule("the first weights", "none", scores=places)
MIDDLING = MaskRule("sensitivities, too", "none", keeps_largest=True)
NO_RULE = "no rule"
