"""Which learning rate to run next, and which one won: a log grid under successive halving. Pure logic, no training.

Successive halving: Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016. Every rate runs for the first number of rounds, the best `keep` of them for the next, and so on. Where
other settings are searched too, a candidate is a rate with a value of each.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fl_taskarith.config.fields import rules
from fl_taskarith.config.rule import LARGEST, Rule, Scalar, shown
from fl_taskarith.config.toml import Kind
from fl_taskarith.errors import ConfigError, StudyError

DECADES = 4  # a narrower grid says little about where the optimum lies
LARGEST_PER_DECADE = 12  # beyond it, rates rounded to three digits would meet
BY = ("accuracy", "loss")
MOST_RUNS = 4000  # of a study, a search or a benchmark: more are a slip in a list
_RATE = Rule(float, "", 0, LARGEST, exclusive_low=True)
GRID: Mapping[str, Kind] = {"from": _RATE, "to": _RATE, "per-decade": Rule(int, "", 1, LARGEST_PER_DECADE)}
"""What the keys of a [search] hold that give its grid."""

Also = tuple[tuple[str, Scalar], ...]  # values of other settings


class Trial(NamedTuple):
    """A learning rate that runs for so many communication rounds, with the values of other settings."""

    rate: float
    rounds: int
    also: Also = ()


Score = tuple[float, float]  # validation accuracy in [0, 1], then minus the validation loss: means over the seeds
Scores = Mapping[Trial, Score]

DIVERGED: Score = (-math.inf, -math.inf)


def refuse_too_many(runs: int, what: str = "runs") -> None:
    """Raise ConfigError if a list of `runs` things to do is longer than `MOST_RUNS`."""
    if runs > MOST_RUNS:
        number = f"{runs:,}" if runs < 10**15 else "more than 10^15"
        raise ConfigError(
            f"{number} {what} are asked for: expected no more than {MOST_RUNS:,}. Shorten the lists of seeds, of the "
            "grid and of arms, or share them out to several files."
        )


@dataclass(frozen=True)
class Search:
    """The [search] table of a study file.

    Attributes:
        low, high: the ends of the grid, both in it.
        per_decade: rates per factor of ten.
        rounds: communication rounds of each rung, rising.
        keep: candidates that go on from one rung to the next.
        seeds: every candidate runs with each, and its scores are means over them; one seed tells what is best for that
            seed alone.
        by: what is best on validation, the highest "accuracy" or the least "loss"; the other one decides ties. A loss
            tells rates apart where few validation images would leave the choice to one of them.
        also: other settings that are searched with the rate, and the values of each.
        bracket: run the last rung for the winner's neighbours in the grid of rates as well, wherever an earlier rung
            dropped them, until both are worse than the winner. Few rounds judge large rates and small ones unequally.
        last_seeds: the seeds of the last rung in place of `seeds`, where few candidates are left; () for the same.
    """

    low: float
    high: float
    per_decade: int
    rounds: tuple[int, ...]
    keep: int
    seeds: tuple[int, ...]
    by: str = "accuracy"
    also: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()
    bracket: bool = False
    last_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        decades = self._decades if 0 < self.low < self.high < math.inf else 0.0
        if decades < DECADES - 1e-9:
            raise ConfigError(
                f"from = {self.low:g} and to = {self.high:g} do not span {DECADES} decades above 0: expected "
                f"to >= {10**DECADES:g} * from, so that an optimum inside the grid means something."
            )
        if not 1 <= self.per_decade <= LARGEST_PER_DECADE:
            raise ConfigError(f"per-decade = {self.per_decade}: expected 1 to {LARGEST_PER_DECADE}.")
        steps = decades * self.per_decade
        if abs(steps - round(steps)) > 1e-6:
            raise ConfigError(
                f"per-decade = {self.per_decade} does not divide the range from {self.low:g} to {self.high:g}: "
                "expected to = from * 10^(whole number / per-decade)."
            )
        rising = all(first < second for first, second in zip(self.rounds, self.rounds[1:], strict=False))
        if not self.rounds or self.rounds[0] < 1 or not rising:
            raise ConfigError(
                f"rounds = {shown(list(self.rounds))}: expected rising whole numbers from 1, one per rung."
            )
        refuse_too_many(math.prod([len(self.rates), *(len(values) for _, values in self.also)]))
        if not 1 <= self.keep <= len(self.points):
            what = "of rates" if not self.also else "of rates times values"
            raise ConfigError(f"keep = {self.keep}: expected 1 to {len(self.points)}, the number {what}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {shown(list(self.seeds))}: expected at least one seed, each once.")
        if len(set(self.last_seeds)) < len(self.last_seeds):
            raise ConfigError(f"last-seeds = {shown(list(self.last_seeds))}: expected each seed once.")
        refuse_too_many(self.trials)

    def seeds_of(self, rounds: int) -> tuple[int, ...]:
        """Return the seeds with which every candidate of the rung of so many rounds runs."""
        return self.last_seeds if self.last_seeds and rounds == self.rounds[-1] else self.seeds

    @property
    def _decades(self) -> float:
        return math.log10(self.high) - math.log10(self.low)

    @property
    def trials(self) -> int:
        """The number of runs, as many as if none diverged; one for the neighbours, of which there may be more."""
        candidates = [len(self.points), *[self.keep] * (len(self.rounds) - 1)]
        candidates[-1] += self.bracket
        return sum(len(self.seeds_of(each)) * number for each, number in zip(self.rounds, candidates, strict=True))

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid, ascending, rounded to three significant digits."""
        steps = round(self._decades * self.per_decade)
        return tuple(float(f"{self.low * 10 ** (step / self.per_decade):.3g}") for step in range(steps + 1))

    @property
    def points(self) -> list[tuple[float, Also]]:
        """The candidates, by rising rate, and then in the order of the values."""
        keys = [key for key, _ in self.also]
        values = itertools.product(*(each for _, each in self.also))
        others = [tuple(zip(keys, each, strict=True)) for each in values]
        return [(rate, also) for rate in self.rates for also in others]

    def edges(self, rate: float, also: Also) -> tuple[str, ...]:
        """Return the settings whose value is at an end of its grid, beyond which better ones may lie.

        The limit of what a setting accepts, such as a momentum of 0, is no such end; words have none.
        """
        at_end = ["learning-rate"] if rate in (self.rates[0], self.rates[-1]) else []
        for (key, values), (_, value) in zip(self.also, also, strict=True):
            numeric = not any(isinstance(each, (str, bool)) for each in values)
            if numeric and value in (min(values), max(values)) and value not in (rules()[key].low, rules()[key].high):
                at_end.append(key)
        return tuple(at_end)


@dataclass(frozen=True)
class Choice:
    """What an arm runs at.

    Attributes:
        rate, also: the learning rate, and the values of other settings that were searched.
        edge: whether the search chose one of them at an end of its grid, so that the arm is not tuned.
        edges: which of them.
    """

    rate: float
    edge: bool = False
    also: Also = ()
    edges: tuple[str, ...] = field(default=(), compare=False)


def also_words(also: Also) -> str:
    """Return values of other settings: "server-lr = 3, server-momentum = 0.9"."""
    return ", ".join(f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value}" for key, value in also)


def open_trials(search: Search, scores: Scores) -> list[Trial]:
    """Return the trials of the first incomplete rung, in order of the rate; none once the search is over."""
    for rung in _rungs(search, scores):
        if missing := [trial for trial in rung if trial not in scores]:
            return missing
    return []


def choose(search: Search, scores: Scores) -> Choice:
    """Return the best of the last rung by `search.by`; ties go by the other measure, then to the smaller rate.

    Raises:
        ValueError: trials are still open.
        StudyError: every rate of a rung diverged.
    """
    if open_trials(search, scores):
        raise ValueError("the search is not over")
    last = _rungs(search, scores)[-1]
    best = _best(search, last, scores, 1)
    if not best:
        raise StudyError(
            f"Every learning rate from {last[0].rate:g} to {last[-1].rate:g} diverged within {last[0].rounds} rounds: "
            "lower [search] from."
        )
    edges = search.edges(best[0].rate, best[0].also)
    return Choice(best[0].rate, bool(edges), best[0].also, edges)


def trials_left(search: Search, scores: Scores) -> list[int]:
    """Return the rounds of each trial still to come, as many as if none diverged: for estimates of time.

    Of the winner's neighbours it counts one, for the other one has run as a rule.
    """
    rungs = _rungs(search, scores)
    left = [trial.rounds for trial in open_trials(search, scores)]
    if left:
        left += [rounds for rounds in search.rounds[len(rungs) :] for _ in range(search.keep)]
        if search.bracket and (len(rungs) < len(search.rounds) or len(rungs[-1]) <= search.keep):
            left.append(search.rounds[-1])
    return left


def _rungs(search: Search, scores: Scores) -> list[list[Trial]]:
    """Return the known rungs: the first, and each after a complete one in which not every candidate diverged."""
    rungs = [[Trial(rate, search.rounds[0], also) for rate, also in search.points]]
    for rounds in search.rounds[1:]:
        if not all(trial in scores for trial in rungs[-1]):
            break
        best = _best(search, rungs[-1], scores, search.keep)
        if not best:
            break
        rungs.append([trial._replace(rounds=rounds) for trial in rungs[-1] if trial in best])
    if search.bracket and len(rungs) == len(search.rounds):
        rungs[-1] = _bracketed(search, rungs[-1], scores)
    return rungs


def _bracketed(search: Search, rung: list[Trial], scores: Scores) -> list[Trial]:
    """Return the last rung with the neighbours of its best trial, and with those of the best among them, and so on.

    A rate that diverged in a shorter rung is no neighbour worth running.
    """
    lost = {(trial.rate, trial.also) for trial, score in scores.items() if score == DIVERGED}
    while all(trial in scores for trial in rung) and (best := _best(search, rung, scores, 1)):
        place = search.rates.index(best[0].rate)
        beside = search.rates[max(0, place - 1) : place + 2]
        more = [best[0]._replace(rate=rate) for rate in beside if (rate, best[0].also) not in lost]
        if set(more) <= set(rung):
            break
        order = {point: number for number, point in enumerate(search.points)}
        rung = sorted({*rung, *more}, key=lambda trial: order[trial.rate, trial.also])
    return rung


def _best(search: Search, rung: list[Trial], scores: Scores, count: int) -> list[Trial]:
    """Return the `count` best trials of a rung that did not diverge, best first."""
    converged = [trial for trial in rung if scores[trial] > DIVERGED]  # by rising rate, which sorting keeps
    first, second = (0, 1) if search.by == "accuracy" else (1, 0)
    return sorted(converged, key=lambda trial: (-scores[trial][first], -scores[trial][second]))[:count]
