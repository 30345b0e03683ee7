"""The weights whose change alters the predictions least: TaLoS."""

from fl_taskarith.masking.rules import MaskRule

RULE = MaskRule("the least sensitive weights", 'Iurada et al., "TaLoS", ICLR 2025')
