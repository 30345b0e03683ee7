"""The contrasts that study files name beforehand: one family of tests in each study, told before all the rest."""

from collections.abc import Sequence

from fl_taskarith.figures.statistics import FEWEST, judge_family
from fl_taskarith.report.contrasts import difference
from fl_taskarith.report.latex import Latex, escape, listed
from fl_taskarith.report.read_results import MeasuredArm, StudyFolder
from fl_taskarith.report.sentences import Claim, Section, say


def primary(section: Section, studies: Sequence[StudyFolder]) -> None:
    """Tell of every study with primary contrasts what they show, as one family."""
    for study in studies:
        if not study.primary:
            continue
        pairs = [difference(*contrast) for contrast in study.primary]
        judged = judge_family(pairs, [arm.edge or against.edge for arm, against in study.primary])
        names = [(_name(arm, study), _name(against, study)) for arm, against in study.primary]
        rows = [(*name, each, p, verdict) for name, each, (p, verdict) in zip(names, pairs, judged, strict=True)]
        table = section.lay_out(say("primary_caption", escape(study.name)), "primary_table", rows)
        section.say("primary", table, [row[-1] for row in rows])
        for name, than, each, _, verdict in rows:
            finding, points = (say("primary_finding", name, than, each, verdict), say("points", each))
            if verdict in ("not run", "not tuned"):
                section.claims.append(Claim(finding, "not run"))
            elif verdict == "cannot tell":
                whether = say("whether", name, than)
                section.claims.append(Claim(finding, "undecided", points, say("undecided", each), whether, table))
            else:
                section.claims.append(Claim(finding, "told", points, table=table, headline=each.n >= FEWEST))


def _name(arm: MeasuredArm, study: StudyFolder) -> Latex:
    groups = {other.group for other in study.arms}
    return listed(arm.label, arm.group if len(groups) > 1 else "")
