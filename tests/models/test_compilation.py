"""torch.compile: the same losses within a tolerance, compiled once for all runs, and left out where it cannot work."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from fl_taskarith import simulate
from fl_taskarith.config.settings import Config
from fl_taskarith.models import compilation
from fl_taskarith.workspace.workspace import Workspace


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_kept", None)
    compilation._obstacle.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_compiled_run_has_the_losses_of_the_plain_one(quick_config: Config) -> None:
    plain = simulate(quick_config, mask_rule="lowest-magnitude", density=0.2, num_rounds=3, trainable_blocks=1)
    compiled = simulate(
        quick_config, mask_rule="lowest-magnitude", density=0.2, num_rounds=3, trainable_blocks=1, compile="default"
    )
    assert compilation._obstacle(torch.device("cpu")) == ""
    for ours, theirs in zip(plain.rows, compiled.rows, strict=True):
        for column in ("train_loss", "val_loss", "test_loss", "update_norm"):
            assert (theirs.get(column) or 0.0) == pytest.approx(ours.get(column) or 0.0, rel=1e-4), column


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_runs_of_one_architecture_share_what_is_compiled_and_not_their_weights(quick_config: Config) -> None:
    compiling = dataclasses.replace(quick_config, compile="default")
    first = Workspace(compiling)
    network = first.compiled_network
    with torch.no_grad():
        first.parameters["norm.bias"].fill_(7.0)
    second = Workspace(dataclasses.replace(compiling, learning_rate=0.5, seed=4))
    assert second.compiled_network is network is not second.network
    assert second.model is first.model
    assert torch.equal(second.parameters["norm.bias"], Workspace(quick_config).parameters["norm.bias"])
    third = Workspace(dataclasses.replace(compiling, weights="none"))
    assert third.model is first.model
    assert not torch.equal(third.pretrained["norm.weight"], second.pretrained["norm.weight"])
    other = Workspace(dataclasses.replace(compiling, input_size=24))
    assert other.model is not first.model


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_clients_together_are_compiled_once_for_all_rounds_and_runs(quick_config: Config) -> None:
    several = {"num_rounds": 2, "participation": 0.6, "clients_at_once": 2, "strategy": "scaffold"}
    plain = simulate(quick_config, **several)
    compiled = simulate(quick_config, **several, compile="default", run_name="compiled")
    for ours, theirs in zip(plain.rows, compiled.rows, strict=True):
        for column in ("train_loss", "val_loss", "update_norm"):
            assert (theirs.get(column) or 0.0) == pytest.approx(ours.get(column) or 0.0, rel=1e-4), column
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    again = simulate(quick_config, **several, compile="default", seed=5, learning_rate=0.01, run_name="again")
    assert counters["stats"]["unique_graphs"] == graphs
    assert again.rows[-1]["val_loss"] != compiled.rows[-1]["val_loss"]
    assert compilation._kept is not None
    sizes = [getattr(network, "clients", 1) for network in compilation._kept.networks.values()]
    assert sorted(sizes) == [1, 2]
    compilation.release(1)
    assert len(compilation._kept.networks) == 1


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_it_runs_as_written_and_says_so(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    home = Workspace(dataclasses.replace(quick_config, compile="default"))
    assert home.compiled_network is home.network
    assert "no C++ compiler" in caplog.text
