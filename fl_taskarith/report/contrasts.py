"""Arms that differ in one setting alone, and how far apart they are. Pure: no words, no files."""

import functools
from collections.abc import Collection, Mapping, Sequence
from math import nan, sqrt
from statistics import fmean
from typing import Any, Literal, NamedTuple

from fl_taskarith.config.fields import rules_by_heading
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS
from fl_taskarith.figures.statistics import NO_WIDTH, Paired, holm, paired, summarise
from fl_taskarith.report.conditions import CENTRALIZED, COMPOUND, IID, Value, condition, setting
from fl_taskarith.report.read_results import BySeed, Curves, MeasuredArm

# Settings of a run rather than of an arm, and those that change no result.
UNCOMPARED = OPERATIONAL_KEYS | CHOSEN_KEYS | {"evaluate-every", "threads", "device", "clients-at-once"}
MASK_KEYS = frozenset(rules_by_heading()["mask"])
WORK_KEYS = frozenset({"num-rounds", "warmup-rounds"})  # go with local-steps, so that rounds × J stays the same

Arms = Sequence[MeasuredArm]


class Family(NamedTuple):
    """The `members` of each value of a setting, in rising order, that agree on `common`: every other setting."""

    common: Mapping[str, Scalar]
    members: Mapping[Value, MeasuredArm]

    @property
    def masked(self) -> bool:
        """Whether the members update only a part of the weights."""
        return self.common["mask-rule"] != "none"


def find_families(arms: Arms, key: str, also: Collection[str] = ()) -> list[Family]:
    """Return every family of at least two arms that differ in the setting `key` alone, or in `also` with it.

    `key` may be one of COMPOUND: what several settings say together, such as "condition": iid, Nc = 1, ...
    """
    members_of: dict[frozenset[tuple[str, Scalar]], dict[Value, MeasuredArm]] = {}
    changing = {*(COMPOUND[key][1] if key in COMPOUND else {key}), *also}
    for arm in arms:
        common = frozenset(identity(arm, changing).items())
        members_of.setdefault(common, {}).setdefault(setting(arm.settings, key), arm)
    return [
        Family(dict(common), dict(sorted(members.items(), key=lambda item: _natural(item[0]))))
        for common, members in members_of.items()
        if len(members) > 1
    ]


def identity(arm: MeasuredArm, without: Collection[str] = ()) -> dict[str, Scalar]:
    """Return the settings that tell `arm` from others, less those in `without` and those that mean nothing to it."""
    left_out = {*UNCOMPARED, *without}
    if condition(arm.settings) in (IID, CENTRALIZED):
        left_out |= {"classes-per-client", "dirichlet-alpha"}
    return {key: value for key, value in arm.settings.items() if key not in left_out}


def agree(arm: MeasuredArm, other: MeasuredArm, free: Collection[str]) -> bool:
    """Return whether two arms have the same settings, but for those in `free`."""
    return identity(arm, free) == identity(other, free)


def distinct(arms: Arms) -> list[MeasuredArm]:
    """Return `arms` without those that stand in a second table, with the settings and results of an earlier one."""
    seen: dict[object, MeasuredArm] = {}
    for arm in arms:
        seen.setdefault((frozenset(identity(arm).items()), *arm.test.items(), *arm.states), arm)
    return list(seen.values())


def twin(arm: MeasuredArm, arms: Arms, changed: Mapping[str, Scalar], also: Collection[str] = ()) -> MeasuredArm | None:
    """Return the arm with the settings of `arm` but for `changed`; settings in `also` may differ too."""
    among = (other for other in arms if changed.items() <= other.settings.items())
    return next((other for other in among if agree(arm, other, {*changed, *also})), None)


def dense_twin(arm: MeasuredArm, arms: Arms) -> MeasuredArm | None:
    """Return the arm that trains all weights where `arm` trains masked ones, all else equal."""
    return twin(arm, arms, {"mask-rule": "none"}, also=MASK_KEYS)


@functools.cache  # for sentences and tables ask again and again
def difference(arm: MeasuredArm, reference: MeasuredArm) -> Paired:
    """Return the test accuracy of `arm` minus that of `reference`, in points, matched by seed."""
    return paired(arm.test, reference.test, arm.correct, reference.correct)


@functools.cache
def gain(arm: MeasuredArm) -> Paired:
    """Return the test accuracy after training minus that of the solved head before it, in points."""
    return paired(arm.test, arm.ridge, arm.correct, arm.head_correct)


def best_by_validation(arms: Arms) -> MeasuredArm | None:
    """Return the first of `ranked_by_validation`; None of none."""
    return next(iter(ranked_by_validation(arms)), None)


def ranked_by_validation(arms: Arms) -> list[MeasuredArm]:
    """Return the arms that have results, from the highest mean validation accuracy down; equals keep their order.

    An arm some of whose seeds diverged or failed comes after all whose seeds are there: its mean is one of survivors.
    One whose learning rate lies at the edge of its grid comes after the tuned ones.
    """
    measured = [arm for arm in arms if arm.val and arm.test]
    return sorted(measured, key=lambda arm: (bool(arm.ended_early), arm.edge, -fmean(arm.val.values())))


def best_by_strategy(arms: Arms) -> dict[str, MeasuredArm | None]:
    """Return the best arm by validation of every strategy; None where no arm of it has results."""
    names = dict.fromkeys(str(arm.settings["strategy"]) for arm in arms)
    return {name: best_by_validation([arm for arm in arms if arm.settings["strategy"] == name]) for name in names}


def verdict(pairs: Paired) -> Literal["higher", "lower", "undecided"]:
    """Return "higher" or "lower" where the 95 % interval excludes 0.

    It is "undecided" without an interval, too, and with one of no width: of seeds that all differ by the same number.
    """
    if not pairs.over or not pairs.has_width or pairs.low <= 0 <= pairs.high:
        return "undecided"
    return "higher" if pairs.mean > 0 else "lower"


def surviving_holm(pairs: Sequence[Paired]) -> int:
    """Return how many of the differences differ from 0 significantly when all are judged together, by Holm."""
    return sum(value <= 0.05 for value in holm([each.p for each in pairs]))


class Enough(NamedTuple):
    """The round from which on more training gains nothing that validation could show.

    Attributes:
        round, last: the earliest such round, and the last one.
        val: mean validation accuracy there. test: test accuracy there.
        lost: test accuracy of the last round minus that of `round`, matched by seed.
    """

    round: int
    last: int
    val: float
    test: BySeed
    lost: Paired


def enough_rounds(arm: MeasuredArm) -> Enough | None:
    """Return the first evaluated round whose mean validation accuracy is within one standard error of the best round's.

    The one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984, over rounds in place of
    models; the standard error is over seeds, so at least two are needed. None where curves are missing.
    """
    curves = arm.curves.get("val_percent", {})
    means = mean_course(curves)
    if len(curves) < 2 or len(means) < 2:
        return None
    best = max(means, key=lambda each: (means[each], -each))
    error = summarise([curve[best] for curve in curves.values()]).sd / sqrt(len(curves))
    first = next(each for each in means if means[each] >= means[best] - error)
    test, final = (
        {seed: curve[each] for seed, curve in arm.curves["test_percent"].items() if each in curve}
        for each in (first, max(means))
    )
    return Enough(first, max(means), means[first], test, paired(final, test))


def mean_course(curves: Curves) -> dict[int, float]:
    """Return the mean over seeds in every round from 1 on that all of them have, in rising order."""
    rounds = sorted(set.intersection(*map(set, curves.values()))) if curves else []
    return {each: fmean(curve[each] for curve in curves.values()) for each in rounds if each > 0}


class Reached(NamedTuple):
    """A round, and the megabytes (10⁶ bytes) that clients have sent up by then: a mean over seeds, NaN if unknown."""

    round: int
    megabytes: float


def first_reaching(arm: MeasuredArm, percent: float) -> Reached | None:
    """Return the first evaluated round whose mean validation accuracy is at least `percent`; None if there is none."""
    sent = mean_course(arm.curves.get("uplink_megabytes", {}))
    course = mean_course(arm.curves.get("val_percent", {}))
    return next((Reached(each, sent.get(each, nan)) for each in course if course[each] >= percent - NO_WIDTH), None)


def _natural(value: object) -> Any:
    """Sort numbers by size, then words by the alphabet; tuples by their first item."""
    if isinstance(value, tuple):
        return tuple(map(_natural, value))
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))
