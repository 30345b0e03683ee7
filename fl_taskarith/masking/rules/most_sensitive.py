"""The weights whose change alters the predictions most: the opposite of TaLoS, as a control."""

from fl_taskarith.masking.rules import MaskRule

RULE = MaskRule("the most sensitive weights", 'control of Iurada et al., "TaLoS", ICLR 2025', keeps_largest=True)
