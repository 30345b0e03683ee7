"""Sentences whose wording follows from the numbers by rule. A difference is only told where its interval excludes 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fl_taskarith.figures.statistics import Paired
from fl_taskarith.report.contrasts import (
    Family,
    Verdict,
    accuracy,
    difference,
    gain,
    surviving_holm,
    validation,
    verdict,
)
from fl_taskarith.report.labels import setting, words
from fl_taskarith.report.latex import Latex, interval, join, not_run, number, plain, source, spread, tabular
from fl_taskarith.report.read_results import MeasuredArm

POINTS = Latex("{} points (n~=~{})")
# What may tell one family of a question from another, in the order it is told.
PLACE = (
    "condition", "mask-rule", "density", "calibration-rounds", "strategy", "local-steps", "load",
    "num-clients", "participation", "num-rounds", "schedule", "weight-decay",
)  # fmt: skip


class Status(Enum):
    """What became of a question."""

    TOLD = "told"
    UNDECIDED = "undecided"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """One answer. `detail` is left out of the abstract; the conclusion lists `open_question` where nothing is told."""

    text: Latex
    status: Status
    detail: Latex = Latex()  # noqa: RUF009 (a string)
    open_question: Latex = Latex()  # noqa: RUF009 (a string)


@dataclass(frozen=True)
class Table:
    """A floating table; a `wide` one spans both columns."""

    caption: Latex
    body: Latex
    wide: bool = False


@dataclass
class Section:
    """The answer to a question of the study: claims first, then the paragraphs and tables they rest on."""

    name: str
    title: str
    question: str
    paragraphs: list[Latex] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def missing(self, what: str) -> "Section":
        """Say visibly that `what` was not run."""
        self.claims.append(Claim(not_run(what), Status.NOT_RUN))
        return self


def points(pairs: Paired) -> Latex:
    """A difference with its interval, unit and n."""
    return POINTS.fill(interval(pairs), pairs.n) if pairs.n else not_run()


def claim(subject: object, pairs: Paired, than: object) -> Claim:
    """ "SUBJECT is more accurate than THAN: +1.39 [+0.19, +2.58] points (n = 3)", as far as the data tell."""
    if not pairs.n:
        return Claim(Latex("{}, against {}: {}").fill(subject, than, not_run()), Status.NOT_RUN)
    found = verdict(pairs)
    if found is Verdict.UNDECIDED:
        question = Latex("whether {} is more or less accurate than {}").fill(subject, than)
        text = Latex("the data cannot tell {}: {}").fill(question, points(pairs))
        return Claim(text, Status.UNDECIDED, _why(pairs), question)
    told = "more" if found is Verdict.HIGHER else "less"
    return Claim(Latex("{} is {} accurate than {}: {}").fill(subject, told, than, points(pairs)), Status.TOLD)


def against(reference: object, pairs: Mapping[Latex, Paired]) -> Latex:
    """One paragraph on several differences to one reference: what is higher, what is lower, what cannot be told."""
    sentences = []
    for found, phrase in (
        (Verdict.HIGHER, Latex("Higher: {}.")),
        (Verdict.LOWER, Latex("Lower: {}.")),
        (Verdict.UNDECIDED, Latex("The data cannot tell: {}.")),
    ):
        members = [Latex("{} ({})").fill(name, interval(each)) for name, each in pairs.items()
                   if each.n and verdict(each) is found]  # fmt: skip
        if members:
            sentences.append(phrase.fill(join(members, "; ")))
    measured = [each for each in pairs.values() if each.n]
    if len(measured) > 1:
        sentences.append(holm(measured))
    if absent := [name for name, each in pairs.items() if not each.n]:
        sentences.append(Latex("{}.").fill(not_run(join(absent))))
    counts = sorted({each.n for each in measured})
    seeds = Latex(", n~=~{}").fill(_range(counts)) if counts else Latex()
    return Latex("Against {} (points{}): {}").fill(reference, seeds, _small(join(sentences, " ")))


def holm(pairs: Sequence[Paired]) -> Latex:
    """How many differences stay when they are judged together."""
    told = sum(verdict(each) is not Verdict.UNDECIDED for each in pairs)
    return Latex("Of {} intervals, {} exclude{} 0; judged together (Holm), {} do{}.").fill(
        len(pairs), told, "s" if told == 1 else "", (kept := surviving_holm(pairs)), "es" if kept == 1 else ""
    )


def arm_words(arm: MeasuredArm, varying: Sequence[str]) -> Latex:
    """The settings of `arm` that are named, in symbols; its label where none of them is known."""
    named = []
    for key in varying:
        value = setting(arm.settings, key)
        if value is not None and value != "":
            named.append(words(key, value))
    return join(named) if named else source(arm.label)


def where(family: Family, among: Sequence[Family]) -> Latex:
    """What tells a family from the others, for example "iid, dense"; empty where it is the only one."""
    keys = [key for key in PLACE if len({setting(each.common, key) for each in among}) > 1]
    if "local-steps" in keys and "num-rounds" in keys:  # which follow from J where the work is equal
        keys.remove("num-rounds")
    return join([words(key, value) for key in keys if (value := setting(family.common, key)) not in ("", None)])


def at(family: Family, among: Sequence[Family]) -> Latex:
    """The same in parentheses."""
    place = where(family, among)
    return Latex(" ({})").fill(place) if place else Latex()


def lead(place: Latex) -> Latex:
    """The place as the beginning of a paragraph."""
    return Latex(r"\emph{{}}: ").fill(place) if place else Latex()


def sweep(key: str, family: Family, among: Sequence[Family], reference: MeasuredArm, name: object) -> Latex:
    """One paragraph: every arm of the family against `reference`, which may be a member of it."""
    pairs = {words(key, value): difference(arm, reference)
             for value, arm in family.members.items() if arm is not reference}  # fmt: skip
    stated = (
        Latex("{} ({}\\,\\%)").fill(name, tested(reference))
        if reference.test
        else Latex("{} ({})").fill(name, not_run())
    )
    return Latex("{}{}").fill(lead(where(family, among)), against(stated, pairs))


def pooled_sweep(key: str, found: Sequence[Family]) -> Latex:
    """One paragraph for all families, whose least value of `key` is the same: every other value against it."""
    least = next(iter(found[0].members))
    pairs = {}
    for family in found:
        place = where(family, found)
        (_, reference), *others = family.members.items()
        for value, arm in others:
            pairs[join([words(key, value), *([place] if place else [])])] = difference(arm, reference)
    return against(words(key, least), pairs)


def families_table(caption: Latex, key: str, found: Sequence[Family]) -> Table:
    """A row per arm of every family, named by its value of `key` and by what tells its family from the others."""
    rows = [(arm, Latex("{}{}").fill(words(key, value), at(family, found)))
            for family in found for value, arm in family.members.items()]  # fmt: skip
    return arms_table(caption, [arm for arm, _ in rows], [name for _, name in rows])


def arms_table(
    caption: Latex,
    arms: Sequence[MeasuredArm],
    names: Sequence[object],
    reference: MeasuredArm | None = None,
) -> Table:
    """A row per arm: learning rate, test accuracy, n, and the difference to `reference` or the gain over the head."""
    rows: list[list[object]] = []
    for arm, name in zip(arms, names, strict=True):
        pairs = gain(arm) if reference is None else difference(arm, reference)
        last: object = Latex("--") if arm is reference or not pairs.n else interval(pairs)
        rows.append([name, rate(arm), tested(arm), accuracy(arm).n, last])
    header = ["", Latex(r"$\eta$"), Latex(r"test \%"), Latex("n"),
              Latex(r"$\Delta$ [95\,\% CI]") if reference is not None else Latex(r"gain [95\,\% CI]")]  # fmt: skip
    return Table(caption, tabular(header, rows))


def rate(arm: MeasuredArm) -> Latex:
    """The learning rate, marked where its search ended at an edge of the grid."""
    if arm.rate is None:
        return Latex("--")
    return Latex("{}{}").fill(plain(arm.rate), Latex(r"$^\dagger$") if arm.edge else "")


def tested(arm: MeasuredArm) -> Latex:
    """Test accuracy, mean ± sd; how its runs ended where none is done."""
    ended = _ended_early(arm)
    return source(join(sorted(ended))) if ended and not arm.test else spread(accuracy(arm))


def _ended_early(arm: MeasuredArm) -> set[str]:
    return {state for state in arm.states.values() if state in ("diverged", "failed")}


def best_by_validation(arms: Sequence[MeasuredArm]) -> MeasuredArm | None:
    """Choices are made on validation accuracy; ties go to the earlier arm.

    An arm some of whose seeds diverged or failed comes after all whose seeds are there: their mean is one of survivors.
    """
    measured = [arm for arm in arms if validation(arm).n and accuracy(arm).n]
    return max(measured, key=lambda arm: (not _ended_early(arm), validation(arm).mean), default=None)


def _why(pairs: Paired) -> Latex:
    if pairs.n < 2:
        return Latex("; one seed has no interval")
    if not pairs.sd > 1e-9:
        return Latex("; all seeds differ by the same number, so the interval has no width")
    return Latex("; a true difference of {} would be found with 80\\,\\% power").fill(number(pairs.detectable))


def sentence(text: Latex) -> Latex:
    """With a capital and a full stop."""
    return Latex(text[:1].upper() + text[1:] + ".")


def _small(text: Latex) -> Latex:
    """After a colon."""
    return Latex(text[:1].lower() + text[1:])


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
