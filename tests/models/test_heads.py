from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from fl_taskarith.models.heads import (
    RIDGE_GRID,
    SHRINKAGE_GRID,
    DiscriminantSolver,
    RidgeSolver,
    RidgeStatistics,
    choose_strength,
    fit_logit_scale,
    nearest_class_mean,
)


def problem(count: int = 300, width: int = 12, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    scale = torch.logspace(-2, 2, width)
    return (centres[labels] + torch.randn(count, width, generator=generator)) * scale + 3.0, labels


@pytest.mark.parametrize("ridge_lambda", [1e-2, 1.0, 100.0, 1e5])
def test_the_head_equals_scikit_learns_ridge_on_standardised_features(ridge_lambda: float) -> None:
    features, labels = problem()
    head = RidgeSolver(RidgeStatistics.of(features, labels, 5)).solve(ridge_lambda)
    scaler = StandardScaler().fit(features.double().numpy())
    reference = Ridge(alpha=ridge_lambda).fit(
        scaler.transform(features.double().numpy()), functional.one_hot(labels, 5).double().numpy()
    )
    expected = reference.predict(scaler.transform(features.double().numpy()))
    assert np.allclose(head.scores(features).numpy(), expected, rtol=1e-8, atol=1e-10)


@given(st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_federated_head_equals_the_pooled_one_however_the_data_are_divided(clients: int, seed: int) -> None:
    features, labels = problem(seed=seed)
    order = torch.argsort(labels) if seed % 2 else torch.randperm(len(labels))  # by class: the worst skew
    parts = [RidgeStatistics.of(features[part], labels[part], 5) for part in order.tensor_split(clients)]
    pooled = RidgeStatistics.of(features, labels, 5)
    for solve in (lambda sums: RidgeSolver(sums).solve(10.0), lambda sums: DiscriminantSolver(sums).solve(0.1),
                  nearest_class_mean):  # fmt: skip
        for name in ("weight", "bias"):
            mine, theirs = (getattr(solve(sums), name) for sums in (reduce(add, parts), pooled))
            assert mine.dtype == torch.float64
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("shrinkage", [1e-4, 0.1, 0.7, 1.0])
def test_lda_equals_scikit_learns_on_standardised_features(shrinkage: float) -> None:
    features, labels = problem(count=200)
    points = StandardScaler().fit_transform(features.double().numpy())
    head = DiscriminantSolver(RidgeStatistics.of(features, labels, 5)).solve(shrinkage)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(points, labels.numpy())
    factor = (200 - 5) / 200  # scikit-learn divides the covariance by n, where n - c leaves no bias
    priors = torch.from_numpy(np.log(reference.priors_))
    mine = (head.scores(features) - priors) / factor + priors
    assert np.allclose(mine.log_softmax(1).numpy(), reference.predict_log_proba(points), rtol=1e-6, atol=1e-6)


def test_at_full_shrinkage_and_equal_priors_lda_is_the_nearest_class_mean() -> None:
    features, _ = problem()
    labels = torch.arange(len(features)) % 5
    statistics = RidgeStatistics.of(features, labels, 5)
    nearest, lda = nearest_class_mean(statistics), DiscriminantSolver(statistics).solve(1.0)
    ratio = float(lda.weight.norm() / nearest.weight.norm())
    differences = (head.bias - head.bias.mean() for head in (lda, nearest.scaled(ratio)))
    assert torch.allclose(lda.weight, nearest.scaled(ratio).weight)
    assert torch.allclose(*differences)
    points = StandardScaler().fit_transform(features.double().numpy())
    reference = NearestCentroid().fit(points, labels.numpy()).predict(points)
    assert nearest.scores(features).argmax(1).tolist() == reference.tolist()


@given(st.integers(0, 1000), st.sampled_from([1e-4, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_a_class_without_examples_is_never_predicted(seed: int, shrinkage: float) -> None:
    features, labels = problem(count=60, seed=seed)
    absent = seed % 5
    present = labels != absent
    statistics = RidgeStatistics.of(features[present], labels[present], 5)
    anywhere = 100 * torch.randn(300, features.shape[1], generator=torch.Generator().manual_seed(seed))
    for head in (DiscriminantSolver(statistics).solve(shrinkage), nearest_class_mean(statistics)):
        scores = head.scores(torch.cat([features, anywhere]))
        assert scores.isfinite().all()
        assert (scores.argmax(1) != absent).all()


@pytest.mark.parametrize("count", [1, 5])
def test_one_example_per_class_says_nothing_of_the_spread(count: int) -> None:
    features, labels = problem(count=count)[0], torch.arange(count)
    head = DiscriminantSolver(RidgeStatistics.of(features, labels, 5)).solve(0.1)
    assert head.weight.isfinite().all() and head.bias.isfinite().all()
    assert head.scores(features).argmax(1).tolist() == labels.tolist()


def test_the_shrinkage_is_the_best_of_its_grid_and_no_edge_at_one(caplog: pytest.LogCaptureFixture) -> None:
    features, labels = problem(count=60, width=40)
    held_out, held_labels = problem(count=200, width=40, seed=1)
    solver = DiscriminantSolver(RidgeStatistics.of(features, labels, 5))
    accuracies = {g: (solver.solve(g).scores(held_out).argmax(1) == held_labels).double().mean().item()
                  for g in SHRINKAGE_GRID}  # fmt: skip
    assert accuracies[choose_strength(solver, held_out, held_labels)] == max(accuracies.values())
    easy = torch.eye(4).repeat(10, 1)
    solver = DiscriminantSolver(RidgeStatistics.of(easy, torch.arange(40) % 4, 4))
    assert choose_strength(solver, easy, torch.arange(40) % 4) == 1.0
    assert "lda-shrinkage = 1" not in caplog.text


def test_a_constant_feature_gets_no_weight_and_no_nan() -> None:
    solvers = (lambda sums: RidgeSolver(sums).solve(1.0), lambda sums: DiscriminantSolver(sums).solve(0.1),
               nearest_class_mean)  # fmt: skip
    features, labels = problem()
    for constant in (7.25, 0.1, -1e4, 3e-7):
        features[:, 4] = constant
        for parts in (1, 7, 50):  # the more partial sums, the more rounding in a variance that should be zero
            statistics = [
                RidgeStatistics.of(*part, 5)
                for part in zip(features.tensor_split(parts), labels.tensor_split(parts), strict=True)
            ]
            for head in (solve(reduce(add, statistics)) for solve in solvers):
                assert torch.isfinite(head.weight).all()
                assert (head.weight[:, 4] == 0).all()
                assert (head.weight[:, 5] != 0).all()


def test_lambda_is_the_best_of_the_grid_on_validation() -> None:
    features, labels = problem(count=60, width=40)
    held_out, held_labels = problem(count=200, width=40, seed=1)
    solver = RidgeSolver(RidgeStatistics.of(features, labels, 5))
    accuracies = {
        ridge_lambda: (solver.solve(ridge_lambda).scores(held_out).argmax(1) == held_labels).double().mean().item()
        for ridge_lambda in RIDGE_GRID
    }
    chosen = choose_strength(solver, held_out, held_labels)
    assert accuracies[chosen] == max(accuracies.values())


def test_the_logit_scale_minimises_the_cross_entropy() -> None:
    features, labels = problem()
    scores = RidgeSolver(RidgeStatistics.of(features, labels, 5)).solve(1.0).scores(features)
    scale = fit_logit_scale(scores, labels)
    best = functional.cross_entropy(scores * scale, labels)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert functional.cross_entropy(scores * scale * factor, labels) > best


def noisy_scores(count: int, errors: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores near 0 and 1 as a ridge head's, of which the first `errors` are highest for another class."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % classes
    scores = 0.1 * torch.rand(count, classes, generator=generator, dtype=torch.float64)
    predicted = torch.where(torch.arange(count) < errors, (labels + 1) % classes, labels)
    scores[torch.arange(count), predicted] += 0.6
    return scores, labels


@pytest.mark.parametrize("count", [1, 30, 5000])
def test_without_an_error_the_scale_is_the_smallest_that_laplaces_rule_allows(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    scores, labels = noisy_scores(count, 0)
    scale = fit_logit_scale(scores, labels)
    assert functional.cross_entropy(scores * scale, labels).item() == pytest.approx(np.log((count + 2) / (count + 1)))
    assert scale < 30
    assert f"The {count} validation images do not determine logit-scale" in caplog.text
    assert f"{scale:.4g}" in caplog.text


def test_with_errors_the_scale_is_the_minimum_as_it_always_was(caplog: pytest.LogCaptureFixture) -> None:
    for count, errors in ((30, 1), (180, 4), (5000, 1), (5000, 900)):
        scores, labels = noisy_scores(count, errors)

        def loss(log_scale: float, scores: torch.Tensor = scores, labels: torch.Tensor = labels) -> float:
            return functional.cross_entropy(scores * float(np.exp(log_scale)), labels).item()

        found = minimize_scalar(loss, bounds=(-5.0, 8.0), method="bounded", options={"xatol": 1e-6})
        assert fit_logit_scale(scores, labels) == float(np.exp(found.x)), "bit for bit"
    assert not caplog.text


def test_an_error_too_narrow_to_bound_the_scale_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    scores, labels = noisy_scores(30, 0)
    scores[0] = 0.0
    scores[0, (labels[0] + 1) % 10] = 1e-9
    assert fit_logit_scale(scores, labels) < 100
    assert "do not determine logit-scale" in caplog.text


def test_a_head_no_better_than_chance_gets_the_least_scale_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert fit_logit_scale(*noisy_scores(40, 40)) == pytest.approx(np.exp(-5), rel=1e-3)
    assert "no more than chance" in caplog.text


def test_a_split_of_one_class_or_constant_scores_give_a_finite_scale(caplog: pytest.LogCaptureFixture) -> None:
    scores, _ = noisy_scores(20, 0)
    for case in (torch.ones(20, 1), torch.full((20, 10), 0.1), torch.zeros(1, 10)):
        assert 0 < fit_logit_scale(case, torch.zeros(len(case), dtype=torch.long)) <= 30
    scores[:, 3] = 1.0
    assert 0 < fit_logit_scale(scores, torch.full((20,), 3)) < 30
    assert len(caplog.records) == 4


def test_a_penalty_at_the_edge_of_the_grid_is_told(caplog: pytest.LogCaptureFixture) -> None:
    features = torch.eye(4).repeat(10, 1)
    labels = torch.arange(40) % 4
    solver = RidgeSolver(RidgeStatistics.of(features, labels, 4))
    assert choose_strength(solver, features, labels) == RIDGE_GRID[-1], "all are right, and ties go to the largest"
    assert "lies at the edge of the searched grid" in caplog.text


def test_scaling_a_head_scales_its_scores() -> None:
    features, labels = problem()
    head = RidgeSolver(RidgeStatistics.of(features, labels, 5)).solve(1.0)
    assert torch.allclose(head.scaled(3.0).scores(features), 3.0 * head.scores(features))
