"""The questions of the report on whole models, masks and federations, each answered from the arms that can answer it.

Most are a row of SWEEPS: arms that differ in one setting alone, compared with one of them.
"""

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Any, NamedTuple

from fl_taskarith.report.conditions import COMPOUND, EQUAL, IID, Settings, condition, setting, words
from fl_taskarith.report.contrasts import (
    WORK_KEYS,
    Arms,
    Family,
    agree,
    best_by_strategy,
    best_by_validation,
    dense_twin,
    difference,
    enough_rounds,
    find_families,
    gain,
)
from fl_taskarith.report.latex import Latex, escape
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.sentences import Claim, Section, say, wording

# What may tell one family of a question from another, in the order it is written.
PLACE = (
    "condition", "mask-rule", "density", "calibration-rounds", "strategy", "local-steps", "load",
    "num-clients", "participation", "num-rounds", "schedule", "weight-decay",
)  # fmt: skip
MOST, DENSE = object(), object()  # references: the arm of the largest value; the arm that trains all weights
NOTHING, FIRST, LAST = slice(0), slice(1), slice(-1, None)
FEDAVG = ("fedavg", 0.0)
federated, masked = attrgetter("federated"), attrgetter("masked")

Families = Sequence[Family]


def _hardest(family: Family) -> Any:
    """Sort all weights after masked ones, the least alike data last, then by the size of the federation and the share.

    One of the last two is what the family varies.
    """
    common = family.common
    return not family.masked, condition(common), common.get("num-clients", 0), common.get("participation", 0)


class Sweep(NamedTuple):
    """A question answered by families of arms that differ in `key` alone; its words are in sentences.tex.

    Attributes:
        among: the arms that can answer it. also: settings that change with `key`.
        reference: what the others are compared with: MOST, DENSE, or a value of `key`; else the least value.
        required: whether a family needs an arm of that value; where it does not, the least stands in for it.
        order: sorts the families. paragraphs: whether every family has one.
        pool: whether families that have the same two values share one.
        claimed: the families that get a claim, in `claim_order`.
        far: which of the members beside the reference the claim is about: the first or the last.
    """

    key: str
    among: Callable[[MeasuredArm], bool] = lambda arm: True
    also: Collection[str] = ()
    reference: Any = None
    required: bool = False
    order: Callable[[Family], Any] = lambda family: 0
    paragraphs: bool = True
    pool: bool = False
    claimed: slice = slice(None)
    claim_order: Callable[[Family], Any] = lambda family: 0
    far: int = -1


SWEEPS = {
    row.key: row
    for row in (
        Sweep("schedule", reference="constant", claimed=NOTHING),
        Sweep("weight-decay", reference=0.0, claimed=NOTHING),
        Sweep("num-rounds", reference=MOST),
        Sweep("condition", federated, reference=IID, required=True, claimed=FIRST,
              order=lambda family: family.common["local-steps"]),
        Sweep("local-steps", federated, WORK_KEYS, claimed=LAST, paragraphs=False,
              order=lambda family: (condition(family.common), not family.masked)),
        Sweep("density", masked, reference=DENSE, far=0),
        Sweep("calibration-rounds", masked),
        Sweep("participation", federated, pool=True, claimed=LAST, claim_order=_hardest),
        Sweep("num-clients", federated, pool=True, claimed=LAST, claim_order=_hardest),
        Sweep("algorithm", reference=FEDAVG, required=True, claimed=NOTHING),
        Sweep("load", lambda arm: setting(arm.settings, "algorithm") == FEDAVG, reference=EQUAL, required=True,
              claimed=NOTHING),
    )
}  # fmt: skip


def sweep(section: Section, key: str, arms: Arms) -> Families:
    """Compare the arms of every family that differs in `key`, in paragraphs, claims and, where it has one, a table.

    Returns:
        The families. Where there is none, the section says so, if sentences.tex has words for it in MISSING.
    """
    row = SWEEPS[key]
    families = [family for family in find_families(list(filter(row.among, arms)), key, row.also)
             if not row.required or row.reference in family.members]  # fmt: skip
    families.sort(key=row.order)
    claimed = sorted(families, key=row.claim_order)[row.claimed]
    pooled = row.pool and [len(values) for values in {tuple(family.members) for family in families}] == [2]
    if not families and key in wording("MISSING"):
        section.missing(key)
    if pooled:
        section.say("against", *pooled_pairs(key, families))
    rows = []
    for family in families:
        place, values = where(family, families), list(family.members)
        names = {value: say("epochs", value) if key == "num-rounds" else words(key, value) for value in values}
        value = values[-1] if row.reference in (MOST, DENSE) else values[0]
        value = row.reference if row.reference in values else value
        reference, name = family.members[value], say("named", key, names[value])
        if row.reference is DENSE and (dense := dense_twin(reference, arms)) is not None:
            reference, name = dense, say("all_weights")
        pairs = {names[each]: difference(arm, reference)
                 for each, arm in family.members.items() if arm is not reference}  # fmt: skip
        if row.paragraphs and not pooled:
            section.say("sweep", key, place, name, reference, pairs)
        if any(family is each for each in claimed):
            far = list(pairs)[row.far]
            section.claim(say("subject", key, far, place), pairs[far], say("than", key, name))
        rows += [(say("at", names[each], place), arm) for each, arm in family.members.items()]
    if rows and key in wording("GAINS"):
        section.lay_out(say("gains_caption", key), "arms_table", rows, None)
    return families


def pooled_pairs(key: str, families: Families) -> tuple[Latex, dict[Latex, Any]]:
    """Return the name of the least value of `key`, which all families share, and every difference to it."""
    pairs = {}
    for family in families:
        (_, reference), *others = family.members.items()
        for value, arm in others:
            name = say("and_place", words(key, value), where(family, families))
            pairs[name] = difference(arm, reference)
    return words(key, next(iter(families[0].members))), pairs


def where(family: Family, among: Families) -> Latex:
    """Return what tells a family from the others, for example "iid, dense"; empty where it is the only one."""
    keys = varying([each.common for each in among], PLACE)
    if "local-steps" in keys and "num-rounds" in keys:  # which follow from J where the work is equal
        keys.remove("num-rounds")
    return setting_words(family.common, keys)


def varying(among: Sequence[Settings], keys: Sequence[str]) -> list[str]:
    """Return those of `keys` that not all have the same value of."""
    return [key for key in keys if len({setting(settings, key) for settings in among}) > 1]


def setting_words(settings: Settings, keys: Sequence[str]) -> Latex:
    """Return the settings `keys` in symbols."""
    return Latex(", ").join([words(key, setting(settings, key)) for key in keys])


def centralized(section: Section, arms: Arms) -> None:
    """Answer which schedule and weight decay are best, and how many epochs are enough."""
    arms = [arm for arm in arms if not arm.federated and not arm.masked]
    best = best_by_validation(arms)
    if best is None:
        return section.missing("centralized")
    keys = varying([arm.settings for arm in arms], ("schedule", "weight-decay", "num-rounds"))
    rows = [(setting_words(arm.settings, keys) or escape(arm.label), arm) for arm in arms]
    section.say("chosen", next(name for name, arm in rows if arm is best), best)
    sweep(section, "schedule", arms)
    sweep(section, "weight-decay", arms)
    section.lay_out(say("gains_caption", "centralized"), "arms_table", rows, None)
    enough = enough_rounds(best)
    if enough is None:
        sweep(section, "num-rounds", arms)
    else:
        section.claims.append(Claim(say("enough", enough), "told" if enough.round < enough.last else "undecided"))


def fedavg_iid(section: Section, arms: Arms, everything: Arms) -> None:
    """Compare FedAvg on iid shards with the ridge head and with centralized training."""
    dense = [arm for arm in arms if arm.settings["strategy"] == "fedavg" and not arm.masked]
    best = best_by_validation([arm for arm in dense if condition(arm.settings) == IID])
    central = best_by_validation([arm for arm in everything if not arm.federated and not arm.masked])
    if best is None:
        return section.missing("fedavg-iid")
    section.say("fedavg", best)
    section.claim(say("fedavg_iid"), gain(best), say("ridge_head"))
    if central is None:
        return section.missing("pooled")
    section.claim(say("fedavg_iid"), difference(best, central), say("centralized_training"))


def heterogeneity(section: Section, arms: Arms) -> None:
    """Answer what non-iid data cost, and whether more local work hurts."""
    arms = list(filter(federated, arms))
    sweep(section, "condition", arms)
    families = sweep(section, "local-steps", arms)
    equal = all(
        len({int(arm.settings["num-rounds"]) * int(arm.settings["local-steps"]) for arm in family.members.values()})
        == 1
        for family in families
    )
    rules = list(dict.fromkeys(family.common["mask-rule"] for family in families))
    for rule in rules:
        alike = [family for family in families if family.common["mask-rule"] == rule]
        named = words("mask-rule", rule) if len(rules) > 1 else None
        section.say("local_steps", named, equal, *pooled_pairs("local-steps", alike))
    places = sorted({condition(arm.settings) for arm in arms})
    varied = {*COMPOUND["condition"][1], "local-steps", *WORK_KEYS}
    for rule in dict.fromkeys(arm.settings["mask-rule"] for arm in arms):
        of_rule = [arm for arm in arms if arm.settings["mask-rule"] == rule]
        cells = {
            (condition(arm.settings), arm.settings["local-steps"]): arm
            for arm in reversed(of_rule)
            if agree(arm, of_rule[0], varied)  # another algorithm would stand in a gap unnoticed
        }
        if len(cells) > 1:
            steps = sorted({column for _, column in cells})
            rows = [(words("condition", place), [cells.get((place, each)) for each in steps]) for place in places]
            caption = say("matrix_caption", words("mask-rule", rule))
            section.lay_out(caption, "matrix", [words("local-steps", each) for each in steps], rows)


def sparsity(section: Section, arms: Arms) -> None:
    """Compare mask rules at equal density, densities, and rounds of calibration."""
    families = find_families(list(filter(masked, arms)), "mask-rule")
    families.sort(key=lambda family: condition(family.common))
    if not families:
        section.missing("mask-rule")
    for family in families:
        place = where(family, families)
        ranked = sorted(family.members.values(), key=lambda arm: -fmean(arm.test.values()) if arm.test else 101.0)
        if not ranked[1].test:
            section.missing("ranking", place)
            continue
        rows = [(words("mask-rule", arm.settings["mask-rule"]), arm) for arm in ranked]
        (name, winner), (second, _), *_ = rows
        pairs = {other: difference(arm, winner) for other, arm in rows[1:]}
        section.say("ranking", place, name, winner, pairs)
        section.claim(say("at", name, place), difference(*ranked[:2]), say("next_rule", second))
        if (dense := dense_twin(winner, arms)) is not None:
            rows.append((say("all_weights"), dense))
        section.lay_out(say("ranking_caption", place), "arms_table", rows, winner)
    sweep(section, "density", arms)
    sweep(section, "calibration-rounds", arms)


def six_models(section: Section, arms: Arms) -> None:
    """Compare all weights with masked ones, on centralized, iid and non-iid data."""
    rows: dict[Latex, tuple[object, ...]] = {}
    for arm in sorted(filter(masked, arms), key=lambda each: condition(each.settings)):
        dense = dense_twin(arm, arms)
        name = words("condition", condition(arm.settings))
        if dense is not None and name not in rows:
            pairs = difference(arm, dense)
            rows[name] = (name, dense, arm, pairs)
            section.claim(say("masked_training", name), pairs, say("training_all"))
    if not rows:
        return section.missing("six-models")
    section.lay_out(say("six_caption"), "six_models", rows.values())


def participation(section: Section, arms: Arms) -> None:
    """Answer what the share of clients per round changes, and their number."""
    families = [*sweep(section, "participation", arms), *sweep(section, "num-clients", arms)]
    shown = list({id(arm): arm for family in families for arm in family.members.values()}.values())
    if shown:
        keys = varying([arm.settings for arm in shown], ("mask-rule", "condition", "num-clients", "participation"))
        rows = [(setting_words(arm.settings, keys), arm) for arm in shown]
        section.lay_out(say("gains_caption", "federation"), "arms_table", rows, None)


def systems(section: Section, arms: Arms) -> None:
    """Compare FedAvg with other algorithms where clients do unequal work."""
    families = sweep(section, "algorithm", arms)
    for family in families:
        reference = family.members[FEDAVG]
        others = [arm for arm in family.members.values() if arm is not reference]
        for strategy, best in best_by_strategy(others).items():
            if best is None:
                section.missing("systems", strategy)
            else:
                subject = say("at", setting_words(best.settings, ["algorithm"]), where(family, families))
                section.claim(subject, difference(best, reference), words("strategy", "fedavg"))
    if families:
        sweep(section, "load", arms)
