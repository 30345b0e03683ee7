"""Algorithms whose clients follow the way of earlier rounds, in whole runs: against one another and written out."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import final_weights, numbers, same_bits

from fl_taskarith import simulate
from fl_taskarith.client import local_work
from fl_taskarith.config.settings import Config, from_mapping
from fl_taskarith.errors import ConfigError
from fl_taskarith.training.corrections import momentum_of_visits, momentum_shift


@pytest.fixture
def config(quick_config: Config) -> Config:
    """Plain SGD, everybody seen after two rounds."""
    return dataclasses.replace(
        quick_config, momentum=0.0, participation=0.5, sampling="cyclic", num_rounds=3, evaluate_every=3, threads=1,
        schedule="constant",
    )  # fmt: skip


def weights(config: Config, name: str, **settings: object) -> dict[str, torch.Tensor]:
    return final_weights(simulate(config, strategy=name, run_name=f"{name}-{len(settings)}", **settings).folder)


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, second[name], rtol=1e-4, atol=1e-6) for name, value in first.items())


def test_without_momentum_they_are_fedavg(config: Config) -> None:
    plain = weights(config, "fedavg")
    for name in ("ghbm", "local-ghbm", "fedhbm", "fedcm"):
        assert close(weights(config, name, server_momentum=0.0), plain), name


@pytest.mark.slow
def test_local_ghbm_is_ghbm_once_everybody_has_come_by(config: Config) -> None:
    """In the first cycle GHBM knows the rounds before and a client that was never asked knows nothing."""
    config = dataclasses.replace(config, num_rounds=2)
    start = simulate(config, strategy="local-ghbm", run_name="first")
    plain = simulate(config, strategy="fedavg", run_name="fedavg")
    assert close(final_weights(start.folder), final_weights(plain.folder)), "no client has been there before"
    everybody = dataclasses.replace(config, participation=1.0, num_rounds=4)
    assert close(weights(everybody, "local-ghbm"), weights(everybody, "ghbm")), "τ = 1 / C = 1"
    assert close(weights(everybody, "fedcm"), weights(everybody, "ghbm"))


@pytest.mark.parametrize(("clients", "participation", "share"), [(7, 0.2, 1 / 7), (10, 0.04, 0.1), (10, 0.5, 0.5)])
def test_momentum_of_visits_goes_by_the_share_of_clients_that_come_by(
    clients: int, participation: float, share: float, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GHBM, which it is from the second cycle on, divides by the rounds of a cycle."""
    seen = []
    monkeypatch.setattr(
        local_work, "momentum_of_visits", lambda *given: seen.append(given[2]) or momentum_of_visits(*given)
    )
    config = dataclasses.replace(config, num_clients=clients, sharding="iid", participation=participation, num_rounds=1)
    simulate(config, strategy="local-ghbm")
    assert set(seen) == {share}


def test_fedhbm_of_one_client_is_another_way_than_ghbm(config: Config) -> None:
    """One client's last model is the global one, so its momentum is zero: FedAvg."""
    alone = dataclasses.replace(config, num_clients=1, sharding="iid", participation=1.0)
    assert close(weights(alone, "fedhbm"), weights(alone, "fedavg"))
    assert not close(weights(alone, "ghbm"), weights(alone, "fedavg"))


def test_momentum_moves_the_weights_by_beta_times_the_way_of_the_last_round(config: Config) -> None:
    """With one client that has no gradient, what moves is the momentum alone: here the difference of two runs.

    For one round after the first, θ₂(β) − θ₂(0) = −β m + what the other gradients make of it, small at a small rate.
    """
    config = dataclasses.replace(config, num_rounds=2, learning_rate=1e-3, participation=1.0)
    first = final_weights(simulate(config, num_rounds=1, run_name="one").folder)
    start = final_weights(simulate(config, num_rounds=1, learning_rate=0.0, run_name="none").folder)
    plain, with_momentum = weights(config, "fedavg"), weights(config, "ghbm", server_momentum=0.5)
    name = "blocks.3.mlp.fc2.weight"
    gained, expected = with_momentum[name] - plain[name], 0.5 * (first[name] - start[name])
    assert float((gained - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("name", ["ghbm", "local-ghbm", pytest.param("fedhbm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clients_together_do_what_they_do_alone(config: Config, name: str, masked: bool) -> None:
    settings: dict[str, object] = {"mask_rule": "random", "density": 0.3} if masked else {}
    alone = simulate(config, strategy=name, run_name="alone", **settings)
    together = simulate(config, strategy=name, run_name="together", clients_at_once=0, **settings)
    assert close(final_weights(alone.folder), final_weights(together.folder))


@pytest.mark.slow
def test_only_ghbm_sends_more_than_fedavg_and_only_down(config: Config) -> None:
    rows = {name: simulate(config, strategy=name, run_name=name).rows[-1] for name in ("fedavg", "ghbm", "local-ghbm")}
    assert rows["local-ghbm"]["downlink_bytes"] == rows["fedavg"]["downlink_bytes"]
    assert rows["ghbm"]["downlink_bytes"] == 2 * rows["fedavg"]["downlink_bytes"]
    assert len({row["uplink_bytes"] for row in rows.values()}) == 1


@pytest.mark.slow
def test_head_rounds_change_what_is_remembered(config: Config) -> None:
    for name in ("ghbm", "local-ghbm", "fedvarp", "covariance"):
        settings = {"head": "linear", "head_rounds": 2, "sampling": "cyclic"}
        assert simulate(config, strategy=name, run_name=name, **settings).rows[-1]["task_vector_norm"] > 0


@pytest.mark.parametrize("name", ["ghbm", "local-ghbm", "fedhbm", "fedcm"])
@pytest.mark.parametrize("settings", [{"clip-norm": 1.0}, {"learning-rate": 0.0}, {"mask-source": "own"}])
def test_what_hides_a_clients_way_is_refused(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=name):
        from_mapping({"strategy": name, "learning-rate": 0.1, **settings})


def test_the_formulas() -> None:
    current, anchor = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(1)}, {"a": torch.tensor([3.0, 0.0])}
    momentum = momentum_of_visits(anchor, current, 0.1)
    assert momentum["a"].tolist() == pytest.approx([0.2, -0.2])
    assert momentum["b"].tolist() == [0.0], "nothing was kept of it"
    shift = momentum_shift(momentum, 0.9, path=0.04)
    assert shift["a"].tolist() == pytest.approx([0.9 * 0.2 / 0.04, -0.9 * 0.2 / 0.04])


def test_a_run_repeats_itself(config: Config) -> None:
    folders: list[Path] = [simulate(config, strategy="fedhbm", run_name=str(turn)).folder for turn in range(2)]
    assert numbers(folders[0]) == numbers(folders[1])
    assert same_bits(final_weights(folders[0]), final_weights(folders[1]))
