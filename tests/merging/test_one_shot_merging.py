"""Merging rules against their formulas written out, and their limit cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector
from fl_taskarith.merging.merge_rules import merge_rules, scaled_weights
from fl_taskarith.merging.rules.averaging import average, fednova, task_arithmetic
from fl_taskarith.merging.rules.resistant import cclip, clipping_radii, fedgma, median
from fl_taskarith.merging.rules.sparsifying import dare, magnitude_threshold, ties

Vector = dict[str, torch.Tensor]


def drawn(number: int, seed: int = 0) -> list[Vector]:
    generator = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
            for _ in range(number)]  # fmt: skip


def flat(vector: Vector) -> np.ndarray:
    return torch.cat([value.flatten() for value in vector.values()]).double().numpy()


def rows(vectors: list[Vector]) -> np.ndarray:
    return np.stack([flat(vector) for vector in vectors])


NUMBERS, SEEDS = st.integers(1, 8), st.integers(0, 10_000)


@given(NUMBERS, SEEDS)
@settings(max_examples=30, deadline=None)
def test_task_arithmetic_at_one_over_t_is_a_round_of_fedavg(number: int, seed: int) -> None:
    vectors, weights = drawn(number, seed), drawn(1, seed + 1)[0]
    mean = WeightedMean()
    for vector in vectors:
        mean.add(vector, 20)  # clients with equally many examples
    fedavg = apply_task_vector(weights, mean.result(), 1.0)
    merged = scaled_weights(weights, task_arithmetic(vectors), 1 / number)
    np.testing.assert_allclose(flat(merged), flat(fedavg), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(scaled_weights(weights, average(vectors), 1.0)), flat(fedavg), atol=1e-6)


@given(NUMBERS, SEEDS, st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_fednova_gma_and_clipping_are_the_formulas_of_the_one_shot_paper(number: int, seed: int, rho: float) -> None:
    vectors, points = drawn(number, seed), rows(drawn(number, seed))
    steps = [float(1 + 3 * model) for model in range(number)]
    expected = sum(np.mean(steps) / k / number * tau for k, tau in zip(steps, points, strict=True))
    np.testing.assert_allclose(flat(fednova(vectors, steps)), expected, rtol=1e-4, atol=1e-5)
    agreement = np.abs(np.sign(points).sum(0)) / number
    mask = np.where(agreement.astype(np.float32) >= np.float32(rho), 1, agreement)
    np.testing.assert_allclose(flat(fedgma(vectors, rho)), mask * points.sum(0), rtol=1e-4, atol=1e-5)
    radius = 0.5 + 6 * rho
    shares = np.minimum(1, radius / np.linalg.norm(points, axis=1))
    np.testing.assert_allclose(flat(cclip(vectors, radius)), (shares[:, None] * points).sum(0), rtol=1e-4, atol=1e-5)


def test_limits() -> None:
    vectors = drawn(5)
    total = flat(task_arithmetic(vectors))
    np.testing.assert_allclose(flat(fednova(vectors, [7.0] * 5)), total / 5, rtol=1e-5, atol=1e-6)
    for same in (fedgma(vectors, 0.0), cclip(vectors, math.inf), dare(vectors, 0.0)):
        np.testing.assert_allclose(flat(same), total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(median(vectors)), np.median(rows(vectors), axis=0), atol=1e-6)
    np.testing.assert_allclose(flat(ties(vectors[:1], 1.0)), flat(vectors[0]), atol=1e-7)


@given(NUMBERS, SEEDS, st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_ties_is_trim_elect_and_disjoint_mean(number: int, seed: int, keep: float) -> None:
    vectors, points = drawn(number, seed), rows(drawn(number, seed))
    count = math.ceil(keep * 17 - 1e-9)
    trimmed = np.zeros_like(points)
    for model, point in enumerate(points):
        best = np.argsort(-np.abs(point))[:count]
        trimmed[model, best] = point[best]
    expected = []
    for column in trimmed.T:
        agreeing = [value for value in column if value and np.sign(value) == np.sign(column.sum())]
        expected.append(np.mean(agreeing) if agreeing else 0.0)
    np.testing.assert_allclose(flat(ties(vectors, keep)), expected, rtol=1e-4, atol=1e-6)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60), st.floats(0.01, 1)
)
@settings(max_examples=100, deadline=None)
def test_the_threshold_is_the_sorted_magnitude(values: list[float], keep: float) -> None:
    halves = torch.tensor(values).split(math.ceil(len(values) / 2))
    count = math.ceil(keep * len(values) - 1e-9)
    expected = torch.tensor(values).abs().sort(descending=True).values[count - 1]
    assert magnitude_threshold({str(index): half for index, half in enumerate(halves)}, keep) == float(expected)


def test_dare_keeps_the_expectation_and_depends_on_its_seed() -> None:
    vectors = [{"w": torch.ones(200_000)}, {"w": 2 * torch.ones(200_000)}]
    found = dare(vectors, 0.9, seed=1)["w"]
    assert float(found.mean()) == pytest.approx(3.0, rel=0.02)
    assert set(found.unique().round().tolist()) == {0, 10, 20, 30}
    assert torch.equal(found, dare(vectors, 0.9, seed=1)["w"])
    assert not torch.equal(found, dare(vectors, 0.9, seed=2)["w"])
    assert torch.equal(vectors[0]["w"], torch.ones(200_000)), "task vectors are left as they are"


OTHERWISE = {
    "wudi",
    "ace",
    "iso-c",
    "iso-cts",
    "tsv-m",
    "breadcrumbs",
}  # of equal task vectors they make something else


@pytest.mark.parametrize("method", sorted(merge_rules().keys() - OTHERWISE))
def test_equal_task_vectors_merge_into_themselves_at_the_default_scale(method: str) -> None:
    vector = drawn(1)[0]
    value = {"threshold": 0.5, "radius": 1e9, "keep": 1.0, "drop": 0.0, "shrinkage": 1.0}.get(
        merge_rules()[method].parameter
    )
    direction = merge_rules()[method].direction([vector] * 4, value, [3.0] * 4, 0)
    merged = scaled_weights({name: torch.zeros_like(each) for name, each in vector.items()}, direction,
                            merge_rules()[method].default_scale(4))  # fmt: skip
    tolerance = 1e-2 if method.startswith("covariance") else 1e-5  # its ε
    np.testing.assert_allclose(flat(merged), flat(vector), rtol=tolerance, atol=1e-6)


def test_radii_lie_between_the_shortest_and_the_longest_task_vector() -> None:
    vectors = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 1.0])}]
    np.testing.assert_allclose(clipping_radii(vectors), [1, 2, 3, 4, 5])
    assert len(clipping_radii(vectors[:1] * 3)) == 1
    still = {"w": torch.zeros(2)}
    np.testing.assert_allclose(clipping_radii([vectors[0], still]), [1.25, 2.5, 3.75, 5])
    assert clipping_radii([still, still]) == [1.0]
    for radius in clipping_radii([still, vectors[0]]):
        assert cclip([still, vectors[0]], radius)["w"].norm() == pytest.approx(radius)


@pytest.mark.parametrize("method", merge_rules())
def test_models_that_do_not_match_are_refused(method: str) -> None:
    first, second = drawn(2)
    value = 0.5
    with pytest.raises(ValueError, match="no task vectors"):
        merge_rules()[method].direction([], value, [], 0)
    with pytest.raises(ValueError, match="b"):
        merge_rules()[method].direction([first, {"a": second["a"]}], value, [1.0, 1.0], 0)
    with pytest.raises(ValueError, match="shapes"):
        merge_rules()[method].direction([first, {"a": torch.ones(2), "b": torch.ones(5)}], value, [1.0, 1.0], 0)


def test_weights_keep_their_type() -> None:
    half = {"w": torch.ones(3, dtype=torch.bfloat16)}
    merged = scaled_weights(half, {"w": torch.full((3,), 0.5)}, 2.0)
    assert merged["w"].dtype == torch.bfloat16
    assert merged["w"].tolist() == [2.0] * 3
