"""Covariance aggregation of a matrix against its limit cases, and against the objective minimised entry by entry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.merging.input_covariance import BoundedSum, CovarianceSum

TINY = 1e-9
SEEDS, CLIENTS = st.integers(0, 10_000), st.integers(1, 5)


def drawn(
    number: int, seed: int, out: int = 4, inputs: int = 6, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out, inputs, generator=generator, dtype=dtype) for _ in range(number)]


def merged(
    matrices: list[torch.Tensor], weights: list[float] | None = None, epsilon: float = TINY, shrinkage: float = 0.0,
    support: torch.Tensor | None = None, form: type[CovarianceSum] = CovarianceSum,
) -> torch.Tensor:  # fmt: skip
    weights = weights or [1.0] * len(matrices)
    sums = form()
    for matrix, weight in zip(matrices, weights, strict=True):
        sums.add(matrix, weight)
    mean = sum(weight * matrix for weight, matrix in zip(weights, matrices, strict=True)) / sum(weights)
    return sums.result(mean, epsilon, shrinkage, support)


def overlap(matrices: list[torch.Tensor]) -> float:
    sums = CovarianceSum()
    for matrix in matrices:
        sums.add(matrix)
    return sums.overlap()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


# limit cases

FORMS = pytest.mark.parametrize("form", [CovarianceSum, BoundedSum])


@FORMS
@given(seed=SEEDS, number=CLIENTS)
@settings(max_examples=30, deadline=None)
def test_equal_clients_and_one_alone_give_their_own_task_vector(
    form: type[CovarianceSum], seed: int, number: int
) -> None:
    matrix = drawn(1, seed)[0]
    assert close(merged([matrix] * number, [1.0 + client for client in range(number)], form=form), matrix)
    assert overlap([matrix] * number) == pytest.approx(number)


@FORMS
@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_inputs_that_share_no_direction_give_the_sum(form: type[CovarianceSum], seed: int) -> None:
    directions = torch.linalg.qr(drawn(1, seed, 6, 6)[0]).Q.split(2)
    matrices = [left[:, :2] @ own for left, own in zip(drawn(3, seed + 1), directions, strict=True)]
    assert close(merged(matrices, [3.0, 1.0, 2.0], form=form), sum(matrices, torch.zeros(())))
    assert overlap(matrices) == pytest.approx(1.0)


@FORMS
@given(seed=SEEDS, number=CLIENTS)
@settings(max_examples=30, deadline=None)
def test_equal_grams_give_the_mean(form: type[CovarianceSum], seed: int, number: int) -> None:
    matrix = drawn(1, seed)[0]
    matrices = [torch.linalg.qr(turn).Q @ matrix for turn in drawn(number, seed + 1, 4, 4)]
    assert close(merged(matrices, form=form), sum(matrices, torch.zeros(())) / number)
    assert overlap(matrices) == pytest.approx(number)


@given(SEEDS, CLIENTS)
@settings(max_examples=30, deadline=None)
def test_full_shrinkage_gives_the_weighted_mean(seed: int, number: int) -> None:
    matrices, weights = drawn(number, seed), [1.0 + client for client in range(number)]
    assert close(merged(matrices, weights, shrinkage=1.0), torch.tensordot(
        torch.tensor(weights, dtype=torch.float64) / sum(weights), torch.stack(matrices), dims=1))  # fmt: skip


def test_a_client_that_did_not_move_shares_no_direction_and_counts_in_the_mean() -> None:
    first, second = drawn(2, 0)
    still = torch.zeros_like(first)
    assert close(merged([first, still, second], epsilon=1e-12), merged([first, second], epsilon=1e-12))
    assert close(merged([first, still], shrinkage=1.0), first / 2)
    assert torch.equal(merged([still, still]), still)


@FORMS
@pytest.mark.parametrize("still", [1, 9, 99])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_clients_that_did_not_move_change_nothing_where_nothing_is_shrunk(
    form: type[CovarianceSum], still: int, epsilon: float
) -> None:
    moved = drawn(3, 0)
    sums = form()
    for matrix in [*moved, *[torch.zeros_like(moved[0])] * still]:
        sums.add(matrix, 2.0)
    mean = sum(moved, torch.zeros_like(moved[0])) / (3 + still)
    assert close(sums.result(mean, epsilon), merged(moved, [2.0] * 3, epsilon, form=form))


def test_without_clients_there_is_nothing() -> None:
    with pytest.raises(ValueError, match="no task vectors"):
        CovarianceSum().result(torch.zeros(2, 2), 1e-3)


# invariances


@given(SEEDS, CLIENTS, st.floats(1e-6, 1e6), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_order_of_clients_and_units_do_not_matter(seed: int, number: int, scale: float, shrinkage: float) -> None:
    matrices, weights = drawn(number, seed), [1.0 + client for client in range(number)]
    found = merged(matrices, weights, 1e-3, shrinkage)
    assert close(merged(matrices[::-1], weights[::-1], 1e-3, shrinkage), found)
    assert close(merged([scale * matrix for matrix in matrices], weights, 1e-3, shrinkage) / scale, found)
    assert close(merged(matrices, [scale * weight for weight in weights], 1e-3, shrinkage), found)
    assert 1 - 1e-9 <= overlap(matrices) <= number + 1e-9


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_single_precision_is_near_double(seed: int) -> None:
    """Of the size of real updates, at fewer directions than inputs, so that Σ w G is singular."""
    matrices = [1e-6 * matrix for matrix in drawn(3, seed, 8, 64)]
    exact = merged(matrices, epsilon=1e-3)
    found = merged([matrix.float() for matrix in matrices], epsilon=1e-3)
    assert float((found - exact).norm() / exact.norm()) < 1e-3
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("epsilon", "rank", "error"), [(1e-3, 8, 0.03), (1e-12, 8, 0.1), (1e-3, 64, 0.01)])
def test_singular_sums_are_solved_at_any_epsilon(epsilon: float, rank: int, error: float) -> None:
    left, right = drawn(2, 3, 1000, rank, torch.float32)
    matrix = left[:100] @ right.mT
    for number in (1, 5):
        found = merged([matrix] * number, epsilon=epsilon)
        assert float((found - matrix).norm() / matrix.norm()) < error


@given(SEEDS, CLIENTS)
@settings(max_examples=30, deadline=None)
def test_the_bounded_form_is_its_formula_and_its_shares_are_no_longer_than_their_task_vectors(
    seed: int, number: int
) -> None:
    matrices, weights = [each.numpy() for each in drawn(number, seed)], [1.0 + client for client in range(number)]
    grams = [weight / (own**2).sum() * own.T @ own for own, weight in zip(matrices, weights, strict=True)]
    whole = sum(grams) + 1e-2 * sum(weights) / 6 * np.eye(6)
    values, vectors = np.linalg.eigh(whole)
    root = vectors / np.sqrt(values) @ vectors.T
    shares = [own @ root @ gram @ root for own, gram in zip(matrices, grams, strict=True)]
    found = merged(drawn(number, seed), weights, 1e-2, form=BoundedSum)
    np.testing.assert_allclose(found.numpy(), sum(shares), rtol=1e-8, atol=1e-10)
    assert all(np.linalg.norm(share) <= np.linalg.norm(own) + 1e-9 for share, own in zip(shares, matrices, strict=True))


def test_least_squares_exceed_the_sum_where_like_inputs_have_unlike_updates_and_the_bounded_form_does_not() -> None:
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, -0.03]])
    assert float(merged([first, second], epsilon=1e-6).norm()) > 10
    assert float(merged([first, second], epsilon=1e-6, form=BoundedSum).norm()) < 2


# the objective itself


def objective(
    candidate: torch.Tensor, matrices: list[torch.Tensor], weights: list[float], epsilon: float, shrinkage: float
) -> torch.Tensor:
    inputs, total = candidate.shape[1], sum(weights)
    value = epsilon * total / inputs * candidate.square().sum()
    for matrix, weight in zip(matrices, weights, strict=True):
        away = candidate - matrix
        value = value + (1 - shrinkage) * weight / matrix.square().sum() * (away @ matrix.mT).square().sum()
        value = value + shrinkage / inputs * weight * away.square().sum()
    return value


@given(SEEDS, CLIENTS, st.floats(1e-3, 1), st.floats(0, 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_it_minimises_the_objective_on_the_support(
    seed: int, number: int, epsilon: float, shrinkage: float, masked: bool
) -> None:
    """The gradient, by automatic differentiation of the objective written out, is zero in every entry that may move."""
    support = drawn(1, seed + 1)[0] > (0.0 if masked else -torch.inf)
    matrices, weights = [each * support for each in drawn(number, seed)], [1.0 + client for client in range(number)]
    if not all(each.any() for each in matrices):
        return
    found = merged(matrices, weights, epsilon, shrinkage, support if masked else None).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found, matrices, weights, epsilon, shrinkage), found)
    assert float((gradient * support).abs().max()) < 1e-9
    assert not (found * ~support).any()


def test_a_row_without_updated_entries_stays() -> None:
    support = torch.ones(4, 6, dtype=torch.bool)
    support[2] = False
    matrices = [each * support for each in drawn(3, 0)]
    found = merged(matrices, epsilon=1e-3, support=support)
    np.testing.assert_array_equal(found[2], 0)
    assert close(found[0], merged(matrices, epsilon=1e-3)[0], 1e-9), "rows with all entries are those without a mask"


def test_the_gradient_is_that_of_the_first_term() -> None:
    matrices, candidate = drawn(3, 5), drawn(1, 6)[0].requires_grad_()
    sums = CovarianceSum()
    for matrix in matrices:
        sums.add(matrix)
    (expected,) = torch.autograd.grad(objective(candidate, matrices, [1.0] * 3, 0.0, 0.0), candidate)
    assert close(sums.gradient(candidate.detach()), expected, 1e-9)
