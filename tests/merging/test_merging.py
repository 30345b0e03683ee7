import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector, mean_pairwise_cosine, task_vector_norm


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_streamed_mean_equals_the_formula(weights: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [{"a": torch.randn(4, 3, generator=generator), "b": torch.randn(2, generator=generator)} for _ in weights]
    mean = WeightedMean()
    for vector, weight in zip(vectors, weights, strict=True):
        mean.add(vector, weight)
    result = mean.result()
    for name in ("a", "b"):
        expected = sum(w * v[name].double() for v, w in zip(vectors, weights, strict=True)) / sum(weights)
        assert torch.allclose(result[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_adding_reads_a_vector_and_does_not_keep_it() -> None:
    buffer = {"a": torch.ones(3)}
    mean = WeightedMean()
    mean.add(buffer, 1)
    buffer["a"].fill_(5)
    mean.add(buffer, 1)
    assert torch.equal(mean.result()["a"], torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("second", "weight", "problem"),
    [({"b": torch.ones(2)}, 1, "a, b"), ({"a": torch.ones(3)}, 1, "shape"), ({"a": torch.ones(2)}, 0, "positive")],
)
def test_task_vectors_that_do_not_match_are_refused(second: dict[str, torch.Tensor], weight: int, problem: str) -> None:
    mean = WeightedMean()
    mean.add({"a": torch.ones(2)}, 1)
    with pytest.raises(ValueError, match=problem):
        mean.add(second, weight)


def test_applying_a_task_vector_leaves_the_old_weights_and_the_others_alone() -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(1)}
    new = apply_task_vector(weights, {"a": torch.full((2,), 2.0)}, step=0.5)
    task_vector = {"a": torch.full((2,), 2.0)}
    overwritten = apply_task_vector(weights, task_vector, step=0.5, overwrite=True)
    assert torch.equal(overwritten["a"], new["a"]) and overwritten["a"] is task_vector["a"]
    assert torch.equal(new["a"], torch.full((2,), 2.0))
    assert new["b"] is weights["b"]
    assert torch.equal(weights["a"], torch.ones(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_norm_of_a_task_vector_shows_any_entry_that_is_not_finite(bad: float) -> None:
    tensors = {"a": torch.full((3, 3), 2.0), "b": torch.full((5,), -1.0)}
    assert task_vector_norm(tensors) == pytest.approx(math.sqrt(9 * 4 + 5))
    tensors["b"][4] = bad
    assert not math.isfinite(task_vector_norm(tensors))
    assert task_vector_norm({}) == 0.0


@given(st.lists(st.tuples(arrays(float, 6, elements=st.floats(-3, 3)), st.floats(0.1, 5)), min_size=2, max_size=6))
def test_the_mean_pairwise_cosine_from_norms_alone_is_that_of_all_pairs(clients: list) -> None:
    vectors, weights = [np.asarray(vector) for vector, _ in clients], [weight for _, weight in clients]
    shares = np.asarray(weights) / sum(weights)
    mean = sum(share * vector for share, vector in zip(shares, vectors, strict=True))
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    found = mean_pairwise_cosine(float(np.linalg.norm(mean)), norms, weights)
    pairs = [(i, j) for i in range(len(vectors)) for j in range(len(vectors)) if i != j]
    importance = sum(shares[i] * norms[i] * shares[j] * norms[j] for i, j in pairs)
    if importance < 1e-6:
        return
    inner = sum(shares[i] * shares[j] * float(vectors[i] @ vectors[j]) for i, j in pairs)
    assert found == pytest.approx(inner / importance, abs=1e-6)


def test_one_task_vector_has_no_pairwise_cosine() -> None:
    assert mean_pairwise_cosine(1.0, [1.0], [3.0]) is None
