import pickle

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.config.settings import load
from fl_taskarith.engine.grid import RoundSettings, read_settings, settings_record
from fl_taskarith.engine.records import TensorArray, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.replies import Failures, checked
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.errors import ClientFailure

CPU = torch.device("cpu")


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.float16]),
)
@settings(max_examples=40, deadline=None)
def test_a_tensor_array_is_flowers_array_to_the_byte(shape: list[int], dtype: torch.dtype) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    ours, theirs = TensorArray(tensor), Array(tensor)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    assert payload_bytes(ArrayRecord({"name": theirs})) == ArrayRecord({"name": theirs}).count_bytes()
    assert payload_bytes(to_record({"name": tensor})) == ArrayRecord({"name": theirs}).count_bytes()


def test_inside_a_process_a_record_holds_the_very_tensor() -> None:
    tensor = torch.randn(3, 4)
    assert to_tensors(to_record({"a": tensor}), CPU)["a"].data_ptr() == tensor.data_ptr()


def test_pickled_it_becomes_a_plain_array_with_the_same_values() -> None:
    tensor = torch.randn(3, 4)
    travelled = pickle.loads(pickle.dumps(to_record({"a": tensor})))
    assert type(travelled["a"]) is Array
    assert torch.equal(to_tensors(travelled, CPU)["a"], tensor)


def test_sent_by_flower_it_arrives_as_a_plain_array_with_the_same_values() -> None:
    """As SuperLink and SuperNodes send it: each object by itself, under the hash of its content."""
    tensors = {"a": torch.randn(3, 4), "none": torch.zeros(0), "scalar": torch.tensor(2.0)}
    sent = RecordDict({"arrays": to_record(tensors)})
    contents = {name: each.deflate() for name, each in get_all_nested_objects(sent).items()}
    arrived = inflate_object_from_contents(sent.object_id, contents)
    assert {type(array) for array in arrived["arrays"].values()} == {Array}
    received = to_tensors(arrived["arrays"], CPU)
    assert all(torch.equal(received[name], value) for name, value in tensors.items())


def test_settings_travel_and_come_back() -> None:
    config = load(overrides={"num_clients": 7, "ridge_lambda": 3.5, "nesterov": True})
    current = RoundSettings(12, 0.125, "/folder", "name")
    assert read_settings(settings_record(config, current)) == (config, current)


# the sequential engine


def echo_client(message: Message, context: Context) -> Message:
    """Writes its partition into one shared buffer, as a resident model does."""
    partition = int(context.node_config["partition-id"])
    echo_client.buffer.fill_(partition)
    return Message(RecordDict({"arrays": to_record({"a": echo_client.buffer})}), reply_to=message)


echo_client.buffer = torch.zeros(3)


def messages_to(partitions: list[int]) -> list[Message]:
    return [Message(RecordDict(), partition, "train") for partition in partitions]


def values(message: Message) -> list[float]:
    return to_tensors(message.content.array_records["arrays"], CPU)["a"].tolist()


def test_replies_stream_in_the_order_asked_without_copies() -> None:
    grid = SequentialGrid(echo_client, 10)
    assert list(grid.get_node_ids()) == list(range(10))
    assert [values(reply) for reply in grid.exchange(messages_to([7, 2, 5]))] == [[7.0] * 3, [2.0] * 3, [5.0] * 3]


def test_clients_run_only_when_their_reply_is_asked_for() -> None:
    called: list[int] = []

    def client(message: Message, context: Context) -> Message:
        called.append(int(context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    replies = SequentialGrid(client, 3).exchange(messages_to([0, 1, 2]))
    next(replies)
    assert called == [0]


def test_an_error_reply_stops_with_the_clients_own_words() -> None:
    def client(message: Message, context: Context) -> Message:
        return Message(Error(100, "DataError: my shard is gone"), reply_to=message)

    replies = SequentialGrid(client, 5).exchange(messages_to([4]))
    with pytest.raises(ClientFailure, match=r"Client 4 failed: DataError: my shard is gone"):
        list(Failures("stop").read(replies, checked))
