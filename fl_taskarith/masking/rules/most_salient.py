"""The weights whose removal would change the loss most: SSFL, with the saliency of SNIP."""

from fl_taskarith.masking.rules import MaskRule

RULE = MaskRule(
    "the weights of largest saliency |w · ∂loss/∂w|",
    'Ohib et al., "SSFL", TMLR 2025; Lee et al., "SNIP", ICLR 2019',
    keeps_largest=True,
    salient=True,
)
