"""The weights of largest magnitude."""

from fl_taskarith.masking.rules import MaskRule
from fl_taskarith.masking.rules.lowest_magnitude import magnitudes

RULE = MaskRule("the weights of largest magnitude", "baseline", keeps_largest=True, scores=magnitudes)
