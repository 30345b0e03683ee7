"""The questions of the report on whole models, masks and federations, each answered from the arms that can answer it.

Most are a row of SWEEPS: arms that differ in one setting alone, compared with one of them.
"""

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Any, NamedTuple

from fl_taskarith.report.conditions import EQUAL, IID, Condition, Settings, condition, setting, words
from fl_taskarith.report.contrasts import (
    MASK_KEYS,
    WORK_KEYS,
    Arms,
    Family,
    best_by_validation,
    dense_twin,
    difference,
    enough_rounds,
    find_families,
    gain,
    ranked_by_validation,
)
from fl_taskarith.report.latex import Latex, escape, listed
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.sentences import Claim, Compared, Section, say, wording

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
        order: sorts the families.
        claimed: the families that get a claim, in `claim_order`.
        best: whether the claim is about the member that validation chooses; else about the last one that is tuned.
    """

    key: str
    among: Callable[[MeasuredArm], bool] = lambda arm: True
    also: Collection[str] = ()
    reference: Any = None
    required: bool = False
    order: Callable[[Family], Any] = lambda family: 0
    claimed: slice = slice(None)
    claim_order: Callable[[Family], Any] = lambda family: 0
    best: bool = False


SWEEPS = {
    row.key: row
    for row in (
        Sweep("schedule", reference="constant", claimed=NOTHING),
        Sweep("weight-decay", reference=0.0, claimed=NOTHING),
        Sweep("num-rounds", reference=MOST),
        Sweep("condition", federated, reference=IID, required=True, claimed=FIRST,
              order=lambda family: family.common["local-steps"]),
        Sweep("local-steps", federated, WORK_KEYS, claimed=LAST,
              order=lambda family: (condition(family.common), not family.masked)),
        Sweep("density", masked, reference=DENSE, claimed=LAST, claim_order=_hardest, best=True),
        Sweep("calibration-rounds", masked, claimed=LAST, claim_order=_hardest, best=True),
        Sweep("participation", federated, claimed=LAST, claim_order=_hardest),
        Sweep("num-clients", federated, claimed=LAST, claim_order=_hardest),
        Sweep("algorithm", reference=FEDAVG, required=True, best=True),
        Sweep("load", lambda arm: setting(arm.settings, "algorithm") == FEDAVG, reference=EQUAL, required=True,
              claimed=NOTHING),
    )
}  # fmt: skip


def sweep(section: Section, key: str, arms: Arms, note: object = "") -> Families:
    """Compare the arms of every family that differs in `key`, in a table and in claims.

    Args:
        note: what else the text says of the comparison.

    Returns:
        The families. Where there is none, the section says so, if sentences.tex has words for it in MISSING.
    """
    row = SWEEPS[key]
    families = [family for family in find_families(list(filter(row.among, arms)), key, row.also)
                if not row.required or row.reference in family.members]  # fmt: skip
    families.sort(key=row.order)
    if not families:
        if key in wording("MISSING"):
            section.missing(key)
        return families
    groups = [_group(row, family, where(family, families), arms) for family in families]
    table = section.compare(key, groups, note)
    ranked = sorted(families, key=_best_mean) if row.best else families
    for family in sorted(ranked, key=row.claim_order)[row.claimed]:
        group = groups[families.index(family)]
        names = {arm: name for name, arm in group.rows}
        others = [arm for arm in family.members.values() if arm is not group.reference]
        others = [arm for arm in others if not arm.edge] or others
        chosen = best_by_validation(others) if row.best else None
        far, place = chosen or others[-1], listed(group.heading, say("on_validation") if chosen else "")
        assert group.reference is not None
        section.claim(say("subject", key, names[far], place), difference(far, group.reference),
                      say("than", key, say("named", key, names[group.reference])), [far, group.reference],
                      table)  # fmt: skip
    return families


def _best_mean(family: Family) -> float:
    """Return the highest mean validation accuracy of a family's members; 0 where none has results."""
    best = best_by_validation(list(family.members.values()))
    return fmean(best.val.values()) if best is not None else 0.0


def _group(row: Sweep, family: Family, heading: Latex, arms: Arms) -> Compared:
    """Return the rows of a family, its reference first."""
    names = {value: say("epochs", value) if row.key == "num-rounds" else words(row.key, value)
             for value in family.members}  # fmt: skip
    values = list(names)
    least = values[-1] if row.reference in (MOST, DENSE) else values[0]
    value = row.reference if row.reference in family.members else least
    rows = [(names[each], family.members[each]) for each in sorted(values, key=lambda each: each != value)]
    if row.reference is DENSE and (dense := dense_twin(family.members[value], arms)) is not None:
        rows = [(say("all_weights"), dense), *((names[each], arm) for each, arm in family.members.items())]
    return Compared(heading, rows, rows[0][1])


def where(family: Family, among: Families) -> Latex:
    """Return what tells a family from the others, for example "iid, dense"; empty where it is the only one."""
    keys = varying([each.common for each in among], PLACE)
    if "local-steps" in keys and "num-rounds" in keys:  # which follow from J where the work is equal
        keys.remove("num-rounds")
    if family.common.get("mask-rule") == "none":  # where these mean nothing
        keys = [key for key in keys if key not in MASK_KEYS - {"mask-rule"}]
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
    families = [*sweep(section, "schedule", arms), *sweep(section, "weight-decay", arms)]
    keys = varying([arm.settings for arm in arms], ("schedule", "weight-decay", "num-rounds"))
    names = {arm: setting_words(arm.settings, keys) or escape(arm.label) for arm in arms}
    if not families:
        section.compare("centralized", [Compared(Latex(), [(names[arm], arm) for arm in arms])])
    if not best.edge:
        section.claims.append(Claim(say("chosen", names[best], best), "told", say("on_test", best),
                                    table=say("table_label", section.name, 1)))  # fmt: skip
    enough = enough_rounds(best)
    if enough is None:
        sweep(section, "num-rounds", arms)
    elif not best.edge:
        told = enough.round < enough.last
        section.claims.append(
            Claim(say("enough", enough), "told", say("enough_points", enough)) if told else
            Claim(say("enough", enough), "undecided", open_question=say("whether_enough", enough))
        )  # fmt: skip


def fedavg_iid(section: Section, arms: Arms, everything: Arms) -> None:
    """Compare FedAvg on iid shards with the ridge head and with centralized training."""
    dense = [arm for arm in arms if arm.settings["strategy"] == "fedavg" and not arm.masked]
    best = best_by_validation([arm for arm in dense if condition(arm.settings) == IID])
    central = best_by_validation([arm for arm in everything if not arm.federated and not arm.masked])
    if best is None:
        return section.missing("fedavg-iid")
    row = say("fedavg_iid"), best
    head = say("ridge_head", [best])
    groups = [Compared(head, [row])]
    if central is not None:
        groups.append(Compared(say("centralized_training"), [(say("centralized_training"), central), row], central))
    table = section.compare("fedavg-iid", groups)
    section.claim(row[0], gain(best), head, [best], table)
    if central is None:
        return section.missing("pooled")
    section.claim(row[0], difference(best, central), say("centralized_training"), [best, central], table)


def heterogeneity(section: Section, arms: Arms) -> None:
    """Answer what non-iid data cost, and whether more local work hurts."""
    arms = list(filter(federated, arms))
    sweep(section, "condition", arms)
    work = [
        {int(arm.settings["num-rounds"]) * int(arm.settings["local-steps"]) for arm in family.members.values()}
        for family in find_families(arms, "local-steps", WORK_KEYS)
    ]
    sweep(section, "local-steps", arms, say("steps", all(len(steps) == 1 for steps in work)))


def sparsity(section: Section, arms: Arms) -> None:
    """Compare mask rules at equal density, densities, and rounds of calibration."""
    families = find_families(list(filter(masked, arms)), "mask-rule")
    families.sort(key=lambda family: condition(family.common))
    if not families:
        section.missing("mask-rule")
    groups: list[Compared] = []
    for family in families:
        place = where(family, families)
        ranked = ranked_by_validation(list(family.members.values()))
        if len(ranked) < 2:
            section.missing("ranking", place)
            continue
        ranked += [arm for arm in family.members.values() if arm not in ranked]
        rows = [(words("mask-rule", arm.settings["mask-rule"]), arm) for arm in ranked]
        if (dense := dense_twin(ranked[0], arms)) is not None:
            rows.append((say("all_weights"), dense))
        groups.append(Compared(place, rows, ranked[0]))
    if groups:
        table = section.compare("mask-rule", groups, say("best_first"))
        (name, winner), (second, other), *_ = groups[-1].rows
        subject = say("at", name, listed(groups[-1].heading, say("on_validation")))
        section.claim(subject, difference(winner, other), say("next_rule", second), [winner, other], table)
    sweep(section, "density", arms)
    sweep(section, "calibration-rounds", arms)


def six_models(section: Section, arms: Arms) -> None:
    """Compare all weights with masked ones, on centralized, iid and non-iid data."""
    groups: dict[Condition, Compared] = {}
    for arm in filter(masked, arms):
        place, dense = condition(arm.settings), dense_twin(arm, arms)
        if dense is not None and place not in groups:
            rows = [(say("all_weights"), dense), (words("mask-rule", arm.settings["mask-rule"]), arm)]
            groups[place] = Compared(words("condition", place), rows, dense)
    if not groups:
        return section.missing("six-models")
    ordered = [groups[place] for place in sorted(groups)]
    table = section.compare("six-models", ordered)
    for group in reversed(ordered):  # the least alike data first
        (_, dense), (_, arm) = group.rows
        section.claim(say("masked_training", group.heading), difference(arm, dense), say("training_all"), [arm, dense],
                      table)  # fmt: skip


def participation(section: Section, arms: Arms) -> None:
    """Answer what the share of clients per round changes, and their number."""
    sweep(section, "participation", arms)
    sweep(section, "num-clients", arms)


def systems(section: Section, arms: Arms) -> None:
    """Compare FedAvg with other algorithms where clients do unequal work."""
    if sweep(section, "algorithm", arms):
        sweep(section, "load", arms)
