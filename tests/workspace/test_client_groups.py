"""Image runs whose clients see images differently or are attackers, and K cluster models over them."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import final_weights, numbers, power_cut, same_bits
from safetensors.torch import load_file

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import ConfigError
from fl_taskarith.workspace.clusters import split_clusters, start_clusters
from fl_taskarith.workspace.global_model import GlobalModel
from fl_taskarith.workspace.views import as_seen_by, as_trained_on, byzantine_clients, pooled, views
from fl_taskarith.workspace.workspace import workspace

IMAGES = ImageSet(torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4), torch.tensor([0, 1]))
IFCA = {"strategy": "br-ifca", "cluster_rule": "mean"}


def config_of(**settings: object) -> Config:
    return load(overrides=settings)


# groups


def test_groups_see_the_same_images_in_their_own_way() -> None:
    config = config_of(client_groups="rotations")
    seen = [as_seen_by(config, partition, IMAGES).images for partition in range(5)]
    assert torch.equal(seen[0], IMAGES.images)
    assert torch.equal(seen[4], IMAGES.images), "client 4 is in the group of client 0"
    assert torch.equal(seen[1][0, 0, :, 0], IMAGES.images[0, 0, 0].flip(0)), "a quarter turn to the left"
    assert torch.equal(seen[2].flip(-1, -2), IMAGES.images)
    assert torch.equal(torch.rot90(seen[3], 1, (-2, -1)), IMAGES.images)
    inverted = as_seen_by(config_of(client_groups="inverted"), 1, IMAGES).images
    assert torch.equal(inverted.int() + IMAGES.images.int(), torch.full_like(IMAGES.images, 255).int())


def test_without_groups_nothing_is_copied() -> None:
    config = config_of()
    assert as_seen_by(config, 3, IMAGES) is pooled(config, IMAGES) is views(config, IMAGES)[0] is IMAGES
    assert len(pooled(config_of(client_groups="half-turn"), IMAGES)) == 4


def test_attackers_are_spread_over_groups_and_draw_labels_once() -> None:
    config = config_of(client_groups="rotations", num_clients=40, byzantine_fraction=0.2, attack="random-labels")
    drawn = np.flatnonzero(byzantine_clients(config))
    assert np.bincount(drawn % 4).tolist() == [2, 2, 2, 2]
    many = ImageSet(IMAGES.images.repeat(100, 1, 1, 1), IMAGES.labels.repeat(100))
    spoilt = as_trained_on(config, int(drawn[0]), many, 10)
    assert torch.equal(spoilt.labels, as_trained_on(config, int(drawn[0]), many, 10).labels)
    assert len(spoilt.labels.unique()) == 10
    honest = next(partition for partition in range(40) if partition not in drawn)
    assert torch.equal(as_trained_on(config, honest, many, 10).labels, many.labels)


# attackers


@pytest.mark.parametrize(
    "attack",
    ["sign-flip", "random-labels", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inner-product", "alie"))],
)
def test_an_attack_changes_a_run_and_only_if_somebody_attacks(quick_config: Config, attack: str) -> None:
    scale = {"attack_scale": 3.0} if attack != "random-labels" else {}
    attacked = dataclasses.replace(quick_config, participation=1.0, num_rounds=1, attack=attack, **scale)
    weights = {}
    for fraction in (0.0, 0.3):
        history = simulate(attacked, byzantine_fraction=fraction, run_name=str(fraction))
        weights[fraction] = final_weights(history.folder)
    clean = final_weights(simulate(quick_config, participation=1.0, num_rounds=1, run_name="clean").folder)
    assert same_bits(weights[0.0], clean)
    assert not same_bits(weights[0.3], clean)


@pytest.mark.slow
def test_the_median_withstands_what_turns_the_mean_around(quick_config: Config) -> None:
    settings = {"participation": 1.0, "byzantine_fraction": 0.2, "attack_scale": 10.0, "num_rounds": 4,
                "sharding": "iid", "learning_rate": 0.01}  # fmt: skip
    losses = {
        strategy: simulate(quick_config, strategy=strategy, run_name=strategy, **settings).rows[-1]["val_loss"]
        for strategy in ("fedavg", "median", "geometric-median", "krum")
    }
    assert max(losses[name] for name in ("median", "geometric-median", "krum")) < 0.9 * losses["fedavg"], losses


# clusters


def test_clusters_start_apart_and_are_views_of_one_model() -> None:
    config = config_of(strategy="br-ifca", num_clusters=3, cluster_start_noise=0.1)
    start = {"a": torch.full((50, 20), 2.0)}
    stacked = start_clusters(config, start)
    assert stacked["a"].shape == (3, 50, 20)
    assert float((stacked["a"] - 2.0).std()) == pytest.approx(0.2, rel=0.05)
    parts = split_clusters(config, GlobalModel(stacked))
    assert len(parts) == 3
    assert torch.equal(parts[1].trained["a"], stacked["a"][1])
    assert not torch.equal(parts[0].trained["a"], parts[1].trained["a"])
    assert start_clusters(config_of(), start) is start


@pytest.mark.parametrize("mask_rule", ["none", "random"])
def test_one_cluster_without_noise_is_federated_averaging(quick_config: Config, mask_rule: str) -> None:
    fedavg = simulate(quick_config, mask_rule=mask_rule, run_name="fedavg")
    one = simulate(quick_config, **IFCA, mask_rule=mask_rule, num_clusters=1, cluster_start_noise=0.0, run_name="one")
    assert same_bits(final_weights(fedavg.folder), final_weights(one.folder))
    for row, other in zip(fedavg.rows, one.rows, strict=True):
        assert row["test_loss"] == other["test_loss"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12, nan_ok=True) if row["round"] else True


def test_cluster_models_come_apart_travel_and_are_exported(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, client_groups="half-turn", num_clusters=2, participation=1.0)
    history = simulate(config, **IFCA)
    rows = history.rows
    assert rows[1]["downlink_bytes"] > 1.9 * rows[1]["uplink_bytes"], "two models down, one task vector up"
    assert all(0.5 <= row["cluster_accuracy"] <= 1 for row in rows[1:])
    exported = sorted(path.name for path in history.folder.glob("model*.safetensors"))
    assert exported == [f"model{best}-cluster-{number}.safetensors" for best in ("-best", "") for number in (0, 1)]


@pytest.mark.slow
def test_a_group_is_measured_with_the_model_of_least_validation_loss_in_it(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, client_groups="half-turn", num_clusters=2, participation=1.0, **IFCA)
    history = simulate(config)
    home, best = workspace(config), []
    table = []
    for path in sorted(history.folder.glob("model-cluster-*.safetensors")):
        home.load(load_file(path))
        splits = home.data.validation, home.data.test
        table.append([[home.evaluate(seen).loss for seen in views(config, split)] for split in splits])
    for group in range(2):
        best.append(min(((val[group], test[group]) for val, test in table), key=lambda losses: losses[0]))
    assert history.rows[-1]["val_loss"] == pytest.approx((best[0][0] + best[1][0]) / 2, rel=1e-5)
    assert history.rows[-1]["test_loss"] == pytest.approx((best[0][1] + best[1][1]) / 2, rel=1e-5)


@pytest.mark.slow
def test_clients_of_cluster_models_train_one_by_one_on_images(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, client_groups="half-turn", num_clusters=2, participation=0.6)
    each_size = (dataclasses.replace(config, clients_at_once=size, run_name=f"{size}") for size in (1, 3))
    alone, together = (simulate(each, **IFCA) for each in each_size)
    for name in ("model-cluster-0.safetensors", "model-cluster-1.safetensors"):
        assert same_bits(*(load_file(each.folder / name) for each in (alone, together)))
    assert [row["clients"] for row in together.rows[1:]] == [6, 6, 6]


@pytest.mark.slow
def test_an_interrupted_clustered_run_under_attack_ends_as_if_it_had_not_been(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, client_groups="inverted", num_clusters=2, participation=0.6,
                                 byzantine_fraction=0.2, attack="alie", strategy="br-ifca")  # fmt: skip
    whole = simulate(config, run_name="whole")
    with power_cut(2):
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut")
    assert numbers(resumed.folder) == numbers(whole.folder)
    for name in ("model-cluster-0", "model-cluster-1"):
        path = f"{name}.safetensors"
        assert same_bits(load_file(whole.folder / path), load_file(resumed.folder / path))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"client-groups": "rotations", "strategy": "centralized"}, "client-groups"),
        ({"client-groups": "inverted", "prefix-cache": "float16", "trainable-blocks": 1}, "prefix-cache"),
        ({"strategy": "br-ifca", "head-rounds": 2}, "head-rounds"),
        ({"byzantine-fraction": 0.1, "attack": "scaled-model"}, "scaled-model"),
        ({"byzantine-fraction": 0.1, "strategy": "centralized"}, "byzantine-fraction"),
        ({"attack": "none"}, "attack"),
    ],
)
def test_contradictions_are_named(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(overrides=settings)
