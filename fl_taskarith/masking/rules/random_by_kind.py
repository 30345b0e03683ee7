"""Random weights, as many of each kind of layer as the least sensitive ones.

It tells whether the sensitivity of single weights says anything beyond the share of each kind of layer.
"""

from fl_taskarith.masking.rules import MaskRule

RULE = MaskRule(
    "random weights, as many of each kind of layer as the least sensitive ones", "control", redrawn_by_kind=True
)
