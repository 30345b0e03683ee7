"""Intervals over seeds and test images, tests of equivalence, and families of tests."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fl_taskarith.figures.bootstrap import central_interval, resampled_means
from fl_taskarith.figures.markdown import mean_with_interval
from fl_taskarith.figures.statistics import (
    IMAGES,
    SEEDS,
    SEEDS_AND_IMAGES,
    Paired,
    holm,
    judge_family,
    paired,
    run_key,
    verdict_on,
)

Array = NDArray[np.float64]


def right(seeds: int, images: int, skew: float = 0.0, drift: float = 0.0, chance: int = 0) -> dict[int, Array]:
    """Which images an arm has right by seed; `skew` is its advantage, `drift` the spread of seeds, in logits."""
    hardness = np.random.default_rng(7).normal(1.5, 1.5, images)
    own = np.random.default_rng([1, chance])
    logits = hardness + skew + drift * own.normal(size=(seeds, 1)) + 0.7 * own.normal(size=(seeds, images))
    return dict(enumerate((logits > 0).astype(float)))


def percent(correct: dict[int, Array]) -> dict[int, float]:
    return {seed: 100 * float(images.mean()) for seed, images in correct.items()}


def difference(first: dict[int, Array], second: dict[int, Array]) -> Paired:
    return paired(percent(first), percent(second), first, second)


def drawn_one_by_one(differences: Array, resamples: int) -> Array:
    """The definition: rows and columns are drawn with replacement; deviations of rows are widened."""
    rows, columns = differences.shape
    generator, means = np.random.default_rng(3), []
    for _ in range(resamples):
        images = differences[:, generator.integers(columns, size=columns)].mean(axis=1)
        wide = images.mean() + (images - images.mean()) * math.sqrt(rows / (rows - 1) if rows > 1 else 1)
        means.append(wide[generator.integers(rows, size=rows)].mean())
    return np.array(means)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_it_is_what_drawing_seeds_and_images_one_by_one_gives(seeds: int) -> None:
    first, second = right(seeds, 300, 0.3, 0.2, chance=1), right(seeds, 300, chance=2)
    differences = np.stack(list(first.values())) - np.stack(list(second.values()))
    fast, slow = resampled_means(differences, 40_000), drawn_one_by_one(differences, 10_000)
    assert fast.mean() == pytest.approx(slow.mean(), abs=1.2e-3)
    assert fast.std() == pytest.approx(slow.std(), rel=0.04)
    assert central_interval(fast, 0.95) == pytest.approx(central_interval(slow, 0.95), abs=0.15 * slow.std())


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_arms_that_are_the_same_differ_by_nothing(seeds: int) -> None:
    pairs = difference(right(seeds, 50), right(seeds, 50))
    assert (pairs.mean, pairs.low, pairs.high, pairs.detectable, pairs.p) == (0, 0, 0, 0, 1)
    assert pairs.equivalent() == (seeds >= 3), "fewer seeds may agree by chance"
    assert mean_with_interval(pairs) == "+0.00 (all seeds alike)"


def test_one_seed_has_an_interval_over_images_alone_and_says_so() -> None:
    first, second = right(1, 2000, 0.3, chance=1), right(1, 2000, chance=2)
    pairs, alone = difference(first, second), first[0] - second[0]
    assert (pairs.over, pairs.n) == (IMAGES, 1)
    half = 1.96 * 100 * alone.std() / math.sqrt(2000)
    assert (pairs.low, pairs.high) == pytest.approx((pairs.mean - half, pairs.mean + half), abs=0.05 * half)


def test_new_images_are_allowed_for_beside_new_seeds() -> None:
    """Seeds that agree leave a t interval no width, though other images would have given another difference."""
    first, second = right(1, 400, 0.2, chance=1)[0], right(1, 400, chance=2)[0]
    pairs = difference(dict.fromkeys(range(3), first), dict.fromkeys(range(3), second))
    without = paired(dict.fromkeys(range(3), 100 * float(first.mean())), dict.fromkeys(range(3), 50.0))
    assert (pairs.over, without.over) == (SEEDS_AND_IMAGES, SEEDS)
    assert without.high == without.low
    assert pairs.high - pairs.low > 1.0


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 1000))
def test_it_repeats_to_the_digit_turns_with_the_sign_and_knows_no_order_of_images(
    seeds: int, images: int, chance: int
) -> None:
    first, second = right(seeds, images, chance=chance), right(seeds, images, 0.2, chance=chance + 1)
    pairs, back = difference(first, second), difference(second, first)
    assert pairs == difference(first, second)
    assert (pairs.low, pairs.high, pairs.p) == pytest.approx((-back.high, -back.low, back.p), abs=1e-6)
    order = np.random.default_rng(chance).permutation(images)
    shuffled = ({seed: each[order] for seed, each in arm.items()} for arm in (first, second))
    again = difference(*shuffled)
    assert (again.low, again.high) == pytest.approx((pairs.low, pairs.high), abs=1e-6)


def test_runs_of_one_shard_seed_count_as_one() -> None:
    """Two trainings on each of three divisions of the data are three observations, not six."""
    first, second = right(3, 200, 0.3, 0.3, chance=1), right(3, 200, chance=2)
    twice = [{run_key(seed, shards): arm[shards] for shards in arm for seed in (10, 11)} for arm in (first, second)]
    pairs, double = difference(first, second), paired(*map(percent, twice), *twice)  # type: ignore[arg-type]
    assert double == pairs
    values = [percent(arm) for arm in twice]  # type: ignore[arg-type]
    assert paired(*values).n == 3
    assert paired(*values) == paired(percent(first), percent(second))


@pytest.mark.parametrize("missing", ["a seed", "images"])
def test_what_is_not_known_of_all_common_runs_is_not_used(missing: str) -> None:
    first, second = right(3, 100, 0.3, chance=1), right(3, 100, chance=2)
    known = dict(list(first.items())[:2]) if missing == "a seed" else {seed: each[:50] for seed, each in first.items()}
    assert paired(percent(first), percent(second), known, second).over == SEEDS


def test_two_seeds_without_images_have_no_interval_and_nothing_follows_from_them() -> None:
    pairs = paired({0: 3.0, 1: 5.0}, {0: 1.0, 1: 2.0})
    assert (pairs.mean, pairs.n, pairs.values, pairs.p, pairs.over) == (2.5, 2, (2.0, 3.0), 1.0, "")
    assert all(map(math.isnan, (pairs.low, pairs.high, pairs.detectable, *pairs.inner)))
    assert verdict_on(pairs, pairs.p) == "cannot tell"


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.1, 0.0, -0.1], "equivalent within 0.5"), ([2.0, 2.3, 1.9], "different"), ([0.0, 1.0, -1.0], "cannot tell"),
     ([0.3, 0.31, 0.29], "equivalent within 0.5"), ([0.28] * 3, "cannot tell"), ([2.5] * 3, "cannot tell")],
)  # fmt: skip
def test_equivalence_is_two_one_sided_tests(values: list[float], said: str) -> None:
    pairs = paired(dict(enumerate(values)), dict.fromkeys(range(3), 0.0))
    assert verdict_on(pairs, pairs.p) == said


@pytest.mark.parametrize(("seeds", "said"), [(1, "different (n = 1)"), (2, "different (n = 2)"), (3, "different")])
def test_the_verdict_on_few_seeds_names_their_number(seeds: int, said: str) -> None:
    first, second = right(seeds, 1000, 0.5, chance=1), right(seeds, 1000, chance=2)
    pairs = paired(percent(first), percent(second), first, second)
    assert pairs.p < 0.01
    assert verdict_on(pairs, pairs.p) == said


def test_a_difference_that_its_family_does_not_bear_out_is_not_told() -> None:
    pairs = paired({0: 2.0, 1: 2.3, 2: 1.0}, dict.fromkeys(range(3), 0.0))
    assert verdict_on(pairs, 0.04) == "different"
    assert verdict_on(pairs, 0.06) == "cannot tell"


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_the_steps_down_reject(p: list[float]) -> None:
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        if p[place] * (len(p) - rank) > 0.05:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(holm(p)) if value <= 0.05} == rejected


def test_ten_thousand_resamples_take_well_under_a_second() -> None:
    differences = np.random.default_rng(0).integers(-1, 2, size=(5, 10_000)).astype(float)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        resampled_means(differences)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "drift", "least"), [(1, 0.0, 0.92), (2, 0.05, 0.93), (3, 0.05, 0.93), (5, 0.1, 0.92), (2, 0.2, 0.7)]
)
def test_how_often_the_interval_holds_the_true_difference(seeds: int, drift: float, least: float) -> None:
    """Two arms of equal accuracy; where seeds differ far more than images explain, two seeds promise too much."""
    held, trials = 0, 400
    for trial in range(trials):
        chance = np.random.default_rng(trial)
        shared = chance.normal(2.0, 1.5, 1000)
        arms = [
            shared + 0.4 * chance.normal(size=1000) + drift * chance.normal(size=(seeds, 1))
            + 0.6 * chance.normal(size=(seeds, 1000)) > 0
            for _ in range(2)
        ]  # fmt: skip
        low, high = central_interval(resampled_means(arms[0].astype(float) - arms[1], 2000), 0.95)
        held += low <= 0 <= high
    assert held / trials >= least


@pytest.mark.parametrize("seeds", [3, 5])
def test_what_images_do_in_every_seed_does_not_average_out(seeds: int) -> None:
    chance = np.random.default_rng(11)
    shared, other = chance.normal(size=(2, 300))
    first, second = (
        image + 0.3 * chance.normal(size=(seeds, 300)) + shift > 0 for image, shift in ((shared, 0.3), (other, 0.0))
    )
    differences = first.astype(float) - second
    assert np.corrcoef(differences)[0, 1] > 0.5
    fast, slow = resampled_means(differences, 40_000), drawn_one_by_one(differences, 10_000)
    assert fast.std() == pytest.approx(slow.std(), rel=0.04)
    alike = np.tile(differences[:1], (seeds, 1))
    assert resampled_means(alike).std() == pytest.approx(alike[0].std() / math.sqrt(300), rel=0.02)


def test_one_seed_is_the_z_test_of_its_images() -> None:
    first, second = right(1, 2000, 0.09, chance=1), right(1, 2000, chance=2)
    pairs, alone = difference(first, second), first[0] - second[0]
    error = 100 * alone.std() / math.sqrt(2000)
    p = 2 * stats.norm.sf(abs(pairs.mean) / error)
    assert 0.1 < p < 0.7 and pairs.p == pytest.approx(p, abs=0.02)
    assert pairs.detectable == pytest.approx((1.959964 + 0.841621) * error, rel=0.03)
    inner = (pairs.mean - 1.644854 * error, pairs.mean + 1.644854 * error)
    assert pairs.inner == pytest.approx(inner, abs=0.05 * error)


@given(st.lists(st.floats(-1, 1).map(lambda value: round(value, 2)), min_size=3, max_size=6))
def test_equivalence_is_scipys_two_one_sided_tests(values: list[float]) -> None:
    pairs = paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    if np.std(values) < 1e-6:
        assert not pairs.equivalent()
        return
    sides = ((-0.5, "greater"), (0.5, "less"))
    p = max(stats.ttest_1samp(values, edge, alternative=side).pvalue for edge, side in sides)
    if abs(p - 0.05) > 1e-9:
        assert pairs.equivalent() == (p < 0.05)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.7, 0.9]) == pytest.approx([0.05, 0.12, 0.12, 1.0, 1.0])


def test_an_untuned_contrast_stays_in_the_family_and_makes_no_other_easier() -> None:
    pairs = [Paired(1.0, 1.0, 3, 0.1, 1.9, p=p, over=SEEDS) for p in (0.001, 0.02, 0.04)]
    assert judge_family(pairs, [True, False, False]) == [
        (1.0, "not tuned"), (pytest.approx(0.06), "cannot tell"), (pytest.approx(0.08), "cannot tell"),
    ]  # fmt: skip
