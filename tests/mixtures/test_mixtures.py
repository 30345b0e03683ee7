"""Federated EM and IFCA on regressions against closed forms and slow, plain references."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from fl_taskarith.mixtures.clustering import FREE, ClusterChoice, client_reports, gradients_at, spectral_bounds
from fl_taskarith.mixtures.expectation_maximisation import (
    Statistics,
    expectation,
    federated_em,
    largest_move,
    maximisation,
    pooled_em,
    statistics,
)
from fl_taskarith.mixtures.matching import (
    cluster_accuracy,
    largest_matched_distance,
    mean_matched_distance,
    mean_nearest_distance,
)
from fl_taskarith.mixtures.regression import Mixture

SMALL = Mixture(clients=12, clusters=3, dimension=4, examples=6, noise=0.5)


def least_squares(mixture: Mixture) -> torch.Tensor:
    """Of every cluster's pooled data, by the true assignment: [K, d]."""
    points = mixture.all_points()
    solutions = []
    for cluster in range(mixture.clusters):
        own = mixture.assignment == cluster
        inputs, outputs = points.inputs[own].flatten(0, 1).numpy(), points.outputs[own].flatten().numpy()
        solutions.append(torch.from_numpy(np.linalg.lstsq(inputs, outputs, rcond=None)[0]))
    return torch.stack(solutions)


# data


def test_a_clients_data_depend_on_nothing_but_the_seed_and_its_number() -> None:
    many = Mixture(clients=40, clusters=3, dimension=4, examples=6, noise=0.5)
    own = many.points_of([7])
    assert torch.equal(own.inputs[0], SMALL.all_points().inputs[7])
    assert torch.equal(own.outputs[0], SMALL.all_points().outputs[7])
    assert not torch.equal(own.inputs, replace(many, seed=1).points_of([7]).inputs)


def test_the_truth_has_the_asked_separations() -> None:
    truth = Mixture(1, 4, 6, 5, 1.0, separation=2.0, farthest=5.0).truth
    distances = [float((truth[a] - truth[b]).norm()) for a, b in itertools.combinations(range(4), 2)]
    assert sorted(distances) == pytest.approx([2, 2, 2, 5, 5, 5])
    bernoulli = Mixture(1, 15, 20, 5, 1.0, centres="bernoulli")
    assert torch.allclose(bernoulli.truth.norm(dim=1), torch.ones(15, dtype=torch.float64))
    assert bernoulli.least_separation > 0
    assert all(len(row.unique()) == 2 for row in bernoulli.truth)


def test_a_start_lies_in_the_ball() -> None:
    for seed in range(20):
        mixture = replace(SMALL, seed=seed)
        away = (mixture.start("ball", 0.25) - mixture.truth).norm(dim=1)
        assert (away > 0).all()
        assert (away <= 0.25 * mixture.least_separation * (1 + 1e-12)).all()


def test_inputs_are_isotropic_and_outputs_have_the_asked_noise() -> None:
    mixture = Mixture(clients=2000, clusters=2, dimension=3, examples=10, noise=0.7)
    points = mixture.all_points()
    covariance = points.grams.sum(0) / 20_000
    assert torch.allclose(covariance, torch.eye(3, dtype=torch.float64), atol=0.05)
    residuals = points.outputs - torch.einsum("gnd,gd->gn", points.inputs, mixture.truth[mixture.assignment])
    assert residuals.std() == pytest.approx(0.7, rel=0.03)
    assert mixture.assignment.bincount().tolist() == pytest.approx([1000, 1000], rel=0.1)


# federated EM


def test_expectation_equals_bayes_rule_written_out() -> None:
    points, theta = SMALL.all_points(), SMALL.start("ball", 0.25)
    responsibilities, loss = expectation(points, theta, 0.5)
    for client in range(12):
        x, y = points.inputs[client].numpy(), points.outputs[client].numpy()
        logs = [norm.logpdf(y, x @ row.numpy(), 0.5).sum() - math.log(3) for row in theta]
        assert responsibilities[client].numpy() == pytest.approx(np.exp(logs - logsumexp(logs)), abs=1e-12)
        assert float(loss[client]) == pytest.approx(-logsumexp(logs) / 6)


def test_expectation_survives_exponents_that_exp_cannot_take() -> None:
    mixture = Mixture(clients=4, clusters=3, dimension=4, examples=4000, noise=1e-3)
    responsibilities, loss = expectation(mixture.all_points(), mixture.start("ball", 0.25), 1e-3)
    assert torch.equal(responsibilities.argmax(1), mixture.assignment)
    assert torch.equal(responsibilities.sum(1), torch.ones(4, dtype=torch.float64))
    assert torch.isfinite(loss).all()


def test_statistics_of_all_clients_are_the_sum_of_each_ones() -> None:
    points = SMALL.all_points()
    responsibilities, _ = expectation(points, SMALL.truth, 0.5)
    together = statistics(points, responsibilities)
    total = None
    for client in range(12):
        own = SMALL.points_of([client])
        each = statistics(own, expectation(own, SMALL.truth, 0.5)[0])
        total = each if total is None else total + each
    assert torch.allclose(together.grams, total.grams, rtol=1e-12, atol=1e-12)
    assert torch.allclose(together.moments, total.moments, rtol=1e-12, atol=1e-12)


def test_maximisation_leaves_undetermined_directions_alone() -> None:
    theta = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    grams = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    moments = torch.tensor([[10.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(maximisation(Statistics(grams, moments), theta),
                          torch.tensor([[5.0, 2.0], [3.0, 4.0]], dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_with_well_separated_clusters_em_is_least_squares_per_cluster(seed: int) -> None:
    mixture = Mixture(clients=60, clusters=3, dimension=5, examples=30, noise=0.05, seed=seed)
    found = federated_em(mixture.all_points(), mixture.start("ball", 0.25), 0.05, 1e-12, 50)
    assert found.converged
    assert torch.allclose(found.thetas[-1], least_squares(mixture), atol=1e-9)


def test_with_one_point_per_client_federated_and_pooled_em_are_the_same() -> None:
    mixture = Mixture(clients=80, clusters=2, dimension=3, examples=1, noise=0.3)
    points, start = mixture.all_points(), mixture.start("ball", 0.25)
    by_client, by_point = (run(points, start, 0.3, 1e-10, 40) for run in (federated_em, pooled_em))
    assert by_client.iterations == by_point.iterations
    assert torch.allclose(by_client.thetas[-1], by_point.thetas[-1], atol=1e-10)


def test_the_likelihood_never_falls() -> None:
    mixture = Mixture(clients=50, clusters=3, dimension=4, examples=3, noise=0.6)
    points = mixture.all_points()
    thetas = federated_em(points, mixture.start("ball", 0.25), 0.6, 1e-10, 60).thetas
    losses = [float(expectation(points, theta, 0.6)[1].mean()) for theta in thetas]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


# matching


def squares(size: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=size, max_size=size)


square = st.integers(1, 5).flatmap(lambda size: st.tuples(squares(size), squares(size)))


@settings(deadline=None)
@given(square)
def test_matched_distances_equal_a_search_through_all_permutations(pair: tuple[list[list[float]], ...]) -> None:
    estimates, truth = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    lengths = [[float((estimates[k] - truth[j]).norm()) for k, j in enumerate(order)]
               for order in itertools.permutations(range(len(truth)))]  # fmt: skip
    assert largest_matched_distance(estimates, truth) == pytest.approx(min(map(max, lengths)), abs=1e-12)
    assert mean_matched_distance(estimates, truth) == pytest.approx(min(map(np.mean, lengths)), abs=1e-12)
    assert mean_nearest_distance(estimates, truth) <= mean_matched_distance(estimates, truth) + 1e-12


def test_the_nearest_distance_hides_a_duplicated_cluster_and_the_matched_one_does_not() -> None:
    truth = torch.tensor([[0.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    twice = torch.zeros(2, 2, dtype=torch.float64)
    assert mean_nearest_distance(twice, truth) == 0
    assert mean_matched_distance(twice, truth) == 1.5


def test_cluster_accuracy_does_not_mind_names() -> None:
    true = torch.tensor([0, 0, 1, 1, 2, 2])
    assert cluster_accuracy(torch.tensor([2, 2, 0, 0, 1, 1]), true, 3) == 1
    assert cluster_accuracy(torch.tensor([2, 2, 0, 0, 0, 0]), true, 3) == pytest.approx(4 / 6)


# IFCA


def test_client_reports_equal_the_formulas_client_by_client() -> None:
    points = SMALL.all_points()
    thetas = torch.stack([SMALL.start("ball", radius) for radius in (0.2, 1.0)])
    assigned = torch.full((2, 12), FREE)
    assigned[1, 3] = 2
    magnified = torch.ones(12, dtype=torch.float64)
    magnified[5] = 3.0
    reports = client_reports(points, thetas, assigned, magnified)
    for server, client in itertools.product(range(2), range(12)):
        x, y = points.inputs[client], points.outputs[client]
        residuals = [x @ theta * magnified[client] - y for theta in thetas[server]]
        losses = [float(residual @ residual) / 12 for residual in residuals]
        cluster = 2 if (server, client) == (1, 3) else int(np.argmin(losses))
        told = reports[server]
        assert told.clusters[client] == cluster
        assert float(told.losses[client]) == pytest.approx(losses[cluster])
        assert torch.allclose(told.gradients[client], x.T @ residuals[cluster] / 6)


def test_the_reported_gradient_is_that_of_the_reported_loss() -> None:
    points = SMALL.all_points()
    thetas = SMALL.start("ball", 0.3)[None].requires_grad_()
    told = client_reports(points, thetas.detach())[0]
    for client in range(12):
        loss = (points.outputs[client] - points.inputs[client] @ thetas[0, told.clusters[client]]).square().mean() / 2
        (gradient,) = torch.autograd.grad(loss, thetas)
        assert torch.allclose(gradient[0, told.clusters[client]], told.gradients[client])


@pytest.mark.parametrize("dimension", [4, 30])
def test_gradients_at_given_clusters_are_those_of_the_reports(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_taskarith.mixtures.clustering.CHUNK_BYTES", 5 * 6 * dimension * 8)  # 5 clients at a time
    mixture = Mixture(clients=12, clusters=3, dimension=dimension, examples=6, noise=0.3, centres="bernoulli")
    points, magnified = mixture.all_points(), torch.ones(12, dtype=torch.float64)
    magnified[5] = 3.0
    thetas = torch.stack([mixture.start("ball", radius) for radius in (0.2, 1.0)])
    reports = client_reports(points, thetas, None, magnified)
    gradients = gradients_at(points, thetas, torch.stack([told.clusters for told in reports]), magnified)
    for told, gradient in zip(reports, gradients, strict=True):
        assert torch.allclose(told.gradients, gradient, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 5), st.sampled_from([3, 8, 20]), st.floats(1e-3, 1.0), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_choices_that_are_followed_are_those_of_all_losses(
    clusters: int, dimension: int, step: float, seed: int
) -> None:
    mixture = Mixture(30, clusters, dimension, examples=10, noise=0.3, centres="bernoulli", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    points, thetas = mixture.all_points(), torch.stack([mixture.start("ball", 0.5), mixture.start("random", 0.0)])
    assigned = torch.full((2, 30), FREE)
    assigned[1, :5] = 0
    magnified = torch.ones(30, dtype=torch.float64)
    magnified[3:8] = 3.0
    choice = ClusterChoice(points, assigned, magnified)
    for _ in range(20):
        expected = torch.stack([told.clusters for told in client_reports(points, thetas, assigned, magnified)])
        assert torch.equal(choice.follow(thetas), expected)
        thetas = thetas + step * torch.randn(thetas.shape, generator=generator, dtype=torch.float64)


def test_settled_choices_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture(30, 3, 8, examples=40, noise=0.1, centres="bernoulli")
    choice = ClusterChoice(mixture.all_points(), torch.full((1, 30), FREE))
    first = choice.follow(mixture.truth[None])
    monkeypatch.setattr(choice, "_measure", lambda *_: pytest.fail("measured again"))
    assert torch.equal(choice.follow(mixture.truth[None] + 1e-3), first)


@pytest.mark.parametrize("examples", [5, 40])
def test_the_spectral_bound_is_above_the_norm_and_near_it(examples: int) -> None:
    inputs = Mixture(6, 2, 12, examples=examples, noise=0.1, centres="bernoulli").all_points().inputs
    ratio = spectral_bounds(inputs) / torch.linalg.matrix_norm(inputs, ord=2)
    assert (ratio >= 1).all()
    assert (ratio < 1.3).all()


def test_iterations_end_with_the_slowest_cluster() -> None:
    assert largest_move(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.zeros(2, 2)) == 5.0
    mixture = Mixture(clients=60, clusters=3, dimension=4, examples=3, noise=0.6)
    found = federated_em(mixture.all_points(), mixture.start("ball", 0.25), 0.6, 1e-6, 500)
    assert found.converged and float((found.thetas[-1] - found.thetas[-2]).norm(dim=1).max()) <= 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_bernoulli_centres_are_all_different(seed: int) -> None:
    assert len(Mixture(1, 3, 2, 5, 1.0, centres="bernoulli", seed=seed).truth.unique(dim=0)) == 3


def test_more_centres_than_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="no 4 different vectors of 0 and 1 in dimension 2"):
        _ = Mixture(1, 4, 2, 5, 1.0, centres="bernoulli").truth
