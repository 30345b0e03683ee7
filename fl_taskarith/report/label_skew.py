"""The questions on aggregation algorithms and on what helps against label skew: many arms, a table by condition."""

from collections.abc import Mapping
from math import isnan, nan
from statistics import fmean

from fl_taskarith.config.rule import Scalar
from fl_taskarith.figures.statistics import share_of_gain
from fl_taskarith.report.conditions import EQUAL, IID, Condition, condition, load, setting, words
from fl_taskarith.report.contrasts import (
    Arms,
    best_by_strategy,
    best_by_validation,
    difference,
    first_reaching,
    gain,
    mean_course,
)
from fl_taskarith.report.latex import Latex, escape, listed
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.sentences import Compared, Section, say

Place = tuple[str, Condition]
"""What work clients do, and how the data lie: (load, condition)."""

WORK = ("num-rounds", "local-steps", "participation")
# What tells a method against label skew from its controls: any of these settings away from its default.
METHOD: Mapping[str, Scalar] = {
    "local-loss": "cross-entropy",
    "ridge-refresh": 0,
    "task-vector-bank": "off",
    "sampling": "random",
}


def is_method(arm: MeasuredArm) -> bool:
    """Return whether the arm does anything against label skew that its controls do not."""
    return arm.settings["strategy"] == "gram-anchored" or any(arm.settings[key] != METHOD[key] for key in METHOD)


def is_fine_tuning(arm: MeasuredArm) -> bool:
    """Return whether the arm trains weights of the backbone, and by no method against label skew."""
    return arm.trained and arm.settings["trainable"] != "head" and not is_method(arm)


def strategies(section: Section, arms: Arms) -> None:
    """Compare every aggregation algorithm with FedAvg, by condition and by work."""
    cells = _by_place(arms)
    best_at: dict[Place, dict[str, MeasuredArm]] = {}
    for place, members in cells.items():
        measured = {name: arm for name, arm in best_by_strategy(members).items() if arm is not None}
        if "fedavg" in measured and len(measured) > 1:
            best_at[place] = measured
    if not best_at:
        return section.missing("strategies")
    groups = []
    for place, best in best_at.items():
        rows = sorted(cells[place], key=lambda arm: arm is not best["fedavg"])
        groups.append(Compared(_words(place), [(escape(arm.label), arm) for arm in rows], best["fedavg"]))
    table = section.compare("strategies", groups)
    for work in dict.fromkeys(work for work, _ in best_at):  # claimed where the data are least alike
        place = max(each for each in best_at if each[0] == work)
        reference = best_at[place]["fedavg"]
        # FedNova under equal work is FedAvg
        arm = best_by_validation([each for each in best_at[place].values() if each.test != reference.test])
        if arm is not None:
            subject = say("at", _name(arm), listed(_words(place), say("on_validation")))
            section.claim(subject, difference(arm, reference), _name(reference), [arm, reference], table)


def label_skew(section: Section, arms: Arms) -> None:
    """Compare what works against label skew with the ridge head alone and with the controls."""
    cells = _by_place(arms)
    hardest = max(cells, key=lambda place: place[1], default=None)
    if hardest is None or not any(map(is_method, arms)):
        return section.missing("extension")
    place, there = _words(hardest), cells[hardest]
    method = best_by_validation([arm for arm in there if is_method(arm)])
    control = best_by_validation([arm for arm in there if not is_method(arm) and arm.trained])
    if method is None:
        return section.missing("extension")
    subject = say("chosen_method", method, place)
    table = say("table_label", section.name, 1)
    section.claim(subject, gain(method), say("ridge_head", [method]), [method], table)
    if control is not None:
        section.claim(subject, difference(method, control), say("best_control", control), [method, control], table)
    tuned = [arm for arm in there if arm.trained and not arm.edge]
    section.say("skew_gains", place, [pairs for arm in tuned if (pairs := gain(arm)).over], table)
    iid = cells.get((hardest[0], IID), []) if hardest[1] != IID else []
    best = _best_iid(method, iid)
    if best is not None and not method.edge and not isnan(share := share_of_gain(gain(method), gain(best))):
        section.say("share_of_gain", method, best, share, 100 * _mean(method) / _mean(best))
    goal = nan
    if control is not None and not control.edge and (course := mean_course(control.curves.get("val_percent", {}))):
        goal = max(course.values())
        method_at, control_at = first_reaching(method, goal), first_reaching(control, goal)
        if not method.edge:
            section.say("race", method, method_at, control, control_at, goal)
    by_label = {arm.label: arm for arm in there}
    rows = [
        (
            label,
            members,
            arm,
            share_of_gain(gain(arm), gain(best)) if arm and best else nan,
            arm and first_reaching(arm, goal),
        )
        for label, members in _rows(cells).items()
        for arm in [by_label.get(label)]
    ]
    with_share, with_race = best is not None, not isnan(goal)
    caption = say("skew_caption", place, best, control if with_race else None, goal)
    places = [words("condition", each) for _, each in cells]
    section.lay_out(caption, "skew_table", places, rows, with_share, with_race, wide=True)
    section.name_lost([(_words(at), arm.label, arm) for at, arms in cells.items() for arm in arms])


def _best_iid(arm: MeasuredArm, iid: Arms) -> MeasuredArm | None:
    """Return the tuned arm over iid clients that validation ranks first among those of as much work as `arm`."""
    tuned = [each for each in iid if each.trained and not each.edge]
    return best_by_validation([each for each in tuned if all(each.settings[key] == arm.settings[key] for key in WORK)])


def _mean(arm: MeasuredArm) -> float:
    return fmean(arm.test.values())


def _by_place(arms: Arms) -> dict[Place, list[MeasuredArm]]:
    """Return the federated arms by work and condition, from equal work and from the least heterogeneous on."""
    cells: dict[Place, list[MeasuredArm]] = {}
    for arm in arms:
        if arm.federated:
            cells.setdefault((load(arm.settings) or EQUAL, condition(arm.settings)), []).append(arm)
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][0] != EQUAL, cell[0])))


def _rows(cells: Mapping[Place, Arms]) -> dict[str, list[MeasuredArm | None]]:
    """Return the arm of every place, or None, by label."""
    by_label = [{arm.label: arm for arm in members} for members in cells.values()]
    labels = dict.fromkeys(arm.label for members in cells.values() for arm in members)
    return {label: [members.get(label) for members in by_label] for label in labels}


def _words(place: Place) -> Latex:
    return listed(words("condition", place[1]), "" if place[0] == EQUAL else words("load", place[0]))


def _name(arm: MeasuredArm) -> Latex:
    return words("algorithm", setting(arm.settings, "algorithm"))
