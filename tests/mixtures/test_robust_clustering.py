"""BR-IFCA, its attackers and its baseline against plain references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_taskarith.config.choices import ATTACKS, CLUSTER_RULES
from fl_taskarith.merging.attacks import corrupted, corrupted_groups, draw_byzantine
from fl_taskarith.merging.grouped import Groups
from fl_taskarith.merging.robust import aggregate_by, aggregate_groups, geometric_median
from fl_taskarith.mixtures.adversary import Adversary
from fl_taskarith.mixtures.matching import cluster_accuracy, mean_matched_distance
from fl_taskarith.mixtures.regression import Mixture
from fl_taskarith.mixtures.robust_clustering import Server, _centres, br_ifca, robust_k_means, two_stage

MIXTURE = Mixture(clients=60, clusters=3, dimension=8, examples=40, noise=0.3, centres="bernoulli", sizes="equal")


def run(rule: str, fraction: float, attack: str = "scaled-model", rounds: int = 60, placement: str = "spread",
        share: float | None = None) -> torch.Tensor:  # fmt: skip
    adversary = Adversary(MIXTURE, fraction, attack, placement)
    server = Server(rule, fraction if share is None else share, MIXTURE.start("ball", 0.25))
    points = adversary.points_of(range(60))
    return br_ifca(points, [server], adversary, scale=10.0, step=0.1, rounds=rounds)[0]


def ifca(rounds: int) -> torch.Tensor:
    """Ghosh et al.'s gradient averaging, in plain loops."""
    theta = MIXTURE.start("ball", 0.25).clone()
    points = MIXTURE.all_points()
    for _ in range(rounds):
        sums, counts = torch.zeros_like(theta), [0] * 3
        for x, y in zip(points.inputs, points.outputs, strict=True):
            best = min(range(3), key=lambda k: float((y - x @ theta[k]).square().sum()))
            sums[best] += x.T @ (x @ theta[best] - y) / 40
            counts[best] += 1
        theta -= 0.1 * sums / torch.tensor(counts)[:, None]
    return theta


def test_without_attackers_the_mean_is_ifca() -> None:
    assert torch.allclose(run("mean", 0.0, rounds=30), ifca(30), atol=1e-12)


def test_without_attackers_every_rule_finds_the_clusters() -> None:
    start = mean_matched_distance(MIXTURE.start("ball", 0.25), MIXTURE.truth)
    for rule in CLUSTER_RULES:
        assert mean_matched_distance(run(rule, 0.0, rounds=100, share=0.1), MIXTURE.truth) < start, rule


def test_servers_that_share_a_pass_do_not_see_each_other() -> None:
    adversary = Adversary(MIXTURE, 0.1, "sign-flip")
    points, start = adversary.points_of(range(60)), MIXTURE.start("ball", 0.25)
    servers = [Server(rule, 0.1, start) for rule in CLUSTER_RULES]
    together = br_ifca(points, servers, adversary, scale=3.0, step=0.1, rounds=10)
    for index, server in enumerate(servers):
        alone = br_ifca(points, [server], adversary, scale=3.0, step=0.1, rounds=10)[0]
        assert torch.allclose(together[index], alone, rtol=0, atol=1e-12), server.rule


@pytest.mark.parametrize("attack", ["scaled-model", "sign-flip", "inner-product"])
def test_robust_rules_survive_what_ruins_the_mean(attack: str) -> None:
    honest = mean_matched_distance(run("mean", 0.0), MIXTURE.truth)
    assert mean_matched_distance(run("mean", 0.1, attack), MIXTURE.truth) > 2 * honest
    for rule in ("median", "trimmed-mean", "geometric-median"):
        assert mean_matched_distance(run(rule, 0.1, attack), MIXTURE.truth) < 1.5 * honest, rule


def test_attackers_on_one_cluster_beat_a_share_that_holds_when_they_are_spread() -> None:
    spread, gathered = (run("trimmed-mean", 0.2, placement=placement) for placement in ("spread", "one-cluster"))
    lengths = [(theta - MIXTURE.truth).norm(dim=1) for theta in (spread, gathered)]
    assert lengths[1][0] > 3 * lengths[0][0]


def test_an_empty_cluster_stays() -> None:
    start = MIXTURE.start("ball", 0.25)
    start[2] = 100.0
    adversary = Adversary(MIXTURE, 0.0, "sign-flip")
    after = br_ifca(MIXTURE.all_points(), [Server("median", 0.0, start)], adversary, scale=1.0, step=0.1, rounds=5)[0]
    assert torch.equal(after[2], start[2])
    assert not torch.equal(after[0], start[0])


# attackers


def test_attackers_are_spread_evenly_and_drawn() -> None:
    groups = np.arange(400) % 10
    drawn = draw_byzantine(groups, 0.05, seed=0)
    assert np.bincount(groups[drawn]).tolist() == [2] * 10
    assert (drawn != draw_byzantine(groups, 0.05, seed=1)).any()
    assert not draw_byzantine(groups, 0.0, seed=0).any()


def test_spoilt_data_are_the_attackers_alone() -> None:
    for attack in ("scaled-model", "random-labels"):
        adversary = Adversary(MIXTURE, 0.2, attack)
        honest, points = MIXTURE.all_points(), adversary.points_of(range(60))
        changed = (honest.outputs != points.outputs).any(1)
        assert torch.equal(changed, adversary.byzantine)
        assert int(changed.sum()) == 12
        assert torch.equal(points.outputs[5], adversary.points_of([5]).outputs[0])


def test_the_attacks_are_their_formulas() -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 3)))
    vectors = [{"a": row[:2], "b": row[2:]} for row in rows]
    everybody = [*vectors, *vectors[:4]]
    byzantine = [False] * 8 + [True] * 4
    assert torch.equal(corrupted(everybody, byzantine, "sign-flip", 4.0)[8]["b"], -4 * rows[0, 2:])
    assert torch.allclose(corrupted(everybody, byzantine, "inner-product", 0.5)[8]["a"], -0.5 * rows.mean(0)[:2])
    z = stats.norm.ppf((8 - 4) / 8 + (4 - (12 // 2 + 1 - 4)) / 8)  # n = 12, f = 4: s = 3 of 8 honest, share 5/8
    expected = rows.numpy().mean(0) - z * rows.numpy().std(0)
    lie = corrupted(everybody, byzantine, "alie", 1.0)[11]
    assert torch.cat([lie["a"], lie["b"]]).numpy() == pytest.approx(expected)


def test_only_byzantine_reports_change_and_data_attacks_change_none() -> None:
    vectors = [{"a": torch.full((2,), float(value))} for value in range(4)]
    byzantine = [False, True, False, True]
    for attack in ("sign-flip", "alie", "inner-product"):
        sent = corrupted(vectors, byzantine, attack, 2.0)
        assert [one is other for one, other in zip(sent, vectors, strict=True)] == [True, False, True, False]
    assert corrupted(vectors, byzantine, "random-labels", 2.0) == vectors
    assert float(corrupted(vectors, [True] * 4, "alie", 2.0)[3]["a"][0]) == -6.0, "nobody honest to hide among"


# rules and baseline


@pytest.mark.parametrize("rule", CLUSTER_RULES)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_every_rule_takes_any_number_of_vectors(rule: str, number: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(number).standard_normal((number, 5)))
    found = aggregate_by(rule, [{"a": row} for row in rows], [1.0] * number, 0.2)["a"]
    assert found.dtype == torch.float64
    assert (found >= rows.min(0).values - 1e-12).all()
    assert (found <= rows.max(0).values + 1e-12).all()
    if rule in ("median", "trimmed-mean"):
        expected = np.median(rows, axis=0) if rule == "median" else stats.trim_mean(rows.numpy(), 0.2, axis=0)
        assert found.numpy() == pytest.approx(expected)


def drawn_groups(number: int, groups: int, dimension: int, seed: int) -> tuple[torch.Tensor, Groups]:
    """Vectors of which some lie together, in groups of any sizes from 1."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((number, dimension)) * generator.choice([1.0, 1e3], (number, 1), p=[0.9, 0.1])
    rows[generator.random(number) < 0.2] = rows[0]
    owner = np.concatenate([np.arange(groups), generator.integers(0, groups, number - groups)])
    return torch.from_numpy(rows), Groups(torch.from_numpy(generator.permutation(owner)), groups)


@pytest.mark.parametrize("rule", CLUSTER_RULES)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.3, 0.45]),
       st.integers(0, 10_000))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_groups_together_are_the_groups_one_by_one(
    rule: str, more: int, groups: int, dimension: int, share: float, seed: int
) -> None:
    rows, of = drawn_groups(groups + more, groups, dimension, seed)
    together = aggregate_groups(rule, rows, of, share)
    for group in range(groups):
        own = rows[of.owner == group]
        alone = aggregate_by(rule, [{"a": row} for row in own], [1.0] * len(own), share)["a"]
        if rule == "geometric-median":  # two vectors have a segment of them: any is right
            totals = [float((own - point).norm(dim=1).sum()) for point in (together[group], alone)]
            assert totals[0] == pytest.approx(totals[1], rel=1e-12)
        else:
            assert torch.allclose(together[group], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", sorted(set(CLUSTER_RULES) - {"mean"}))
def test_what_is_not_finite_stays_in_its_group(rule: str) -> None:
    rows, of = drawn_groups(20, 2, 3, 0)
    rows[of.owner == 1] = torch.randn(int((of.owner == 1).sum()), 3, dtype=torch.float64)
    calm = aggregate_groups(rule, rows, of, 0.2)
    rows[int((of.owner == 0).nonzero()[0])] = torch.nan
    found = aggregate_groups(rule, rows, of, 0.2)
    assert found.isfinite().all()
    assert torch.allclose(found[1], calm[1], rtol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_attackers_see_their_own_group_alone(attack: str, more: int, groups: int, seed: int) -> None:
    rows, of = drawn_groups(groups + more, groups, 3, seed)
    byzantine = torch.from_numpy(np.random.default_rng(seed).random(len(rows)) < 0.4)
    sent = corrupted_groups(rows, byzantine, of, attack, 2.0)
    for group in range(groups):
        own = of.owner == group
        expected = corrupted([{"a": row} for row in rows[own]], byzantine[own].tolist(), attack, 2.0)
        assert torch.allclose(sent[own], torch.stack([vector["a"] for vector in expected]), rtol=1e-12, atol=1e-9)


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_centre_is_the_mean_of_those_near_the_median(number: int, clusters: int, share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    vectors = torch.from_numpy(generator.standard_normal((number, 4)))
    labels = torch.from_numpy(generator.integers(0, clusters, number))
    empty = torch.zeros(clusters, 4, dtype=torch.float64)
    found = _centres(vectors, labels, share, empty)
    for cluster in range(clusters):
        members = vectors[labels == cluster]
        if not len(members):
            assert torch.equal(found[cluster], empty[cluster])
            continue
        middle = geometric_median([{"a": row} for row in members])["a"]
        nearest = (members - middle).norm(dim=1).argsort(stable=True)[: len(members) - int(share * len(members))]
        assert torch.allclose(found[cluster], members[nearest].mean(0), rtol=1e-9, atol=1e-12)


def test_robust_k_means_ignores_far_outliers() -> None:
    generator = np.random.default_rng(3)
    centres = 10 * np.eye(3, 4)
    vectors = np.concatenate([centres[index % 3] + generator.standard_normal((1, 4)) for index in range(60)])
    vectors[:3] += 40.0
    found, labels = robust_k_means(torch.from_numpy(vectors), 3, 0.1, np.random.default_rng(0))
    assert mean_matched_distance(found, torch.from_numpy(centres)) < 1.0
    assert cluster_accuracy(labels[3:], torch.arange(3, 60) % 3, 3) == 1.0


def test_two_stage_finds_well_separated_clusters_without_a_start() -> None:
    adversary = Adversary(MIXTURE, 0.1, "scaled-model")
    points = adversary.points_of(range(60))
    server = two_stage(points, 3, 0.1, np.random.default_rng(0))
    after = br_ifca(points, [server], adversary, scale=1.0, step=0.1, rounds=60)[0]
    assert cluster_accuracy(server.labels[~adversary.byzantine], MIXTURE.assignment[~adversary.byzantine], 3) > 0.95
    assert mean_matched_distance(after, MIXTURE.truth) < 0.15


def test_attackers_data_are_what_their_attack_says() -> None:
    mixture = Mixture(20, 2, 8, 2000, 0.3, centres="bernoulli", sizes="equal")
    for attack in ("random-labels", "scaled-model"):
        adversary = Adversary(mixture, 0.2, attack)
        bad, points = adversary.byzantine, adversary.points_of(range(20))
        own = torch.linalg.solve(points.grams, points.moments)[bad]
        if attack == "random-labels":
            spread = float(mixture.all_points().outputs[bad].std())
            assert float(points.outputs[bad].std()) == pytest.approx(spread, rel=0.05)
            assert (own.norm(dim=1) < 0.15).all()
        else:
            assert torch.allclose(own.norm(dim=1), torch.tensor(3.0, dtype=torch.float64), atol=0.05)
            assert adversary.magnified.tolist() == [3.0 if each else 1.0 for each in bad]


def test_few_attackers_of_alie_hide_at_the_mean() -> None:
    """Of n = 12 with one attacker, s = 6 and the share 5/11 lies below one half."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((12, 3)))
    lie = corrupted([{"a": row} for row in rows], [False] * 11 + [True], "alie", 1.0)[11]["a"]
    assert torch.allclose(lie, rows[:11].mean(0))
