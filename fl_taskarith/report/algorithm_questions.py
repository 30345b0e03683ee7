"""The questions on aggregation algorithms and on what helps against label skew: many arms, a table by condition."""

import dataclasses
from collections.abc import Mapping, Sequence
from math import isnan, nan
from types import MappingProxyType

from fl_taskarith.config.rule import Scalar
from fl_taskarith.report.contrasts import (
    VIRTUAL,
    difference,
    first_reaching,
    gain,
    identity,
    mean_course,
    trained,
)
from fl_taskarith.report.labels import algorithm, condition, heterogeneity, load, words
from fl_taskarith.report.latex import Latex, interval, join, not_run, number, source, tabular
from fl_taskarith.report.questions import Arms
from fl_taskarith.report.read_results import MeasuredArm
from fl_taskarith.report.wording import Section, Table, against, best_by_validation, claim, holm, lead, sentence, tested

Place = tuple[str, str]
"""How the data lie and what work clients do: (condition, load)."""

EQUAL = "equal J"
# What tells a method against label skew from its controls: any of these settings away from its default.
METHOD: Mapping[str, Scalar] = {
    "local-loss": "cross-entropy",
    "ridge-refresh": 0,
    "task-vector-bank": "off",
    "sampling": "random",
}


def strategies(arms: Arms) -> Section:
    """Every aggregation algorithm against FedAvg, by condition and by work."""
    section = Section("strategies", "Aggregation algorithms", "Which aggregation algorithm helps, and where?")
    cells = _by_place(arms)
    compared: dict[Place, dict[str, MeasuredArm]] = {}
    for place, members in cells.items():
        by_strategy = {
            str(name): best_by_validation([arm for arm in members if arm.settings.get("strategy") == name])
            for name in dict.fromkeys(arm.settings.get("strategy") for arm in members)
        }
        best = {name: arm for name, arm in by_strategy.items() if arm is not None}
        if "fedavg" in best and len(best) > 1:
            compared[place] = best
    if not compared:
        return section.missing("aggregation algorithms side by side")
    for place, best in compared.items():
        reference = best["fedavg"]
        pairs = {_name(arm): difference(arm, reference) for arm in best.values() if arm is not reference}
        stated = Latex("FedAvg ({}\\,\\%)").fill(tested(reference))
        section.paragraphs.append(Latex("{}{}").fill(lead(_words(place)), against(stated, pairs)))
    for work in dict.fromkeys(work for _, work in compared):  # claimed where the data are least alike
        place = max((each for each in compared if each[1] == work), key=lambda each: heterogeneity(each[0]))
        reference = compared[place]["fedavg"]
        for arm in compared[place].values():
            if arm.test != reference.test:  # FedNova under equal work is FedAvg
                subject = Latex("{} ({})").fill(_name(arm), _words(place))
                section.claims.append(claim(subject, difference(arm, reference), "FedAvg"))
    for work in dict.fromkeys(work for _, work in cells):
        alike = {place: members for place, members in cells.items() if place[1] == work}
        caption = Latex("Aggregation algorithms, {}: test accuracy in \\%.").fill(words("load", work))
        section.tables.append(_table(caption, alike))
    return section


def label_skew(arms: Arms) -> Section:
    """What works against label skew, against the ridge head alone and against the controls."""
    question = "Does fine-tuning gain over the ridge head at one class per client?"
    section = Section("extension", "Against label skew", question)
    cells = _by_place(arms)
    if not any(is_method(arm) for arm in arms):
        return section.missing("methods against label skew")
    hardest = max(cells, key=lambda place: heterogeneity(place[0]))
    method = best_by_validation([arm for arm in cells[hardest] if is_method(arm)])
    control = best_by_validation([arm for arm in cells[hardest] if not is_method(arm) and trained(arm)])
    if method is None:
        return section.missing("methods against label skew")
    subject = Latex("{} ({}, the method that validation chooses)").fill(source(method.label), _words(hardest))
    section.claims.append(claim(subject, gain(method), "the ridge head alone"))
    if control is not None:
        section.claims.append(claim(subject, difference(method, control), Latex("{}, the best control").fill(
            source(control.label))))  # fmt: skip
    gains = [pairs for arm in cells[hardest] if trained(arm) and (pairs := gain(arm)).n]
    text = Latex("{}Gains over the ridge head without training (Table~\\ref{tab:skew}): {}")
    section.paragraphs.append(text.fill(lead(_words(hardest)), holm(gains)))
    iid = cells.get(("iid", hardest[1]), [])
    if (kept := _kept(method, iid)) is not None:
        text = Latex("{} keeps {}\\,\\% of its accuracy on iid shards")
        section.paragraphs.append(sentence(text.fill(source(method.label), number(kept))))
    goal = nan if control is None else max(mean_course(control.test_curves).values(), default=nan)
    if control is not None and not isnan(goal):
        section.paragraphs.append(_race(method, control, goal))
    section.tables.append(_skew_table(cells, hardest, control, goal))
    return section


def _skew_table(
    cells: Mapping[Place, Sequence[MeasuredArm]], hardest: Place, control: MeasuredArm | None, goal: float
) -> Table:
    """Accuracy by place; how much of it is kept at the hardest one; what it takes there to get to `goal` (percent)."""
    iid = cells.get(("iid", hardest[1]), [])
    place = _words(hardest)
    caption = Latex("Against label skew, and controls: test accuracy in \\%; gain over the ridge head at {}, points")
    caption = caption.fill(place)
    header = [Latex("gain [95\\,\\% CI]")]
    columns = {arm.label: [interval(pairs) if (pairs := gain(arm)).n else not_run()] for arm in cells[hardest]}
    if iid and hardest[0] != "iid":
        caption = Latex("{}; kept: the share of the accuracy on iid shards that is left at {}").fill(caption, place)
        header.append(Latex("kept, \\%"))
        for arm in cells[hardest]:
            kept = _kept(arm, iid)
            columns[arm.label].append(Latex("--") if kept is None else number(kept))
    if control is not None and not isnan(goal):
        caption = Latex("{}; rounds and MB that clients send up at {} until the best accuracy of {}, {}\\,\\%").fill(
            caption, place, source(control.label), number(goal)
        )
        header += [Latex("rounds"), Latex("MB")]
        for arm in cells[hardest]:
            reached = first_reaching(arm, goal)
            columns[arm.label] += (
                [Latex("--"), Latex("--")] if reached is None else [Latex(str(reached[0])), number(reached[1], 1)]
            )
    table = _table(Latex("{}.\\label{tab:skew}").fill(caption), cells, header, columns)
    return dataclasses.replace(table, wide=True)


def _kept(arm: MeasuredArm, iid: Sequence[MeasuredArm]) -> float | None:
    """Mean test accuracy in percent of that of the same settings over iid clients, over the seeds that both have.

    None where there is none.
    """
    alike = identity(arm, VIRTUAL["condition"])
    for other in iid:
        seeds = arm.test.keys() & other.test.keys()
        if seeds and identity(other, VIRTUAL["condition"]) == alike:
            return 100 * sum(arm.test[seed] for seed in seeds) / sum(other.test[seed] for seed in seeds)
    return None


def _race(method: MeasuredArm, control: MeasuredArm, best: float) -> Latex:
    """When `method` is where `control` gets to at its best: rounds, and megabytes that clients send."""
    needed = first_reaching(control, best)
    assert needed is not None
    goal = Latex("the best accuracy of {} ({}\\,\\%, after {} rounds and {}~MB sent up)").fill(
        source(control.label), number(best), str(needed[0]), number(needed[1], 1)
    )
    reached = first_reaching(method, best)
    if reached is None:
        return sentence(Latex("{} does not get to {}").fill(source(method.label), goal))
    return sentence(Latex("{} has {} after {} rounds and {}~MB").fill(
        source(method.label), goal, str(reached[0]), number(reached[1], 1)))  # fmt: skip


def _by_place(arms: Arms) -> dict[Place, list[MeasuredArm]]:
    """Federated arms by condition and work, from the least heterogeneous and from equal work on."""
    cells: dict[Place, list[MeasuredArm]] = {}
    for arm in arms:
        place = condition(arm.settings), load(arm.settings)
        if place[0] not in ("", "centralized"):
            cells.setdefault(place, []).append(arm)
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][1] != EQUAL, cell[0][1], heterogeneity(cell[0][0]))))


def is_method(arm: MeasuredArm) -> bool:
    """Whether it does anything against label skew that its controls do not."""
    ours = arm.settings.get("strategy") == "gram-anchored"
    return ours or any(arm.settings.get(key, default) != default for key, default in METHOD.items())


def is_fine_tuning(arm: MeasuredArm) -> bool:
    """Whether it trains weights of the backbone and is no method against label skew, which are told by themselves."""
    return trained(arm) and arm.settings.get("trainable") != "head" and not is_method(arm)


def _table(
    caption: Latex,
    cells: Mapping[Place, Sequence[MeasuredArm]],
    header: Sequence[Latex] = (),
    columns: Mapping[str, Sequence[Latex]] = MappingProxyType({}),
) -> Table:
    """A row per label, a column per place, then `header` with the cells that `columns` has by label."""
    labels = list(dict.fromkeys(arm.label for members in cells.values() for arm in members))
    rows = []
    for label in labels:
        found = {place: arm for place, members in cells.items() for arm in members if arm.label == label}
        row: list[object] = [source(label)]
        for place in cells:
            arm = found.get(place)
            row.append(Latex("--") if arm is None else tested(arm) if arm.states else not_run())
        rows.append([*row, *columns.get(label, [Latex("--")] * len(header))])
    return Table(caption, tabular(["", *(words("condition", place[0]) for place in cells), *header], rows))


def _words(place: Place) -> Latex:
    parts = [words("condition", place[0])]
    if place[1] not in ("", EQUAL):
        parts.append(words("load", place[1]))
    return join(parts)


def _name(arm: MeasuredArm) -> Latex:
    return words("algorithm", algorithm(arm.settings))
