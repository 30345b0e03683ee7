"""Flower's engine over a Grid that stands in for Flower's: SuperNodes that are missing, stop, come back, forget."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid

from fl_taskarith.config.settings import Config, load
from fl_taskarith.engine import supernodes
from fl_taskarith.engine.replies import LACKS_FROZEN, Failures, checked
from fl_taskarith.engine.sequential import ensure_run_identity
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.errors import ClientFailure, ConfigError


class FakeFlowerGrid(Grid):
    """Random node ids, and replies in reverse order, as Flower may return them.

    silent: partitions that never answer a message to train. stopped: those for which the SuperLink answers, as it does
    for a SuperNode without a heartbeat. forgetful: those that were not sent what they are to keep.
    """

    def __init__(self, partitions: list[int], silent: tuple[int, ...] = ()) -> None:
        ensure_run_identity()
        self.nodes = {1000 - 7 * number: partition for number, partition in enumerate(partitions)}
        self.silent = silent
        self.stopped: set[int] = set()
        self.forgetful: set[int] = set()
        self.asked: list[tuple[int, str]] = []

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
        return [node for node in self.nodes if node not in self.stopped]

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            partition = self.nodes[node]
            self.asked.append((partition, kind))
            if node in self.stopped:
                replies.append(create_message_error_unavailable_res_message(message.metadata, "node_unavail"))
                continue
            if kind == "query.frozen":
                self.forgetful.discard(partition)
            if kind == "train" and partition in self.silent:
                continue
            if kind == "train" and partition in self.forgetful:
                replies.append(Message(Error(LACKS_FROZEN, "the frozen head is missing"), reply_to=message))
                continue
            content = RecordDict({
                "metrics": MetricRecord({"partition-id": partition}),
                "arrays": ArrayRecord([np.full(3, partition)]),
            })  # fmt: skip
            replies.append(Message(content, reply_to=message))
        return replies[::-1]


def config_for(num_clients: int, policy: str = "stop") -> Config:
    return load(overrides={"num_clients": num_clients, "classes_per_client": 5, "on_client_failure": policy})


def messages_to(partitions: list[int], kind: str = "train") -> list[Message]:
    return [Message(RecordDict(), partition, kind) for partition in partitions]


def heard(grid: SuperNodeGrid, partitions: list[int]) -> list[int]:
    """Who sent a reply that is no error."""
    return list(Failures("skip").read(grid.exchange(messages_to(partitions)), lambda reply: reply.metadata.src_node_id))


def test_supernodes_are_addressed_by_partition_and_answer_in_order() -> None:
    grid = SuperNodeGrid(FakeFlowerGrid([2, 0, 3, 1]), config_for(3))
    assert list(grid.get_node_ids()) == [0, 1, 2]
    replies = list(grid.exchange(messages_to([2, 0, 1])))
    assert [reply.content.array_records["arrays"]["0"].numpy()[0] for reply in replies] == [2, 0, 1]
    assert [reply.metadata.src_node_id for reply in replies] == [2, 0, 1], "strategies know clients by partition"


def test_too_few_supernodes_is_an_error_that_prints_the_command() -> None:
    with pytest.raises(ConfigError) as caught:
        SuperNodeGrid(FakeFlowerGrid([0, 1]), config_for(100), nodes_timeout=0.1)
    assert 'flwr run . --stream --federation-config "num-supernodes=100"' in str(caught.value)
    assert "2 are connected" in str(caught.value)
    assert "Or set num-clients = 2." in str(caught.value)
    assert supernodes.NODES_TIMEOUT < 60


@pytest.mark.parametrize(("partitions", "expected"), [([0, 1, 1], "Two SuperNodes hold partition 1"),
                                                      ([0, 1, 5], "partition 2")])  # fmt: skip
def test_wrongly_numbered_supernodes_are_named(partitions: list[int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        SuperNodeGrid(FakeFlowerGrid(partitions), config_for(3), nodes_timeout=0.1)


def test_those_that_connect_one_after_the_other_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    appear = iter([[], [1000], [1000, 993], [1000, 993], [1000, 993, 986]])
    monkeypatch.setattr(flower, "get_node_ids", lambda: next(appear))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert heard(SuperNodeGrid(flower, config_for(3)), [0, 1, 2]) == [0, 1, 2]


def test_a_silent_supernode_is_named() -> None:
    grid = SuperNodeGrid(FakeFlowerGrid([0, 1, 2], silent=(1,)), config_for(3))
    with pytest.raises(ClientFailure, match="Client 1 failed: no answer: did its SuperNode stop"):
        list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))
    failures = Failures("skip")
    replies = failures.read(grid.exchange(messages_to([0, 1, 2])), lambda reply: reply.metadata.src_node_id)
    assert list(replies) == [0, 2]
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


def test_the_superlinks_word_for_a_stopped_supernode_names_its_client() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3))
    flower.stopped = {993}  # partition 1's
    with pytest.raises(ClientFailure, match=r"Client 1 failed: .*heartbeat"):
        list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))
    assert heard(grid, [0, 1, 2]) == [0, 2]


def test_a_restarted_supernode_takes_its_place_again() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3))
    flower.stopped = {993}
    assert heard(grid, [0, 1, 2]) == [0, 2]
    flower.nodes[77] = 1
    assert heard(grid, [0, 2]) == [0, 2], "it is looked for when it is needed"
    assert (1, "query.partition") not in flower.asked[3:]
    assert heard(grid, [0, 1, 2]) == [0, 1, 2]
    asked = len(flower.asked)
    assert heard(grid, [0, 1, 2]) == [0, 1, 2]
    assert len(flower.asked) == asked + 3, "nothing more is asked once all are there"


def test_one_that_holds_a_partition_already_held_is_left_idle() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3))
    flower.stopped = {993}
    assert heard(grid, [0, 1, 2]) == [0, 2]
    flower.nodes[77] = 0
    flower.silent = ()
    assert heard(grid, [0, 1, 2]) == [0, 2]


def test_by_skip_a_run_starts_without_those_that_are_missing() -> None:
    flower = FakeFlowerGrid([0, 2])
    grid = SuperNodeGrid(flower, config_for(3, "skip"), nodes_timeout=0.1)
    assert list(grid.get_node_ids()) == [0, 1, 2]
    with pytest.raises(ClientFailure, match="Client 1 failed: no SuperNode holds its partition"):
        list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))
    flower.nodes[77] = 1
    assert heard(grid, [0, 1, 2]) == [0, 1, 2], "it joined late"


def test_by_skip_too_a_run_needs_somebody() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    flower.stopped = set(flower.nodes)
    with pytest.raises(ConfigError, match="0 are connected"):
        SuperNodeGrid(flower, config_for(3, "skip"), nodes_timeout=0.1)


def test_what_is_kept_is_sent_again_to_a_client_that_lacks_it() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3))
    list(grid.exchange(messages_to([0, 1, 2], "query.frozen")))
    flower.forgetful = {1}
    asked = len(flower.asked)
    replies = list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))
    assert [reply.content.array_records["arrays"]["0"].numpy()[0] for reply in replies] == [0, 1, 2]
    assert flower.asked[asked + 3 :] == [(1, "query.frozen"), (1, "train")]


def test_a_client_that_lacks_what_was_never_sent_fails() -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    flower.forgetful = {1}
    with pytest.raises(ClientFailure, match="Client 1 failed: the frozen head is missing"):
        list(Failures("stop").read(SuperNodeGrid(flower, config_for(3)).exchange(messages_to([0, 1, 2])), checked))


# Hostile SuperNodes


def replaced(
    monkeypatch: pytest.MonkeyPatch, flower: FakeFlowerGrid, change: Callable[[list[Message]], object]
) -> None:
    """Have `change` alter what arrives."""
    send = flower.send_and_receive

    def receive(messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        replies = send(messages, timeout=timeout)
        change(replies)
        return replies

    monkeypatch.setattr(flower, "send_and_receive", receive)


def test_a_reply_in_the_name_of_another_supernode_counts_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3, "skip"))

    def forge(replies: list[Message]) -> None:
        (mine,) = (reply for reply in replies if reply.content["metrics"]["partition-id"] == 1)
        (other,) = (reply for reply in replies if reply.content["metrics"]["partition-id"] == 2)
        forged = Message(RecordDict(), reply_to=other)
        forged.metadata.__dict__ |= {"_src_node_id": mine.metadata.src_node_id,
                                     "_reply_to_message_id": other.metadata.reply_to_message_id}  # fmt: skip
        replies.insert(0, forged)

    replaced(monkeypatch, flower, forge)
    assert heard(grid, [0, 1, 2]) == [0, 1, 2]
    replaced(monkeypatch, flower, lambda replies: replies.pop(1))  # the genuine one of 2
    assert heard(grid, [0, 1, 2]) == [0, 1], "what was forged does not take the place of what is missing"


def test_a_reply_that_flower_cannot_read_is_its_clients_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = FakeFlowerGrid([0, 1, 2])
    grid = SuperNodeGrid(flower, config_for(3, "skip"))

    def inflate(replies: list[Message]) -> None:
        if any(reply.content["metrics"]["partition-id"] == 1 for reply in replies):
            raise ValueError("Mismatch in children \x1b[2J object IDs")

    replaced(monkeypatch, flower, inflate)
    assert heard(grid, [0, 1, 2]) == [0, 2]
    with pytest.raises(ClientFailure, match=r"Client 1 failed: its reply cannot be read \(ValueError: Mismatch in ch"):
        list(Failures("stop").read(grid.exchange(messages_to([0, 1, 2])), checked))


@pytest.mark.parametrize("told", [-1, 2.5, None])
def test_a_supernode_without_a_sound_partition_stays_idle(monkeypatch: pytest.MonkeyPatch, told: float | None) -> None:
    flower = FakeFlowerGrid([0, 1, 2])

    def lie(replies: list[Message]) -> None:
        for reply in replies:
            metrics = reply.content["metrics"]
            if metrics.get("partition-id") == 2:
                del metrics["partition-id"]
                metrics.update({} if told is None else {"partition-id": told})

    replaced(monkeypatch, flower, lie)
    assert heard(SuperNodeGrid(flower, config_for(3, "skip"), nodes_timeout=0.0), [0, 1]) == [0, 1]


def test_by_skip_a_second_supernode_of_a_partition_stays_idle() -> None:
    with pytest.raises(ConfigError, match="Two SuperNodes hold partition 1"):
        SuperNodeGrid(FakeFlowerGrid([0, 1, 1, 2]), config_for(3))
    assert heard(SuperNodeGrid(FakeFlowerGrid([0, 1, 1, 2]), config_for(3, "skip")), [0, 1, 2]) == [0, 1, 2]
