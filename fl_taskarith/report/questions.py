"""The questions of the report on whole models, masks and federations, each answered from the arms that can answer it.

Most are a row of SWEEPS: arms that differ in one setting alone, compared with one of them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fl_taskarith.report.contrasts import (
    WORK_KEYS,
    Arms,
    Family,
    accuracy,
    best_by_validation,
    dense_twin,
    difference,
    enough_rounds,
    families,
    gain,
    identity,
    masked,
)
from fl_taskarith.report.latex import UNKNOWN, Latex, escape
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.sentences import Claim, Section, Table, lay_out, say, tested, wording
from fl_taskarith.report.setting_words import (
    CENTRALIZED,
    COMPOUND,
    EQUAL,
    IID,
    Settings,
    Value,
    condition,
    setting,
    words,
)

# What may tell one family of a question from another, in the order it is told.
PLACE = (
    "condition", "mask-rule", "density", "calibration-rounds", "strategy", "local-steps", "load",
    "num-clients", "participation", "num-rounds", "schedule", "weight-decay",
)  # fmt: skip
MOST, DENSE = object(), object()  # references: the arm of the largest value; the arm that trains all weights

Families = Sequence[Family]


def is_federated(arm: MeasuredArm) -> bool:
    """Return whether clients train, each on its own data."""
    return condition(arm.settings) != CENTRALIZED


def _is_fedavg(arm: MeasuredArm) -> bool:
    return setting(arm.settings, "algorithm") == ("fedavg", 0.0)


def _every(found: Families) -> Families:
    return found


def _none(_: Families) -> Families:
    return ()


def _largest(key: str) -> Callable[[Families], Families]:
    """Choose the family of all weights, the least alike data, and the largest federation or share."""
    return lambda found: [max(found, key=lambda each: (not masked(each), condition(each.common), each.common[key]))]


@dataclass(frozen=True)
class Sweep:
    """A question to families of arms that differ in `key` alone; its words are in sentences.tex.

    Attributes:
        among: the arms that it is put to. also: settings that change with `key`.
        reference: what the others are compared with: MOST, DENSE, or a value of `key`; else the least value.
        required: whether a family needs an arm of that value; where it does not, the least stands in for it.
        order: sorts the families. pool: whether one paragraph tells of families that have the same two values.
        claimed: the families that something is claimed of.
        far: which of the members beside the reference the claim is about: the first or the last.
    """

    key: str
    among: Callable[[MeasuredArm], bool] = lambda arm: True
    also: Collection[str] = ()
    reference: Any = None
    required: bool = False
    order: Callable[[Family], Any] = lambda family: 0
    pool: bool = False
    claimed: Callable[[Families], Families] = _every
    far: int = -1


SWEEPS = {
    sweep.key: sweep
    for sweep in (
        Sweep("schedule", reference="constant", claimed=_none),
        Sweep("weight-decay", reference=0.0, claimed=_none),
        Sweep("num-rounds", reference=MOST),
        Sweep("condition", is_federated, reference=IID, required=True, claimed=lambda found: found[:1],
              order=lambda family: family.common["local-steps"]),
        Sweep("local-steps", is_federated, WORK_KEYS, claimed=lambda found: found[-1:],
              order=lambda family: (condition(family.common), not masked(family))),
        Sweep("density", masked, reference=DENSE, far=0),
        Sweep("calibration-rounds", masked),
        Sweep("participation", is_federated, pool=True, claimed=_largest("num-clients")),
        Sweep("num-clients", is_federated, pool=True, claimed=_largest("participation")),
        Sweep("algorithm", reference=("fedavg", 0.0), required=True, claimed=_none),
        Sweep("load", _is_fedavg, reference=EQUAL, required=True, claimed=_none),
    )
}  # fmt: skip


def sweep(section: Section, key: str, arms: Arms, told: bool = True) -> Families:
    """Compare the arms of every family that differs in `key`: a paragraph each, if `told`, and claims.

    Returns:
        The families; where there is none, it is said to be missing if sentences.tex has a word for it.
    """
    row = SWEEPS[key]
    found = [family for family in families([arm for arm in arms if row.among(arm)], key, row.also)
             if not row.required or row.reference in family.members]  # fmt: skip
    found.sort(key=row.order)
    if not found and key in wording("MISSING"):
        section.missing(key)
    pooled = row.pool and [len(values) for values in {tuple(family.members) for family in found}] == [2]
    if pooled:
        section.say("against", *pooled_pairs(key, found))
    for family in found:
        place, values = where(family, found), list(family.members)
        value = values[-1] if row.reference in (MOST, DENSE) else values[0]
        value = row.reference if row.reference in values else value
        reference, name = family.members[value], say("named", key, _member(key, value))
        if row.reference is DENSE and (dense := dense_twin(reference, arms)) is not None:
            reference, name = dense, say("all_weights")
        pairs = {_member(key, each): difference(arm, reference)
                 for each, arm in family.members.items() if arm is not reference}  # fmt: skip
        if told and not pooled:
            section.say("sweep", key, place, name, reference, pairs)
        if any(family is each for each in row.claimed(found)):
            far = list(pairs)[row.far]
            section.claim(say("subject", key, far, place), pairs[far], say("than", key, name))
    return found


def _member(key: str, value: Value) -> Latex:
    return say("epochs", value) if key == "num-rounds" else words(key, value)


def pooled_pairs(key: str, found: Families) -> tuple[Latex, dict[Latex, Any]]:
    """Return the name of the least value of `key`, which is that of all families, and every difference to it."""
    pairs = {}
    for family in found:
        place = where(family, found)
        (_, reference), *others = family.members.items()
        for value, arm in others:
            pairs[Latex(", ").join([words(key, value), *([place] if place else [])])] = difference(arm, reference)
    return words(key, next(iter(found[0].members))), pairs


def where(family: Family, among: Families) -> Latex:
    """Return what tells a family from the others, for example "iid, dense"; empty where it is the only one."""
    keys = [key for key in PLACE if len({setting(each.common, key) for each in among}) > 1]
    if "local-steps" in keys and "num-rounds" in keys:  # which follow from J where the work is equal
        keys.remove("num-rounds")
    return arm_words(family.common, keys)


def arm_words(settings: Settings, keys: Sequence[str]) -> Latex:
    """Return the settings that are named, in symbols."""
    values = {key: setting(settings, key) for key in keys}
    return Latex(", ").join([words(key, value) for key, value in values.items()])


def gains_table(section: Section, key: str, rows: Sequence[tuple[Latex, MeasuredArm]]) -> None:
    """Add a table of arms by name: rate, accuracy, and gain over the ridge head."""
    section.tables.append(Table(say("gains_caption", key), lay_out("arms_table", rows, None)))


def families_table(section: Section, key: str, found: Families) -> None:
    """Add a row per arm of every family, named by its value of `key` and by what tells its family from the others."""
    rows = [(say("at", words(key, value), where(family, found)), arm)
            for family in found for value, arm in family.members.items()]  # fmt: skip
    if rows:
        gains_table(section, key, rows)


def varying(arms: Arms, keys: Sequence[str]) -> list[str]:
    """Return those of `keys` that not all arms have the same value of."""
    return [key for key in keys if len({setting(arm.settings, key) for arm in arms}) > 1]


def centralized(section: Section, arms: Arms) -> None:
    """Answer which schedule and weight decay are best, and how many epochs are enough."""
    chosen = [arm for arm in arms if not is_federated(arm) and not masked(arm)]
    best = best_by_validation(chosen)
    if best is None:
        return section.missing("centralized")
    keys = varying(chosen, ("schedule", "weight-decay", "num-rounds"))
    rows = [(arm_words(arm.settings, keys) or escape(arm.label), arm) for arm in chosen]
    section.say("chosen", next(name for name, arm in rows if arm is best), best)
    sweep(section, "schedule", chosen)
    sweep(section, "weight-decay", chosen)
    gains_table(section, "centralized", rows)
    enough = enough_rounds(best)
    if enough is None:
        sweep(section, "num-rounds", chosen)
    else:
        section.claims.append(Claim(say("enough", enough), "told" if enough.round < enough.last else "undecided"))


def fedavg_iid(section: Section, arms: Arms, everything: Arms) -> None:
    """Compare FedAvg on iid shards with the ridge head and with centralized training."""
    best, pooled = (
        best_by_validation([arm for arm in among if condition(arm.settings) == place and not masked(arm)])
        for among, place in (([arm for arm in arms if arm.settings["strategy"] == "fedavg"], IID),
                             (everything, CENTRALIZED))
    )  # fmt: skip
    if best is None:
        return section.missing("fedavg-iid")
    section.say("fedavg", best)
    section.claim(say("fedavg_iid"), gain(best), say("ridge_head"))
    if pooled is None:
        return section.missing("pooled")
    section.claim(say("fedavg_iid"), difference(best, pooled), say("centralized_training"))


def heterogeneity(section: Section, arms: Arms) -> None:
    """Answer what non-iid data cost, and whether more local work hurts."""
    arms = [arm for arm in arms if is_federated(arm)]
    sweep(section, "condition", arms)
    found = sweep(section, "local-steps", arms, told=False)
    totals = [{int(arm.settings["num-rounds"]) * int(arm.settings["local-steps"]) for arm in family.members.values()}
              for family in found]  # fmt: skip
    equal = all(len(steps) == 1 for steps in totals)
    rules = list(dict.fromkeys(family.common["mask-rule"] for family in found))
    for rule in rules:
        alike = [family for family in found if family.common["mask-rule"] == rule]
        named = words("mask-rule", rule) if len(rules) > 1 else None
        section.say("local_steps", named, equal, *pooled_pairs("local-steps", alike))
    steps = sorted({arm.settings["local-steps"] for arm in arms})
    varied = {*COMPOUND["condition"][1], "local-steps", *WORK_KEYS}
    for rule in dict.fromkeys(arm.settings["mask-rule"] for arm in arms):
        of_rule = [arm for arm in arms if arm.settings["mask-rule"] == rule]
        cells = {
            (condition(arm.settings), arm.settings["local-steps"]): tested(arm)
            for arm in reversed(of_rule)
            if identity(arm, varied) == identity(of_rule[0], varied)  # another algorithm would stand in a gap unnoticed
        }
        if len(cells) > 1:
            shown = [each for each in steps if each in {column for _, column in cells}]
            rows = [[words("condition", place), *(cells.get((place, each), UNKNOWN) for each in shown)]
                    for place in sorted({condition(arm.settings) for arm in arms})]  # fmt: skip
            header = ["", *(words("local-steps", each) for each in shown)]
            caption = say("matrix_caption", words("mask-rule", rule))
            section.tables.append(Table(caption, lay_out("grid", header, rows, 0)))


def sparsity(section: Section, arms: Arms) -> None:
    """Compare mask rules at equal density, densities, and rounds of calibration."""
    found = families([arm for arm in arms if masked(arm)], "mask-rule")
    found.sort(key=lambda family: condition(family.common))
    if not found:
        section.missing("mask-rule")
    for family in found:
        place = where(family, found)
        ranked = sorted(family.members.values(), key=lambda arm: -accuracy(arm).mean if arm.test else 101.0)
        if not ranked[1].test:
            section.missing("ranking", place)
            continue
        names = [words("mask-rule", arm.settings["mask-rule"]) for arm in ranked]
        pairs = [difference(arm, ranked[0]) for arm in ranked[1:]]
        section.say("ranking", place, names[0], ranked[0], dict(zip(names[1:], pairs, strict=True)))
        section.claim(say("at", names[0], place), difference(*ranked[:2]), say("next_rule", names[1]))
        rows = list(zip(names, ranked, strict=True))
        if (dense := dense_twin(ranked[0], arms)) is not None:
            rows.append((say("all_weights"), dense))
        section.tables.append(Table(say("ranking_caption", place), lay_out("arms_table", rows, ranked[0])))
    for key in ("density", "calibration-rounds"):
        families_table(section, key, sweep(section, key, arms))


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
    section.tables.append(Table(say("six_caption"), lay_out("six_models", rows.values())))


def participation(section: Section, arms: Arms) -> None:
    """Answer what the share of clients per round changes, and their number."""
    found = [*sweep(section, "participation", arms), *sweep(section, "num-clients", arms)]
    shown = list({id(arm): arm for family in found for arm in family.members.values()}.values())
    if shown:
        keys = varying(shown, ("mask-rule", "condition", "num-clients", "participation"))
        gains_table(section, "participation", [(arm_words(arm.settings, keys), arm) for arm in shown])


def systems(section: Section, arms: Arms) -> None:
    """Compare FedAvg with other algorithms where clients do unequal work."""
    found = sweep(section, "algorithm", arms)
    if not found:
        return
    for family in found:
        reference = family.members["fedavg", 0.0]
        others = [arm for arm in family.members.values() if arm is not reference]
        for strategy in dict.fromkeys(arm.settings["strategy"] for arm in others):
            best = best_by_validation([arm for arm in others if arm.settings["strategy"] == strategy])
            if best is None:
                section.claims.append(Claim(say("strategy_missing", strategy), "not run"))
                continue
            name = words("algorithm", setting(best.settings, "algorithm"))
            section.claim(
                say("at", name, where(family, found)), difference(best, reference), words("strategy", "fedavg")
            )
    sweep(section, "load", arms)
    families_table(section, "algorithm", found)
