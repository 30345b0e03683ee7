"""Robust aggregation against brute force in numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize

from fl_taskarith.merging.robust import (
    centred_clipping,
    coordinate_median,
    distances,
    geometric_median,
    krum,
    trimmed_count,
    trimmed_mean,
)

Vectors = list[dict[str, torch.Tensor]]

RULES = {
    "median": coordinate_median,
    "trimmed mean": lambda vectors: trimmed_mean(vectors, 0.2),
    "geometric median": geometric_median,
    "krum": lambda vectors: krum(vectors, 1),
    "centred clipping": lambda vectors: centred_clipping(vectors, 1.0, 3),
}


def drawn(number: int, seed: int, dtype: torch.dtype = torch.float64) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a": torch.randn(3, 2, generator=generator, dtype=dtype),
            "b": torch.randn(4, generator=generator, dtype=dtype),
        }
        for _ in range(number)
    ]


def flat(vector: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([value.flatten() for value in vector.values()]).double().numpy()


def rows(vectors: Vectors) -> np.ndarray:
    return np.stack([flat(vector) for vector in vectors])


@given(st.integers(1, 12), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_median_is_numpys(number: int, seed: int) -> None:
    vectors = drawn(number, seed)
    np.testing.assert_allclose(flat(coordinate_median(vectors)), np.median(rows(vectors), axis=0), atol=1e-15)


@given(st.integers(1, 25), st.floats(0, 0.49), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_trimmed_mean_is_scipys(number: int, share: float, seed: int) -> None:
    vectors = drawn(number, seed)
    expected = stats.trim_mean(rows(vectors), trimmed_count(share, number) / number + 1e-12, axis=0)
    np.testing.assert_allclose(flat(trimmed_mean(vectors, share)), expected, atol=1e-14)


def test_the_dropped_number_is_what_the_digits_of_the_share_say() -> None:
    assert [trimmed_count(share, 100) for share in (0.0, 0.05, 0.29, 0.07, 0.499)] == [0, 5, 29, 7, 49]
    assert trimmed_count(0.1, 9) == 0
    assert trimmed_count(0.1, 30) == 3


def test_limits_of_the_trimmed_mean_are_the_mean_and_the_median() -> None:
    vectors = drawn(7, 0)
    np.testing.assert_allclose(flat(trimmed_mean(vectors, 0.0)), rows(vectors).mean(0), atol=1e-15)
    np.testing.assert_array_equal(flat(trimmed_mean(vectors, 0.49)), flat(coordinate_median(vectors)))


@given(st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_point_is_closer_to_all_than_the_geometric_median(number: int, seed: int) -> None:
    vectors = drawn(number, seed)
    found, points = flat(geometric_median(vectors, 1e-9, 1000)), rows(vectors)

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(points - point, axis=1).sum())

    best = min(
        minimize(total, points.mean(0), method="BFGS", options={"gtol": 1e-9}).fun, *(total(point) for point in points)
    )
    assert total(found) <= best * (1 + 1e-7)


def test_the_geometric_median_may_be_a_task_vector() -> None:
    axis = [{"a": torch.tensor([value, 0.0])} for value in (-5.0, 0.0, 5.0)]
    off = {"a": torch.tensor([0.0, 0.5])}
    for vectors in (axis, [*axis, axis[1]], [*axis, axis[1], off]):
        assert torch.allclose(geometric_median(vectors)["a"], torch.zeros(2), atol=1e-7)
    repeated = [{"a": torch.tensor([1.0, 2.0])}] * 4
    assert torch.equal(geometric_median(repeated)["a"], repeated[0]["a"])


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_the_geometric_median_of_two_prefers_neither(seed: int, scale: float) -> None:
    first, second = drawn(2, seed)
    second = {name: scale * value for name, value in second.items()}
    for pair in ([first, second], [second, first]):
        for name, value in geometric_median(pair).items():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-4 * scale)


@given(st.integers(5, 9), st.integers(0, 1), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_krum_is_the_definition_written_out(number: int, byzantine: int, seed: int) -> None:
    vectors = drawn(number, seed)
    points = rows(vectors)
    scores = []
    for own in range(number):
        others = sorted(((points[own] - points[other]) ** 2).sum() for other in range(number) if other != own)
        scores.append(sum(others[: number - byzantine - 2]))
    order = np.argsort(scores, kind="stable")
    np.testing.assert_allclose(flat(krum(vectors, byzantine)), points[order[0]], atol=1e-15)
    np.testing.assert_allclose(flat(krum(vectors, byzantine, 3)), points[order[:3]].mean(0), atol=1e-14)


@given(st.integers(1, 9), st.floats(0.01, 10), st.integers(1, 4), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_centred_clipping_is_the_formula(
    number: int, radius: float, iterations: int, from_zero: bool, seed: int
) -> None:
    vectors = drawn(number, seed)
    start = None if from_zero else drawn(1, seed + 1)[0]
    centre = np.zeros(10) if start is None else flat(start)
    for _ in range(iterations):
        away = rows(vectors) - centre
        shares = np.minimum(1, radius / np.maximum(np.linalg.norm(away, axis=1), 1e-300))
        centre = centre + (away * shares[:, None]).mean(0)
    np.testing.assert_allclose(flat(centred_clipping(vectors, radius, iterations, start)), centre, atol=1e-12)


def test_clipping_with_an_infinite_radius_is_the_mean() -> None:
    vectors = drawn(5, 3)
    for start in (None, drawn(1, 4)[0]):
        mean = flat(centred_clipping(vectors, math.inf, 1, start))
        np.testing.assert_allclose(mean, rows(vectors).mean(0), atol=1e-15)


def test_a_start_and_the_task_vectors_are_left_alone() -> None:
    vectors, start = drawn(5, 3), drawn(1, 4)[0]
    before = rows([*vectors, start])
    centred_clipping(vectors, 0.5, 3, start)
    for rule in RULES.values():
        rule(vectors)
    np.testing.assert_array_equal(rows([*vectors, start]), before)


@pytest.mark.parametrize("rule", RULES)
def test_two_of_nine_far_away_do_not_carry_a_rule_off(rule: str) -> None:
    honest = drawn(7, 5, torch.float32)
    far = [{name: torch.full_like(value, 1e6) for name, value in honest[0].items()} for _ in range(2)]
    aggregated = {
        "krum": lambda vectors: krum(vectors, 2),
        "trimmed mean": lambda vectors: trimmed_mean(vectors, 0.25),
    }.get(rule, RULES[rule])(honest + far)
    assert np.linalg.norm(flat(aggregated)) < 10


@pytest.mark.parametrize("rule", RULES)
def test_one_reply_that_is_not_finite_is_borne(rule: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        broken = {name: torch.full_like(value, bad) for name, value in drawn(1, 0)[0].items()}
        aggregated = RULES[rule]([broken, *drawn(6, 5)])
        assert np.isfinite(flat(aggregated)).all(), bad


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_aggregated_in_single(rule: str) -> None:
    aggregated = RULES[rule](drawn(6, 5, torch.float16))
    assert {value.dtype for value in aggregated.values()} == {torch.float32}


@pytest.mark.parametrize("rule", RULES)
def test_task_vectors_that_do_not_match_are_refused(rule: str) -> None:
    vectors = drawn(6, 0)
    with pytest.raises(ValueError, match=r"no task vector|f = 1, n = 0"):
        RULES[rule]([])
    with pytest.raises(ValueError, match="b"):
        RULES[rule]([*vectors, {"a": vectors[0]["a"]}])
    with pytest.raises(ValueError, match="shapes"):
        RULES[rule]([*vectors, {"a": torch.ones(2, 3), "b": torch.ones(4)}])


def test_parameters_out_of_range_are_refused() -> None:
    vectors = drawn(6, 0)
    for wrong in (
        lambda: trimmed_mean(vectors, 0.5),
        lambda: trimmed_mean(vectors, -0.1),
        lambda: krum(vectors, 2),
        lambda: krum(vectors, 1, 6),
        lambda: centred_clipping(vectors, 0.0),
        lambda: centred_clipping(vectors, math.nan),
        lambda: centred_clipping(vectors, 1.0, 0),
    ):
        with pytest.raises(ValueError, match=r"share|Krum|clipping"):
            wrong()


def test_norms_and_distances_are_over_all_tensors_together() -> None:
    vectors = drawn(4, 1, torch.float32)
    np.testing.assert_allclose(distances(vectors).numpy(), np.linalg.norm(rows(vectors), axis=1), rtol=1e-6)
    expected = np.linalg.norm(rows(vectors) - rows(vectors)[2], axis=1)
    np.testing.assert_allclose(distances(vectors, vectors[2]).numpy(), expected, rtol=1e-6)


def test_scalars_and_empty_tensors_count_like_any_entry() -> None:
    """CLIP's logit scale is a scalar; a rule sees it as one more entry of the vector."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, generator=generator)
    whole = [{"w": row} for row in rows]
    parted = [{"w": row[:3], "scale": row[3], "none": row[:0]} for row in rows]
    rules = {**RULES, "clipping": lambda vectors: centred_clipping(vectors, 0.5)}
    for name, rule in rules.items():
        merged = rule(parted)
        assert merged["scale"].shape == () and merged["none"].shape == (0,), name
        assert torch.allclose(torch.cat([merged["w"], merged["scale"][None]]), rule(whole)["w"], atol=1e-6), name
    assert torch.allclose(distances(parted), distances(whole))
