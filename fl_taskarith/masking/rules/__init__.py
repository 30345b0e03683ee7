"""Mask rules, one per file: a file `my_rule.py` with `RULE = MaskRule(...)` is `mask-rule = "my-rule"`.

A file whose name begins with _ is no rule's, but holds what several share. A rule of your own needs no file here:
`mask-rule = "module:name"` names a MaskRule in any importable module. Settings list the rules, so neither this module
nor a rule's file imports torch before it scores.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_taskarith.errors import ConfigError, imported, kind_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NO_RULES = ("none", "file")  # values of `mask-rule` that name no rule
Scores = Callable[[Mapping[str, "Tensor"], "np.random.Generator"], dict[str, "Tensor"]]
"""From the pretrained weights, of any shape by name, and a generator: a score of every entry, in the same shapes."""


@dataclass(frozen=True)
class MaskRule:
    """How a rule ranks the weights, of which it keeps as many as the density says. ConfigError if it makes no sense.

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

    def __post_init__(self) -> None:
        if self.scores is not None and not callable(self.scores):
            raise ConfigError(
                f"the mask rule's scores are of type {kind_of(self.scores)}: expected a function of the weights and a "
                "generator."
            )
        if self.scores is not None and (self.salient or self.redrawn_by_kind):
            flag = "salient" if self.salient else "redrawn_by_kind"
            raise ConfigError(f"the mask rule has scores of its own, on which {flag} has no effect: leave one out.")
        if not isinstance(self.kinds, tuple | list):
            raise ConfigError(
                f'the mask rule\'s kinds are of type {kind_of(self.kinds)}: expected a tuple, as ("q", "k").'
            )


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


def rules_in(folder: Path) -> dict[str, MaskRule]:
    """Return the rules of the files in `folder`, which is this one, by their names as settings.

    Raises:
        ConfigError: a file holds no RULE, or has the name of a `mask-rule` that is none.
    """
    rules = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        if path.stem in NO_RULES:
            raise ConfigError(f'{path}: mask-rule = "{path.stem}" has a meaning already: give the file another name.')
        rule = getattr(importlib.import_module(f"{__name__}.{path.stem}"), "RULE", None)
        if not isinstance(rule, MaskRule):
            raise ConfigError(
                f"{path} holds no mask rule: expected RULE = MaskRule(...), or for what rules share a name that begins "
                "with _."
            )
        rules[path.stem.replace("_", "-")] = rule
    return rules


RULES = rules_in(Path(__file__).parent)
