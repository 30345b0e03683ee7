"""A run on a SuperLink and three SuperNodes: real processes on this machine, each SuperNode with a disk of its own."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import final_weights, numbers, same_bits
from deployment import Deployment, make_certificates
from flwr.app import Context, Error, Message

from fl_taskarith import simulate
from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.run_folder import read_rounds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three clients, all of them in every round, under a mask."""
    return Config(
        num_clients=3, classes_per_client=4, participation=1.0, num_rounds=2, local_steps=2, mask_rule="random",
        density=0.3, learning_rate=0.01, evaluate_every=1, checkpoint_every=1, draw_curves=False,
        results_dir=str(tmp_path / "results"),
    )  # fmt: skip


def words(config: Config) -> str:
    """The settings that are not the defaults, as the command line has them."""
    default, own = Config().to_run_config(), dataclasses.replace(config, engine="flower").to_run_config()
    return " ".join(f"{key}={json.dumps(value)}" for key, value in own.items() if value != default[key])


def test_three_supernodes_give_the_bits_of_the_sequential_engine(config: Config, tmp_path: Path) -> None:
    expected = simulate(config, run_name="sequential")
    named = dataclasses.replace(config, run_name="deployed")
    with Deployment(tmp_path / "deployment") as deployment:
        run = deployment.run(words(named))
        assert deployment.finish(run) == "finished:completed", deployment.logs()
        assert all(list(deployment.disk(partition).glob("frozen-*")) for partition in range(3))
    results = Path(config.results_dir) / "deployed"
    assert numbers(results) == numbers(expected.folder)
    assert same_bits(final_weights(results), final_weights(expected.folder))
    assert not (results / "client-states").exists()
    assert not deployment._left(), "processes were left behind"


def test_by_stop_the_run_ends_and_goes_on_when_the_supernode_is_back(config: Config, tmp_path: Path) -> None:
    expected = simulate(config, run_name="sequential")
    named = dataclasses.replace(config, run_name="deployed")
    results = Path(config.results_dir) / "deployed"
    with Deployment(tmp_path / "deployment") as deployment:
        run = deployment.run(words(named))
        deployment.wait_for_round(results, 1)
        deployment.kill_supernode(2)
        assert deployment.finish(run) == "finished:failed", deployment.logs()
        assert "Client 2 failed: " in json.loads((results / "run.json").read_text())["cause"]
        deployment.start_supernode(2)
        run = deployment.run(words(named))
        assert deployment.finish(run) == "finished:completed", deployment.logs()
    assert numbers(results) == numbers(expected.folder)
    assert same_bits(final_weights(results), final_weights(expected.folder))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made with openssl")
def test_by_skip_the_run_goes_on_without_the_killed_supernode_until_it_is_back(config: Config, tmp_path: Path) -> None:
    """Over TLS. It comes back with an empty disk; the weights are those of a run in which it fails in one round."""
    config = dataclasses.replace(config, on_client_failure="skip")

    def without_third(message: Message, context: Context) -> Message:
        settings = message.content.config_records["config"]
        if context.node_config["partition-id"] == 2 and settings["round.number"] == 1:
            return Message(Error(100, "killed"), reply_to=message)
        return client.app(message, context)

    expected = run_federation(dataclasses.replace(config, run_name="sequential"), without_third)
    make_certificates(tmp_path)
    results = Path(config.results_dir) / "deployed"
    with Deployment(tmp_path / "deployment", certificates=tmp_path) as deployment:
        run = deployment.run(words(dataclasses.replace(config, run_name="deployed")))
        deployment.wait_for_round(results, 0)
        deployment.kill_supernode(2)
        shutil.rmtree(deployment.disk(2))
        deployment.start_supernode(2)  # the first round's message is for the killed one
        assert deployment.finish(run) == "finished:completed", deployment.logs()
        assert list(deployment.disk(2).glob("frozen-*"))
    assert [row["failed_clients"] for row in read_rounds(results)] == [0, 1, 0]
    assert numbers(results) == numbers(expected.folder)
    assert same_bits(final_weights(results), final_weights(expected.folder))
