"""Which arms differ in one setting alone, and how far apart they are. Pure: no words, no files."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import nan, sqrt
from statistics import fmean

from scipy.stats import t as student

from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import CHOSEN_KEYS, OPERATIONAL_KEYS
from fl_taskarith.figures.statistics import Paired, Summary, paired, summarise
from fl_taskarith.report.labels import condition, setting
from fl_taskarith.report.read_results import Curve, MeasuredArm

# Of a run, not of an arm; or without a say in what is compared.
UNCOMPARED = OPERATIONAL_KEYS | CHOSEN_KEYS | {"evaluate-every", "threads", "device", "clients-at-once"}
MASK_KEYS = frozenset(
    {"mask-rule", "density", "sensitivity-threshold", "calibration-rounds", "soft-zero", "mask-source", "mask-exclude"}
    | {"calibration-per-client", "fisher-labels", "fisher-score", "calibration-memory", "mask-file"}
)
VIRTUAL = {  # settings that say one thing together
    "condition": frozenset({"sharding", "classes-per-client", "dirichlet-alpha"}),
    "load": frozenset({"local-steps-min", "local-steps-max", "dropout"}),
    "algorithm": frozenset(
        {"strategy", "server-lr", "server-momentum", "server-beta1", "server-beta2", "server-tau", "proximal-mu"}
        | {"gma-threshold", "trimmed-share", "clipping-radius", "clipping-iterations", "clipping-start"}
    ),
}
WORK_KEYS = frozenset({"num-rounds", "warmup-rounds"})  # go with local-steps, so that rounds × J stays the same
NO_WIDTH = 1e-9  # points; below it the seeds' differences are the same number


class Verdict(Enum):
    """What a paired difference tells; UNDECIDED also for one seed, or seeds that all differ by the same."""

    HIGHER = 1
    LOWER = -1
    UNDECIDED = 0


@dataclass(frozen=True)
class Family:
    """Arms that agree on `common`, every setting but the varied one and those that go with it.

    Attributes:
        members: the arm of each value of the varied setting, in rising order.
    """

    common: Mapping[str, Scalar]
    members: Mapping[Scalar, MeasuredArm]


def families(
    arms: Sequence[MeasuredArm],
    key: str,
    also: Collection[str] = (),
    order: Callable[[Scalar], tuple[float, ...]] | None = None,
) -> list[Family]:
    """Every family of at least two arms that differ in the setting `key` alone, or in `also` with it.

    `key` may be one of VIRTUAL: what several settings say together, such as "condition": iid, Nc = 1, ...
    """
    found: dict[frozenset[tuple[str, Scalar]], dict[Scalar, MeasuredArm]] = {}
    changing = {*VIRTUAL.get(key, {key}), *also}
    for arm in arms:
        value = setting(arm.settings, key)
        if value is None or value == "":
            continue
        found.setdefault(frozenset(identity(arm, changing).items()), {}).setdefault(value, arm)
    return [
        Family(dict(common), dict(sorted(members.items(), key=lambda item: (order or _natural)(item[0]))))
        for common, members in found.items()
        if len(members) > 1
    ]


def identity(arm: MeasuredArm, without: Collection[str] = ()) -> dict[str, Scalar]:
    """The settings that tell `arm` from others, less those in `without` and those that mean nothing to it."""
    left_out = {*UNCOMPARED, *without}
    if condition(arm.settings) in ("iid", "centralized"):
        left_out |= {"classes-per-client", "dirichlet-alpha"}
    return {key: value for key, value in arm.settings.items() if key not in left_out}


def distinct(arms: Sequence[MeasuredArm]) -> list[MeasuredArm]:
    """Without the arms that stand in a second table: those with the settings and the results of an earlier one."""
    seen: dict[tuple[object, ...], MeasuredArm] = {}
    for arm in arms:
        seen.setdefault((frozenset(identity(arm).items()), *arm.test.items(), *arm.states), arm)
    return list(seen.values())


def twin(arm: MeasuredArm, arms: Sequence[MeasuredArm], changed: Mapping[str, Scalar], also: Collection[str] = ()
         ) -> MeasuredArm | None:  # fmt: skip
    """The arm with the settings of `arm` but for `changed`; settings in `also` may differ too."""
    free = {*changed, *also}
    for other in arms:
        changed_so = all(other.settings.get(key) == value for key, value in changed.items())
        if changed_so and identity(other, free) == identity(arm, free):
            return other
    return None


def masked(arm: MeasuredArm) -> bool:
    """Whether only a part of the weights is updated."""
    return arm.settings.get("mask-rule", "none") != "none"


def trained(arm: MeasuredArm) -> bool:
    """Whether it trains at all; at a learning rate of 0 it is its start, the ridge head alone."""
    return arm.rate != 0.0


def difference(arm: MeasuredArm, reference: MeasuredArm) -> Paired:
    """Test accuracy of `arm` minus that of `reference`, in points, matched by seed."""
    return paired(arm.test, reference.test)


def gain(arm: MeasuredArm) -> Paired:
    """Test accuracy after training minus that of the ridge head before it, in points."""
    return paired(arm.test, arm.ridge)


def accuracy(arm: MeasuredArm) -> Summary:
    """Test accuracy in percent over the seeds."""
    return summarise(list(arm.test.values()))


def validation(arm: MeasuredArm) -> Summary:
    """Validation accuracy in percent over the seeds."""
    return summarise(list(arm.val.values()))


def verdict(pairs: Paired) -> Verdict:
    """HIGHER or LOWER where the 95 % interval excludes 0."""
    if not pairs.n or not pairs.sd > NO_WIDTH or pairs.low <= 0 <= pairs.high:
        return Verdict.UNDECIDED
    return Verdict.HIGHER if pairs.mean > 0 else Verdict.LOWER


def surviving_holm(pairs: Sequence[Paired], level: float = 0.05) -> int:
    """How many of the differences are told from 0 when all are judged together at `level`.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979: the
    i-th smallest of m p-values is compared with level / (m - i + 1), until one fails. Differences of one seed, or
    without a spread, count as p = 1.
    """
    values = sorted(p_value(each) for each in pairs)
    for rank, value in enumerate(values):
        if value > level / (len(values) - rank):
            return rank
    return len(values)


def p_value(pairs: Paired) -> float:
    """Of the two-sided paired t test."""
    if pairs.n < 2 or not pairs.sd > NO_WIDTH:
        return 1.0
    return float(2 * student.sf(abs(pairs.mean) / (pairs.sd / sqrt(pairs.n)), pairs.n - 1))


@dataclass(frozen=True)
class Enough:
    """From which round on more training gains nothing that validation could show.

    Attributes:
        round, last: the earliest such round, and the last one.
        val: mean validation accuracy there. test, final: mean test accuracy there, and at the end.
        lost: test accuracy of the last round minus that of `round`, matched by seed.
    """

    round: int
    last: int
    val: float
    test: Summary
    final: Summary
    lost: Paired


def enough_rounds(arm: MeasuredArm) -> Enough | None:
    """The first evaluated round whose mean validation accuracy is within one standard error of the best round's.

    The one-standard-error rule of Breiman et al., "Classification and Regression Trees", 1984, over rounds in place of
    models; the standard error is over seeds, so at least two are needed. None where curves are missing.
    """
    means = mean_course(arm.curves)
    rounds = list(means)
    if len(arm.curves) < 2 or len(rounds) < 2:
        return None
    best = max(rounds, key=lambda each: (means[each], -each))
    error = summarise(list(_at(arm.curves, best).values())).sd / sqrt(len(arm.curves))
    first = next(each for each in rounds if means[each] >= means[best] - error)
    test, final = (_at(arm.test_curves, each) for each in (first, rounds[-1]))
    return Enough(
        first, rounds[-1], means[first], summarise(list(test.values())), summarise(list(final.values())),
        paired(final, test),
    )  # fmt: skip


def mean_course(curves: Mapping[int, Curve]) -> dict[int, float]:
    """The mean over seeds in every round from 1 on that all of them have, in rising order."""
    courses = [dict(curve) for curve in curves.values()]
    rounds = sorted(set.intersection(*(set(course) for course in courses))) if courses else []
    return {each: fmean(course[each] for course in courses) for each in rounds if each > 0}


def first_reaching(arm: MeasuredArm, percent: float) -> tuple[int, float] | None:
    """The first evaluated round whose mean test accuracy is at least `percent`, and the megabytes sent up by then.

    Megabytes are a mean over seeds, NaN where the results do not tell; None where no round gets there.
    """
    for server_round, mean in mean_course(arm.test_curves).items():
        if mean >= percent - NO_WIDTH:
            return server_round, mean_course(arm.sent).get(server_round, nan)
    return None


def _at(curves: Mapping[int, Curve], server_round: int) -> dict[int, float]:
    return {seed: dict(curve)[server_round] for seed, curve in curves.items() if server_round in dict(curve)}


def _natural(value: Scalar) -> tuple[float, ...]:
    """Numbers by size, then words by the alphabet."""
    return (0.0, float(value)) if isinstance(value, (int, float)) else (1.0, *map(float, map(ord, str(value))))
