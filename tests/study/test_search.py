"""Choosing a learning rate by successive halving, and the statistics of tables."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_taskarith.errors import ConfigError, StudyError
from fl_taskarith.figures.statistics import paired, summarise
from fl_taskarith.study.search import DIVERGED, Choice, Scores, Search, Trial, choose, open_trials, trials_left
from fl_taskarith.study.study_file import load_study

SEARCH = Search(low=1e-3, high=10.0, per_decade=1, rounds=(1, 2), keep=2, seeds=(0,))


def search_by(score: Callable[[float, int], float]) -> tuple[Choice, Scores]:
    scores: dict[Trial, tuple[float, float]] = {}
    while trials := open_trials(SEARCH, scores):
        values = {trial: score(trial.rate, trial.rounds) for trial in trials}
        scores |= {trial: (value, 0.0) if value > -math.inf else DIVERGED for trial, value in values.items()}
    return choose(SEARCH, scores), scores


def test_the_grid_holds_both_ends_and_round_numbers() -> None:
    assert SEARCH.rates == (0.001, 0.01, 0.1, 1.0, 10.0)
    assert Search(1e-4, 1.0, 2, (1,), 1, (0,)).rates[:4] == (0.0001, 0.000316, 0.001, 0.00316)


def test_the_search_finds_the_best_rate_and_gives_long_runs_to_the_best_only() -> None:
    choice, scores = search_by(lambda rate, rounds: -abs(math.log10(rate)) + (rate == 0.1) * rounds)
    assert choice == Choice(0.1, edge=False)
    assert [trial for trial in scores if trial.rounds == 2] == [Trial(0.1, 2), Trial(1.0, 2)]


def test_ties_go_to_the_smaller_rate() -> None:
    assert search_by(lambda rate, rounds: float(0.01 <= rate <= 1))[0] == Choice(0.01, edge=False)


@pytest.mark.parametrize("best", [0.001, 10.0])
def test_an_optimum_at_an_end_of_the_grid_is_flagged(best: float) -> None:
    assert search_by(lambda rate, rounds: -abs(math.log10(rate / best)))[0] == Choice(best, edge=True)


def test_a_rate_that_diverges_never_wins_and_never_goes_on() -> None:
    choice, scores = search_by(lambda rate, rounds: 0.2 if rate == 0.01 else -math.inf)
    assert choice == Choice(0.01, edge=False)
    assert [trial for trial in scores if trial.rounds == 2] == [Trial(0.01, 2)]


def test_a_search_in_which_everything_diverges_says_so() -> None:
    with pytest.raises(StudyError, match=r"0\.001 to 10 diverged"):
        search_by(lambda rate, rounds: -math.inf)


def test_a_search_by_loss_takes_the_least_loss_and_then_the_accuracy() -> None:
    """In both rungs: the most accurate rates have the largest losses."""
    search = dataclasses.replace(SEARCH, by="loss")
    scores: dict[Trial, tuple[float, float]] = {}
    while trials := open_trials(search, scores):
        scores |= {trial: (0.5 + 0.1 * math.log10(trial.rate), -max(trial.rate, 0.01)) for trial in trials}
    assert [trial.rate for trial in scores if trial.rounds == 2] == [0.001, 0.01]
    assert choose(search, scores) == Choice(0.01, edge=False), "of equal losses the more accurate"


@given(
    short=st.lists(st.floats(0, 1), min_size=9, max_size=9), peak=st.integers(0, 8), keep=st.integers(1, 3),
    lost=st.sets(st.integers(0, 8), max_size=2),
)  # fmt: skip
def test_a_bracketed_search_finds_the_peak_of_the_last_rung_whatever_short_rungs_say(
    short: list[float], peak: int, keep: int, lost: set[int]
) -> None:
    """Where long runs have one peak; rates that diverged early are walls that it does not look behind."""
    search = Search(1e-4, 1.0, 2, (1, 9), keep, (0,), bracket=True)
    places = {rate: place for place, rate in enumerate(search.rates)}
    scores: dict[Trial, tuple[float, float]] = {}
    while trials := open_trials(search, scores):
        for trial in trials:
            place = places[trial.rate]
            value = short[place] if trial.rounds == 1 else -float(abs(place - peak))
            scores[trial] = DIVERGED if trial.rounds == 1 and place in lost else (value, 0.0)
    chosen = places[choose(search, scores).rate]
    for beside in (chosen - 1, chosen + 1):
        if 0 <= beside < len(search.rates) and beside not in lost:
            assert scores[Trial(search.rates[beside], 9)] < scores[Trial(search.rates[chosen], 9)]
    assert lost or chosen == peak


def test_what_is_left_of_a_bracketed_search_counts_a_neighbour() -> None:
    search = dataclasses.replace(SEARCH, bracket=True)
    assert sorted(trials_left(search, {})) == [1] * 5 + [2, 2, 2]
    scores = {Trial(rate, 1): (rate, 0.0) for rate in search.rates}
    assert sorted(trials_left(search, scores)) == [2, 2, 2]
    scores |= {Trial(1.0, 2): (0.9, 0.0), Trial(10.0, 2): (0.1, 0.0)}
    assert open_trials(search, scores) == [Trial(0.1, 2)] and trials_left(search, scores) == [2]
    scores |= {Trial(0.1, 2): (0.2, 0.0)}
    assert open_trials(search, scores) == [] and choose(search, scores) == Choice(1.0)


@pytest.mark.parametrize(("written", "accepted"), [("loss", True), ("accuracy", True), ("test", False)])
def test_a_study_file_says_what_a_search_goes_by(written: str, accepted: bool, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        'title = "A"\nname = "a"\nseeds = [0]\n[settings]\nmask-rule = "none"\n[search]\nfrom = 1e-3\nto = 10.0\n'
        f'rounds = [1]\nby = "{written}"\n[[arm]]\nname = "b"\n'
    )
    if accepted:
        search = load_study(file).search
        assert search is not None
        assert search.by == written
    else:
        with pytest.raises(ConfigError, match='by = "test" is not accepted: expected one of "accuracy", "loss"'):
            load_study(file)


# statistics


def test_mean_and_sample_standard_deviation() -> None:
    summary = summarise([1.0, 2.0, 6.0])
    assert (summary.mean, summary.n) == (3.0, 3)
    assert summary.sd == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2


def test_one_seed_has_no_spread_and_no_interval() -> None:
    alone = paired({0: 3.0, 1: 9.0}, {0: 1.0, 2: 4.0})
    assert (alone.mean, alone.n) == (2.0, 1)
    assert all(map(math.isnan, (alone.sd, alone.low, alone.high, alone.detectable, summarise([1.0]).sd)))
    assert math.isnan(summarise([]).mean)


def test_the_paired_interval_is_scipys_and_matches_by_seed() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5))
    shuffled = (3, 0, 4, 1, 2)
    result = paired({seed: first[seed] for seed in shuffled}, dict(enumerate(second)))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_the_detectable_difference_by_hand() -> None:
    result = paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})  # sd 1, n 3; t(0.975, 2) and t(0.80, 2)
    assert result.detectable == pytest.approx((4.302653 + 1.060660) / math.sqrt(3), abs=1e-5)
    assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_what_is_left_of_a_search_counts_the_rungs_to_come() -> None:
    search = Search(1e-3, 10.0, 1, (1, 2, 6), 2, (0,))
    assert sorted(trials_left(search, {})) == [1] * 5 + [2, 2, 6, 6]
    first = {Trial(rate, 1): (rate, 0.0) for rate in search.rates}
    assert sorted(trials_left(search, first)) == [2, 2, 6, 6]
    assert sorted(trials_left(search, first | {Trial(10.0, 2): (0.5, 0.0)})) == [2, 6, 6]


def test_trials_by_hand() -> None:
    search = Search(1e-3, 10.0, 1, (1, 2), 2, (0, 1))
    assert search.trials == 2 * (5 + 2) and dataclasses.replace(search, bracket=True).trials == 2 * (5 + 2 + 1)


def test_a_neighbour_is_left_out_only_if_it_diverged_with_the_same_other_settings() -> None:
    search = Search(1e-3, 10.0, 1, (1, 2), 1, (0,), also=(("server-lr", (0.5, 1.0)),), bracket=True)
    half, one = (("server-lr", 0.5),), (("server-lr", 1.0),)
    scores = {Trial(rate, 1, also): (0.1, 0.0) for rate, also in search.points}
    scores |= {Trial(0.1, 1, one): (0.9, 0.0), Trial(0.1, 2, one): (0.9, 0.0), Trial(1.0, 1, half): DIVERGED}
    assert open_trials(search, scores) == [Trial(0.01, 2, one), Trial(1.0, 2, one)]
