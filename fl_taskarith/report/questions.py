"""The questions of the study on whole models, each answered from the arms that can answer it."""

from collections.abc import Sequence

from fl_taskarith.report.contrasts import (
    MASK_KEYS,
    VIRTUAL,
    WORK_KEYS,
    Family,
    accuracy,
    difference,
    enough_rounds,
    families,
    gain,
    identity,
    masked,
    twin,
    validation,
)
from fl_taskarith.report.labels import condition, heterogeneity, setting, words
from fl_taskarith.report.latex import Latex, interval, not_run, number, spread, tabular
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.wording import (
    Claim,
    Section,
    Status,
    Table,
    against,
    arm_words,
    arms_table,
    at,
    best_by_validation,
    claim,
    lead,
    pooled_sweep,
    rate,
    sweep,
    tested,
    where,
)

Arms = Sequence[MeasuredArm]
BASELINES = ("constant", "none", 0.0)  # of a schedule, a mask, a weight decay: what the others are compared with


def centralized(arms: Arms) -> Section:
    """Schedules, weight decay, and how many epochs are enough."""
    section = Section(
        "centralized", "Centralized training", "Which schedule and weight decay, and how many epochs are enough?"
    )
    chosen = [arm for arm in arms if arm.settings.get("strategy") == "centralized" and not masked(arm)]
    best = best_by_validation(chosen)
    if best is None:
        return section.missing("centralized training: schedules, weight decay, epochs")
    varying = [
        key for key in ("schedule", "weight-decay", "num-rounds") if len({arm.settings.get(key) for arm in chosen}) > 1
    ]
    names = [arm_words(arm, varying) for arm in chosen]
    section.paragraphs.append(
        Latex("Validation chooses {} at $\\eta$~=~{} ({}\\,\\% on validation): {}\\,\\% on test (n~=~{}).").fill(
            arm_words(best, varying), rate(best), spread(validation(best)), tested(best), accuracy(best).n
        )
    )
    for key in ("schedule", "weight-decay"):
        for family in (found := families(chosen, key)):
            first = next((value for value in family.members if value in BASELINES), next(iter(family.members)))
            section.paragraphs.append(sweep(key, family, found, family.members[first], words(key, first)))
    section.tables.append(
        arms_table(Latex("Centralized training; gain over the ridge head, in points."), chosen, names)
    )
    _epochs(section, chosen, best)
    return section


def _epochs(section: Section, arms: Arms, best: MeasuredArm) -> None:
    """From the courses of the best arm; where there are none, from arms that differ in their number of epochs."""
    enough = enough_rounds(best)
    if enough is not None:
        text = Latex(
            "{} of {} epochs are enough by the one-standard-error rule: mean validation accuracy is then {}\\,\\% and "
            "test accuracy {}\\,\\%; the epochs after them change it by {} points (n~=~{})"
        ).fill(enough.round, enough.last, number(enough.val), spread(enough.test), interval(enough.lost), enough.lost.n)
        if enough.round == enough.last:
            text = Latex("{} epochs are not known to be enough: validation accuracy still rises at the last one").fill(
                enough.last
            )
        section.claims.append(Claim(text, Status.TOLD if enough.round < enough.last else Status.UNDECIDED))
        return
    found = families(arms, "num-rounds")
    if not found:
        section.missing("how many epochs are enough")
    for family in found:
        *shorter, longest = family.members
        pairs = {
            words("num-rounds", each): difference(family.members[each], family.members[longest]) for each in shorter
        }
        section.paragraphs.append(against(Latex("{} epochs").fill(longest), pairs))
        section.claims.append(
            claim(
                Latex("training for {} epochs").fill(shorter[-1]),
                pairs[words("num-rounds", shorter[-1])],
                Latex("for {}").fill(longest),
            )
        )


def fedavg_iid(arms: Arms, everything: Arms) -> Section:
    """FedAvg on iid shards, against the ridge head and centralized training."""
    section = Section("fedavg-iid", "Federated averaging on iid data", "What does federation alone cost?")
    chosen = [arm for arm in arms if condition(arm.settings) == "iid" and not masked(arm)
              and arm.settings.get("strategy", "fedavg") == "fedavg"]  # fmt: skip
    best = best_by_validation(chosen)
    if best is None:
        return section.missing("FedAvg on iid shards")
    section.paragraphs.append(
        Latex("FedAvg reaches {}\\,\\% on test (n~=~{}) at $\\eta$~=~{}.").fill(
            tested(best), accuracy(best).n, rate(best)
        )
    )
    section.claims.append(claim("FedAvg on iid shards", gain(best), "the ridge head alone"))
    pooled = best_by_validation(
        [arm for arm in everything if condition(arm.settings) == "centralized" and not masked(arm)]
    )
    if pooled is None:
        return section.missing("centralized training, to compare FedAvg on iid shards with")
    section.claims.append(claim("FedAvg on iid shards", difference(best, pooled), "centralized training"))
    return section


def heterogeneous(arms: Arms) -> Section:
    """What non-iid data cost, and whether more local work hurts."""
    section = Section(
        "heterogeneity", "Non-iid data and local work", "What do non-iid data cost, and does more local work hurt?"
    )
    federated = [arm for arm in arms if condition(arm.settings) not in ("", "centralized")]
    _cost(section, federated)
    _local_work(section, federated)
    conditions = sorted({condition(arm.settings) for arm in federated}, key=heterogeneity)
    steps = sorted({arm.settings["local-steps"] for arm in federated if "local-steps" in arm.settings}, key=_number)
    varied = {*VIRTUAL["condition"], "local-steps", *WORK_KEYS}
    for rule in dict.fromkeys(arm.settings.get("mask-rule") for arm in federated):
        of_rule = [arm for arm in federated if arm.settings.get("mask-rule") == rule]
        cells = {
            (condition(arm.settings), arm.settings.get("local-steps")): tested(arm)
            for arm in reversed(of_rule)
            if identity(arm, varied) == identity(of_rule[0], varied)  # another algorithm would stand in a gap unnoticed
        }
        shown = [each for each in steps if any((name, each) in cells for name in conditions)]
        if len(cells) > 1:
            rows = [[words("condition", name), *(cells.get((name, each), Latex("--")) for each in shown)]
                    for name in conditions]  # fmt: skip
            caption = Latex("Test accuracy in \\%, {}; rows: division of the data, columns: local steps.").fill(
                words("mask-rule", rule) if rule is not None else "as labelled"
            )
            header = ["", *(words("local-steps", each) for each in shown)]
            section.tables.append(Table(caption, tabular(header, rows)))
    return section


def _cost(section: Section, arms: Arms) -> None:
    found = [family for family in families(arms, "condition", order=lambda name: heterogeneity(str(name)))
             if "iid" in family.members]  # fmt: skip
    if not found:
        section.missing("what non-iid data cost")
    for family in sorted(found, key=lambda each: _number(each.common.get("local-steps", 0))):
        reference = family.members["iid"]
        pairs = {words("condition", name): difference(arm, reference)
                 for name, arm in family.members.items() if name != "iid"}  # fmt: skip
        section.paragraphs.append(Latex("{}{}").fill(lead(where(family, found)), against("iid shards", pairs)))
        if family is min(found, key=lambda each: _number(each.common.get("local-steps", 0))):
            hardest, pair = list(pairs.items())[-1]
            subject = Latex("training at {}{}").fill(hardest, at(family, found))
            section.claims.append(claim(subject, pair, "on iid shards"))


def _local_work(section: Section, arms: Arms) -> None:
    found = families(arms, "local-steps", WORK_KEYS)
    if not found:
        section.missing("whether more local work hurts")
        return
    found.sort(key=lambda family: (heterogeneity(condition(family.common)), not _is_masked(family)))
    work = "equal" if all(map(_equal_work, found)) else "unequal"
    for rule in dict.fromkeys(family.common.get("mask-rule") for family in found):
        alike = [family for family in found if family.common.get("mask-rule") == rule]
        place = Latex(", {}").fill(words("mask-rule", rule)) if rule is not None and len(alike) < len(found) else ""
        section.paragraphs.append(
            Latex("\\emph{More local steps per round{}}, at {} numbers of steps in all. {}").fill(
                place, work, pooled_sweep("local-steps", alike)
            )
        )
    hardest = found[-1]
    least, *_, most = hardest.members
    apart = difference(hardest.members[most], hardest.members[least])
    subject = Latex("{}{}").fill(words("local-steps", most), at(hardest, found))
    section.claims.append(claim(subject, apart, words("local-steps", least)))


def six_models(arms: Arms) -> Section:
    """Centralized, iid and non-iid, each with all weights and with the masked ones."""
    section = Section("six-models", "Six models", "What does training only the masked weights change?")
    sparse = [arm for arm in arms if masked(arm)]
    pairs: dict[Latex, MeasuredArm] = {}
    rows: list[list[object]] = []
    for arm in sorted(sparse, key=lambda each: heterogeneity(condition(each.settings))):
        dense = twin(arm, arms, {"mask-rule": "none"}, also=MASK_KEYS)
        name = words("condition", condition(arm.settings))
        if dense is None or name in pairs:
            continue
        pairs[name] = arm
        apart = difference(arm, dense)
        rows.append([name, tested(dense), tested(arm), interval(apart) if apart.n else not_run()])
        section.claims.append(claim(Latex("masked training ({})").fill(name), apart, "training all weights"))
    if not rows:
        return section.missing("the six models")
    header = ["", Latex(r"all, \%"), Latex(r"masked, \%"), Latex(r"$\Delta$ [95\,\% CI]")]
    caption = Latex("Test accuracy with all weights trained and with the masked ones; $\\Delta$ in points, paired.")
    section.tables.append(Table(caption, tabular(header, rows)))
    return section


def participation(arms: Arms) -> Section:
    """The share of clients per round, and their number."""
    section = Section(
        "participation", "Participation and scale", "What do more clients per round, and more clients, change?"
    )
    federated = [arm for arm in arms if condition(arm.settings) not in ("", "centralized")]
    shown: list[MeasuredArm] = []
    for key, other, subject in (
        ("participation", "num-clients", "the share of clients per round"),
        ("num-clients", "participation", "the number of clients"),
    ):
        found = families(federated, key)
        if not found:
            section.missing(subject)
            continue
        shown += [arm for family in found for arm in family.members.values() if arm not in shown]
        if all(len(family.members) == 2 and list(family.members) == list(found[0].members) for family in found):
            section.paragraphs.append(pooled_sweep(key, found))
        else:
            for family in found:
                least = next(iter(family.members))
                section.paragraphs.append(sweep(key, family, found, family.members[least], words(key, least)))
        # Claimed for all weights, the least alike data, and the largest federation or share.
        family = max(found, key=lambda each: (not _is_masked(each), heterogeneity(condition(each.common)),
                                              _number(each.common.get(other, 0))))  # fmt: skip
        least, *_, most = family.members
        text = Latex("{}{}").fill(words(key, most), at(family, found))
        section.claims.append(claim(text, difference(family.members[most], family.members[least]), words(key, least)))
    if shown:
        keys = ("mask-rule", "condition", "num-clients", "participation")
        varying = [key for key in keys if len({setting(arm.settings, key) for arm in shown}) > 1]
        caption = Latex("Clients per round and in all; gain over the ridge head, in points.")
        section.tables.append(arms_table(caption, shown, [arm_words(arm, varying) for arm in shown]))
    return section


def _is_masked(family: Family) -> bool:
    return family.common.get("mask-rule", "none") != "none"


def _equal_work(family: Family) -> bool:
    """Whether J times the rounds is the same for every arm, as far as the settings tell."""
    work = {_number(value) * _number(arm.settings.get("num-rounds", 0)) for value, arm in family.members.items()}
    return len(work) == 1


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
