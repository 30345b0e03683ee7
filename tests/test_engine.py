import dataclasses
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.config import Config, load
from fl_taskarith.engine import supernodes
from fl_taskarith.engine.grid import RoundSettings, read_settings, settings_record
from fl_taskarith.engine.records import TensorArray, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.replies import Failures, checked
from fl_taskarith.engine.sequential import SequentialGrid, ensure_run_identity
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.errors import ClientFailure, ConfigError

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


def test_replies_held_together_keep_their_own_tensors() -> None:
    replies = list(SequentialGrid(echo_client, 10).send_and_receive(messages_to([7, 2, 5])))
    assert [values(reply) for reply in replies] == [[7.0] * 3, [2.0] * 3, [5.0] * 3]


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


# Flower's engine, with a Grid that stands in for Flower's


class FakeFlowerGrid(Grid):
    """Random node ids, replies in reverse order, as Flower may return them."""

    def __init__(self, partitions: list[int], silent: tuple[int, ...] = ()) -> None:
        ensure_run_identity()
        self.nodes = {1000 - 7 * number: partition for number, partition in enumerate(partitions)}
        self.silent = silent

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:
        return None

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: object) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: object) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            partition = self.nodes[message.metadata.dst_node_id]
            if message.metadata.message_type == "train" and partition in self.silent:
                continue
            content = RecordDict({
                "metrics": MetricRecord({"partition-id": partition}),
                "arrays": ArrayRecord([np.full(3, partition)]),
            })  # fmt: skip
            replies.append(Message(content, reply_to=message))
        return replies[::-1]


def config_for(num_clients: int) -> Config:
    return load(overrides={"num_clients": num_clients, "classes_per_client": 5})


def test_supernodes_are_addressed_by_partition_and_answer_in_order() -> None:
    grid = SuperNodeGrid(FakeFlowerGrid([2, 0, 3, 1]), config_for(3))
    assert list(grid.get_node_ids()) == [0, 1, 2]
    replies = list(grid.exchange(messages_to([2, 0, 1])))
    assert [reply.content.array_records["arrays"]["0"].numpy()[0] for reply in replies] == [2, 0, 1]
    assert [reply.metadata.src_node_id for reply in replies] == [2, 0, 1], "strategies know clients by partition"


def test_too_few_supernodes_is_an_error_that_prints_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        SuperNodeGrid(FakeFlowerGrid([0, 1]), config_for(100), nodes_timeout=0.1)
    assert 'flwr run . --stream --federation-config "num-supernodes=100"' in str(caught.value)
    assert "2 are connected" in str(caught.value)
    assert supernodes.NODES_TIMEOUT < 60


@pytest.mark.parametrize(("partitions", "expected"), [([0, 1, 1], "Two SuperNodes hold partition 1"),
                                                      ([0, 1, 5], "partition 2")])  # fmt: skip
def test_wrongly_numbered_supernodes_are_named(partitions: list[int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        SuperNodeGrid(FakeFlowerGrid(partitions), config_for(3))


def test_a_silent_supernode_is_named() -> None:
    grid = SuperNodeGrid(FakeFlowerGrid([0, 1, 2], silent=(1,)), config_for(3))
    with pytest.raises(ClientFailure, match="Client 1 failed: no answer: did its SuperNode stop"):
        list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))
    failures = Failures("skip")
    heard = failures.read(grid.exchange(messages_to([0, 1, 2])), lambda reply: reply.metadata.src_node_id)
    assert list(heard) == [0, 2]
    assert (failures.take(), failures.take()) == (1, 0)


def test_a_time_limit_is_for_each_client_and_the_wait_is_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """SuperNodes that share a machine take turns."""
    waited: list[float | None] = []
    flower = FakeFlowerGrid([0, 1, 2])
    answer = flower.send_and_receive

    def timed(messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        waited.append(timeout)
        return answer(messages, timeout=timeout)

    monkeypatch.setattr(flower, "send_and_receive", timed)
    for client_timeout in (0.0, 10.0):
        config = dataclasses.replace(config_for(3), client_timeout=client_timeout)
        list(SuperNodeGrid(flower, config).exchange(messages_to([0, 1, 2])))
    assert waited[1::2] == [None, supernodes.STARTUP + 30.0]
