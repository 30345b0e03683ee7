"""Random weights but no values and output projections of attention: whether leaving those out is what helps."""

from fl_taskarith.masking.rules import MaskRule
from fl_taskarith.masking.rules.random import random_order

RULE = MaskRule(
    "random weights, none of them in attention's values and output projections",
    "control",
    scores=random_order,
    kinds=("q", "k", "mlp", "norm", "scale", "patch", "position", "token", "other"),
)
