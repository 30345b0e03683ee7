"""Clients that keep something between rounds, through both engines and an interruption."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import final_weights, power_cut
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_taskarith.client import app as client
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import TensorArray
from fl_taskarith.errors import CheckpointError
from fl_taskarith.server.launch import run_federation
from fl_taskarith.storage.client_files import prune_client_states, read_client_state, write_client_state


def train_with_memory(message: Message, partition: int) -> RecordDict:
    """Adds a tenth of the client's last task vector to its new one, as a client with momentum of its own would."""
    _, current = read_settings(message.content.config_records["config"])
    folder = Path(current.state_folder)
    remembered = read_client_state(folder, partition, current.state_name)
    reply = client.train(message, partition)
    vector = {name: array.tensor.clone() for name, array in reply.array_records["arrays"].items()}
    for name, last in remembered.items():
        vector[name] += 0.1 * last
    arrays = ArrayRecord()
    for name, tensor in vector.items():
        arrays[name] = TensorArray(tensor)
    written = write_client_state(folder, partition, current.number, vector)
    return RecordDict(
        {
            "arrays": arrays,
            "metrics": reply.metric_records["metrics"],
            "frozen": reply["frozen"],
            "state": ConfigRecord({"name": written}),
        }
    )


stateful_app = ClientApp()


@stateful_app.train()
def train(message: Message, context: Context) -> Message:
    return client.answer(train_with_memory, message, context)


@stateful_app.query("ridge")
def ridge(message: Message, context: Context) -> Message:
    return client.app(message, context)


@stateful_app.query("frozen")
def frozen(message: Message, context: Context) -> Message:
    return client.app(message, context)


@pytest.mark.slow
def test_a_resumed_run_hands_each_client_the_state_of_the_checkpoint(
    quick_config: Config,
) -> None:
    config = dataclasses.replace(
        quick_config, num_rounds=5, participation=0.6, checkpoint_every=2, learning_rate=0.001, trainable_blocks=1
    )
    whole = run_federation(dataclasses.replace(config, run_name="whole"), stateful_app)
    forgetful = run_federation(dataclasses.replace(config, run_name="stateless"), client.app)
    assert any(
        not torch.equal(final_weights(whole.folder)[name], tensor)
        for name, tensor in final_weights(forgetful.folder).items()
    ), "the clients' memory must matter for this test to mean anything"

    with power_cut(3):  # one round past the checkpoint: clients have written states that must not be used
        run_federation(dataclasses.replace(config, run_name="cut"), stateful_app)
    resumed = run_federation(dataclasses.replace(config, run_name="cut"), stateful_app)
    for name, tensor in final_weights(whole.folder).items():
        assert torch.equal(final_weights(resumed.folder)[name], tensor), name
    files = list((resumed.folder / "client-states").glob("*/*.safetensors"))
    assert 0 < len(files) <= 2 * config.num_clients, "two checkpoints refer to at most two states per client"


def test_states_come_back_by_name_and_no_name_is_no_state(tmp_path: Path) -> None:
    name = write_client_state(tmp_path, 17, 3, {"c": torch.arange(4.0)})
    assert torch.equal(read_client_state(tmp_path, 17, name)["c"], torch.arange(4.0))
    assert read_client_state(tmp_path, 17, "") == {}


def test_a_missing_or_damaged_state_is_an_error_that_names_it(tmp_path: Path) -> None:
    name = write_client_state(tmp_path, 17, 3, {"c": torch.arange(4.0)})
    path = tmp_path / "000017" / name
    path.write_bytes(path.read_bytes()[:-1])
    for wanted in (name, "round-000009-0.safetensors"):
        with pytest.raises(CheckpointError, match="client 17"):
            read_client_state(tmp_path, 17, wanted)


def test_a_state_of_another_run_under_the_name_of_this_ones_is_not_taken(tmp_path: Path) -> None:
    """The name carries 128 bits of the content's checksum, so that a state needs no mark of its run."""
    own = write_client_state(tmp_path / "a", 17, 3, {"c": torch.ones(4)})
    other = write_client_state(tmp_path / "b", 17, 3, {"c": torch.zeros(4)})
    (tmp_path / "b" / "000017" / other).rename(tmp_path / "a" / "000017" / own)
    with pytest.raises(CheckpointError, match="client 17 is missing or damaged"):
        read_client_state(tmp_path / "a", 17, own)


def test_pruning_keeps_what_any_checkpoint_refers_to(tmp_path: Path) -> None:
    names = {
        (partition, version): write_client_state(tmp_path, partition, version, {"c": torch.tensor([version])})
        for partition in (1, 2)
        for version in (1, 2, 3)
    }
    prune_client_states(tmp_path, [{1: names[1, 2]}, {1: names[1, 3], 2: names[2, 1]}])
    left = {(int(path.parent.name), path.name) for path in tmp_path.glob("*/*")}
    assert left == {(1, names[1, 2]), (1, names[1, 3]), (2, names[2, 1])}
