"""The questions on aggregation algorithms and on what helps against label skew: many arms, a table by condition."""

from collections.abc import Mapping, Sequence

from fl_taskarith.config_rule import Scalar
from fl_taskarith.report.comparisons import VIRTUAL, accuracy, difference, gain, identity
from fl_taskarith.report.labels import algorithm, condition, heterogeneity, load, words
from fl_taskarith.report.latex import Latex, join, not_run, number, source, tabular
from fl_taskarith.report.questions import Arms
from fl_taskarith.report.results import MeasuredArm
from fl_taskarith.report.wording import Section, Table, against, best_by_validation, claim, lead, tested

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
    if not any(_is_method(arm) for arm in arms):
        return section.missing("methods against label skew")
    hardest = max(cells, key=lambda place: heterogeneity(place[0]))
    method = best_by_validation([arm for arm in cells[hardest] if _is_method(arm)])
    control = best_by_validation([arm for arm in cells[hardest] if not _is_method(arm) and arm.rate != 0.0])
    if method is None:
        return section.missing("methods against label skew")
    subject = Latex("{} ({}, the method that validation chooses)").fill(source(method.label), _words(hardest))
    section.claims.append(claim(subject, gain(method), "the ridge head alone"))
    if control is not None:
        section.claims.append(claim(subject, difference(method, control), Latex("{}, the best control").fill(
            source(control.label))))  # fmt: skip
    pairs = {source(arm.label): gain(arm) for arm in cells[hardest] if arm.rate != 0.0}
    section.paragraphs.append(
        Latex("{}{}").fill(lead(_words(hardest)), against("the ridge head without training", pairs))
    )
    elsewhere = cells.get(("iid", hardest[1]), [])
    alike = identity(method, VIRTUAL["condition"])
    iid = [arm for arm in elsewhere if identity(arm, VIRTUAL["condition"]) == alike and arm.test]
    if iid:
        kept = 100 * accuracy(method).mean / accuracy(iid[0]).mean
        text = Latex("{} keeps {}\\,\\% of its accuracy on iid shards.")
        section.paragraphs.append(text.fill(source(method.label), number(kept)))
    section.tables.append(_table(Latex("Against label skew, and controls: test accuracy in \\%."), cells))
    return section


def _by_place(arms: Arms) -> dict[Place, list[MeasuredArm]]:
    """Federated arms by condition and work, from the least heterogeneous and from equal work on."""
    cells: dict[Place, list[MeasuredArm]] = {}
    for arm in arms:
        place = condition(arm.settings), load(arm.settings)
        if place[0] not in ("", "centralized"):
            cells.setdefault(place, []).append(arm)
    return dict(sorted(cells.items(), key=lambda cell: (cell[0][1] != EQUAL, cell[0][1], heterogeneity(cell[0][0]))))


def _is_method(arm: MeasuredArm) -> bool:
    ours = arm.settings.get("strategy") == "gram-anchored"
    return ours or any(arm.settings.get(key, default) != default for key, default in METHOD.items())


def _table(caption: Latex, cells: Mapping[Place, Sequence[MeasuredArm]]) -> Table:
    """A row per label, a column per place."""
    labels = list(dict.fromkeys(arm.label for members in cells.values() for arm in members))
    rows = []
    for label in labels:
        found = {place: arm for place, members in cells.items() for arm in members if arm.label == label}
        row: list[object] = [source(label)]
        for place in cells:
            arm = found.get(place)
            row.append(Latex("--") if arm is None else tested(arm) if arm.states else not_run())
        rows.append(row)
    return Table(caption, tabular(["", *(words("condition", place[0]) for place in cells)], rows))


def _words(place: Place) -> Latex:
    parts = [words("condition", place[0])]
    if place[1] not in ("", EQUAL):
        parts.append(words("load", place[1]))
    return join(parts)


def _name(arm: MeasuredArm) -> Latex:
    return words("algorithm", algorithm(arm.settings))
