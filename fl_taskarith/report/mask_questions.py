"""The questions on masks (which rule, how many weights, how many calibration rounds) and on unequal clients."""

from fl_taskarith.report.contrasts import MASK_KEYS, Family, accuracy, difference, families, masked, twin
from fl_taskarith.report.labels import algorithm, condition, heterogeneity, words
from fl_taskarith.report.latex import Latex
from fl_taskarith.report.questions import Arms
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.wording import (
    Section,
    against,
    arms_table,
    at,
    best_by_validation,
    claim,
    families_table,
    lead,
    sentence,
    sweep,
    tested,
    where,
)


def sparsity(arms: Arms) -> Section:
    """Rules at equal density, densities, calibration rounds."""
    question = "Which rule wins at equal density, and what do density and calibration rounds do?"
    section = Section("sparsity", "Masks", question)
    _rules(section, arms)
    _densities(section, arms)
    _calibration_rounds(section, arms)
    return section


def systems(arms: Arms) -> Section:
    """FedAvg against other algorithms where clients do unequal work."""
    question = "Does another algorithm help where clients do unequal work?"
    section = Section("systems", "Systems heterogeneity", question)
    found = [family for family in families(arms, "algorithm") if "fedavg" in family.members]
    if not found:
        return section.missing("FedNova and FedProx under systems heterogeneity")
    for family in found:
        reference = family.members["fedavg"]
        section.paragraphs.append(sweep("algorithm", family, found, reference, "FedAvg"))
        others = [arm for arm in family.members.values() if arm is not reference]
        for strategy in dict.fromkeys(arm.settings["strategy"] for arm in others):
            best = best_by_validation([arm for arm in others if arm.settings["strategy"] == strategy])
            if best is None:
                section.missing(f"{strategy} under systems heterogeneity")
                continue
            subject = Latex("{}{}").fill(words("algorithm", algorithm(best.settings)), at(family, found))
            section.claims.append(claim(subject, difference(best, reference), "FedAvg"))
    unequal = [family for family in families(arms, "load") if algorithm(family.common) == "fedavg"]
    for family in unequal:
        if (equal := family.members.get("equal J")) is not None:
            section.paragraphs.append(sweep("load", family, unequal, equal, Latex("equal $J$ under FedAvg")))
    caption = Latex("Algorithms under systems heterogeneity; gain over the ridge head, in points.")
    section.tables.append(families_table(caption, "algorithm", found))
    return section


def _rules(section: Section, arms: Arms) -> None:
    found = families([arm for arm in arms if masked(arm)], "mask-rule")
    found.sort(key=lambda family: heterogeneity(condition(family.common)))
    for family in found:
        ranked = sorted(family.members.values(), key=lambda arm: -accuracy(arm).mean if arm.test else 101.0)
        winner, second = ranked[:2]
        if not second.test:
            section.missing(Latex("the mask rules at equal density{}").fill(at(family, found)))
            continue
        pairs = {_rule(arm): difference(arm, winner) for arm in ranked[1:]}
        highest = Latex("{} has the highest mean, {}\\,\\%").fill(_rule(winner), tested(winner))
        section.paragraphs.append(
            Latex("{}{} {}").fill(lead(where(family, found)), sentence(highest), against(_rule(winner), pairs))
        )
        subject = Latex("{}{}").fill(_rule(winner), at(family, found))
        than = Latex("the next rule, {}").fill(_rule(second))
        section.claims.append(claim(subject, difference(winner, second), than))
        dense = twin(winner, arms, {"mask-rule": "none"}, also=MASK_KEYS)
        rows = [*ranked, *([] if dense is None else [dense])]
        names = [_rule(arm) if masked(arm) else "all weights" for arm in rows]
        caption = Latex("Mask rules at equal density{}; $\\Delta$ to the highest mean, paired, in points.")
        section.tables.append(arms_table(caption.fill(at(family, found)), rows, names, reference=winner))
    if not found:
        section.missing("which mask rule wins at equal density")


def _densities(section: Section, arms: Arms) -> None:
    found = families([arm for arm in arms if masked(arm)], "density")
    for family in found:
        least, *_, most = family.members
        dense = twin(family.members[most], arms, {"mask-rule": "none"}, also=MASK_KEYS)
        reference, name = (family.members[most], words("density", most)) if dense is None else (dense, "all weights")
        section.paragraphs.append(sweep("density", family, found, reference, name))
        subject = Latex("a mask of {}{}").fill(words("density", least), at(family, found))
        section.claims.append(claim(subject, difference(family.members[least], reference), name))
    _tabulate(section, "density", found, "densities")


def _calibration_rounds(section: Section, arms: Arms) -> None:
    found = families([arm for arm in arms if masked(arm)], "calibration-rounds")
    for family in found:
        least, *_, most = family.members
        name = words("calibration-rounds", least)
        section.paragraphs.append(sweep("calibration-rounds", family, found, family.members[least], name))
        subject = Latex("calibration in {}{}").fill(words("calibration-rounds", most), at(family, found))
        section.claims.append(claim(subject, difference(family.members[most], family.members[least]), name))
    _tabulate(section, "calibration-rounds", found, "calibration rounds")


def _tabulate(section: Section, key: str, found: list[Family], name: str) -> None:
    if not found:
        section.missing(f"what {name} do")
        return
    caption = Latex("Changing {}; gain over the ridge head, in points.").fill(name)
    section.tables.append(families_table(caption, key, found))


def _rule(arm: MeasuredArm) -> Latex:
    return words("mask-rule", arm.settings["mask-rule"])
