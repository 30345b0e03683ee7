"""Mask rules, one per file: a file `my_rule.py` with `RULE = MaskRule(...)` is `mask-rule = "my-rule"`.

A rule of your own needs no file here: `mask-rule = "module:name"` names a MaskRule in any importable module. Settings
list the rules, so neither this module nor a rule's file imports torch before it scores.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_taskarith.errors import ConfigError, imported

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Scores = Callable[[Mapping[str, "Tensor"], "np.random.Generator"], dict[str, "Tensor"]]
"""From the pretrained weights, of any shape by name, and a generator: a score of every entry, in the same shapes."""


@dataclass(frozen=True)
class MaskRule:
    """How a rule ranks the weights, of which it keeps as many as the density says.

    words: what the rule keeps, for people. source: the paper it is from. keeps_largest: whether the largest scores are
    kept, not the smallest. scores: for a rule that needs no data; None ranks by the sensitivity of each weight, or,
    salient, by its saliency. kinds: the kinds of tensor (`anatomy.KINDS`) that it chooses from; () for all.
    redrawn_by_kind: whether as many random entries of each kind take the place of those chosen.
    """

    words: str
    source: str
    keeps_largest: bool = False
    scores: Scores | None = None
    salient: bool = False
    kinds: tuple[str, ...] = ()
    redrawn_by_kind: bool = False


def mask_rule(name: str) -> MaskRule:
    """Return the rule of a configuration's `mask-rule`.

    Raises:
        ConfigError: "module:name" that cannot be imported, or is no MaskRule.
    """
    if name in RULES:
        return RULES[name]
    rule = imported("mask-rule", name)
    if not isinstance(rule, MaskRule):
        raise ConfigError(f'mask-rule = "{name}" is no mask rule: expected a fl_taskarith.masking.rules.MaskRule.')
    return rule


RULES: dict[str, MaskRule] = {
    path.stem.replace("_", "-"): importlib.import_module(f"{__name__}.{path.stem}").RULE
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
}
