"""What a SuperNode says of its own machine takes the place of what the server's messages say."""

import dataclasses
from pathlib import Path

import pytest
from conftest import final_weights, numbers, same_bits
from flwr.app import Context, Message, RecordDict

from fl_taskarith import simulate
from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import RoundSettings, read_settings, settings_record
from fl_taskarith.engine.node_config import partition_of, use_own_places
from fl_taskarith.errors import ClientFailure, ConfigError
from fl_taskarith.server.launch import run_federation


def context_with(**node_config: bool | float | int | str) -> Context:
    named = {name.replace("_", "-"): value for name, value in node_config.items()}
    return Context(run_id=0, node_id=0, node_config=named, state=RecordDict(), run_config={})


def test_a_supernode_without_a_partition_is_told_how_to_start() -> None:
    assert partition_of(context_with(partition_id=3, num_partitions=4)) == 3
    for wrong in (context_with(), context_with(partition_id="3"), context_with(partition_id=True)):
        with pytest.raises(ConfigError, match="--node-config"):
            partition_of(wrong)


def test_its_own_places_and_device_hold_and_all_else_is_the_servers(quick_config: Config) -> None:
    current = RoundSettings(3, 0.5, "/server/client-states", "state", "frozen")
    settings = settings_record(quick_config, current)
    use_own_places(settings, context_with(partition_id=0))
    assert read_settings(settings) == (quick_config, current)
    own = context_with(data_dir="/data", weights="/vit.pth", device="cpu", state_dir="/state", seed=7)
    use_own_places(settings, own)
    expected = dataclasses.replace(quick_config, data_dir="/data", weights="/vit.pth", device="cpu")
    assert read_settings(settings) == (expected, dataclasses.replace(current, state_folder="/state"))


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_clients_with_disks_of_their_own_change_no_number(quick_config: Config, tmp_path: Path, strategy: str) -> None:
    config = dataclasses.replace(
        quick_config, num_clients=3, classes_per_client=5, participation=1.0, mask_rule="random", strategy=strategy
    )

    def app(message: Message, context: Context) -> Message:
        context.node_config["state-dir"] = str(tmp_path / f"disk-{partition_of(context)}")
        return client.app(message, context)

    shared = simulate(config, run_name="shared")
    own = run_federation(dataclasses.replace(config, run_name="own"), app)
    assert numbers(own.folder) == numbers(shared.folder)
    assert same_bits(final_weights(own.folder), final_weights(shared.folder))
    assert not (own.folder / "client-states").exists()
    for partition in range(3):
        assert list((tmp_path / f"disk-{partition}").glob("frozen-*.safetensors"))


def test_a_lost_state_is_the_clients_failure(quick_config: Config, tmp_path: Path) -> None:
    """Unlike what is frozen, nobody else has it."""
    config = dataclasses.replace(quick_config, num_clients=3, classes_per_client=5, participation=1.0,
                                 strategy="scaffold", trainable="all")  # fmt: skip

    def app(message: Message, context: Context) -> Message:
        lost = partition_of(context) == 1 and message.content.config_records["config"]["round.number"] == 2
        context.node_config["state-dir"] = str(tmp_path / ("new-disk" if lost else "disk"))
        return client.app(message, context)

    with pytest.raises(ClientFailure, match=r"Client 1 failed: CheckpointError: The state .*new-disk"):
        run_federation(config, app)
