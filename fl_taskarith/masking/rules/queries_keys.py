"""Random queries and keys of attention: whether the kind of layer is all that a sensitivity mask finds."""

from fl_taskarith.masking.rules import MaskRule
from fl_taskarith.masking.rules.random import random_order

RULE = MaskRule("random weights of attention's queries and keys", "control", scores=random_order, kinds=("q", "k"))
