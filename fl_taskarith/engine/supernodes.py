"""Flower's own engine: SuperNodes, simulated by Ray or real ones, seen by partition id."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fl_taskarith.config import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.replies import CLIENT_ERROR, checked, number
from fl_taskarith.errors import ConfigError

NODES_TIMEOUT = 30.0  # seconds for the SuperNodes to register; simulated ones do so at once
HANDSHAKE_TIMEOUT = 300.0  # seconds for those connected to start Python, import torch and tell their partition
HANDSHAKE = "query.partition"
STARTUP = 60.0  # seconds beyond `client-timeout` that a SuperNode may take to start its ClientApp's process


class SuperNodeGrid(PartitionGrid):
    """Wraps the Grid that Flower hands to a ServerApp; translates partition ids to its node ids and back."""

    def __init__(self, grid: Grid, config: Config, nodes_timeout: float = NODES_TIMEOUT) -> None:
        """Waits for K SuperNodes and asks each for its partition.

        Raises:
            ConfigError: fewer than K SuperNodes, or partitions missing or held twice; says how to start them.
        """
        self._grid = grid
        self._client_timeout = config.client_timeout
        node_ids = _wait_for_nodes(grid, config.num_clients, nodes_timeout)
        self._nodes = _ask_partitions(grid, node_ids, config)
        self._partitions = {node: partition for partition, node in self._nodes.items()}

    def get_node_ids(self) -> range:
        """The partition ids 0..K-1."""
        return range(len(self._nodes))

    @property
    def run(self) -> Run:
        """The Flower run."""
        return self._grid.run

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Replies in the order of `messages`; all are collected first, since Flower returns them as they arrive."""
        yield from self.send_and_receive(messages)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies, in the order of `messages`; an error reply in place of one that is not there in time.

        The time is `timeout` in seconds, or what `client-timeout` gives each client, for those that share a machine
        take turns. Flower itself answers for a SuperNode that has stopped: it finds out within two of its heartbeats.
        """
        sent = list(messages)
        order = [message.metadata.dst_node_id for message in sent]
        if timeout is None and self._client_timeout:
            timeout = STARTUP + len(sent) * self._client_timeout
        for message, partition in zip(sent, order, strict=True):
            message.metadata.dst_node_id = self._nodes[partition]
        replies = {}
        for reply in self._grid.send_and_receive(sent, timeout=timeout):
            replies[self._partitions[reply.metadata.src_node_id]] = reply
        for message, partition in zip(sent, order, strict=True):
            if partition not in replies:
                within = f" within {timeout:g} s" if timeout else ""
                error = Error(CLIENT_ERROR, f"no answer{within}: did its SuperNode stop?")
                replies[partition] = Message(error, reply_to=message)
            replies[partition].metadata.__dict__["_src_node_id"] = partition  # strategies know clients by partition
        return [replies[partition] for partition in order]


def _wait_for_nodes(grid: Grid, num_clients: int, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while len(node_ids := sorted(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise ConfigError(
                f'engine = "flower" needs one SuperNode per client: num-clients = {num_clients}, but {len(node_ids)} '
                f"are connected. {_how_to_start(num_clients)} Or set num-clients = {max(1, len(node_ids))}."
            )
        time.sleep(0.5)
    return node_ids


def _ask_partitions(grid: Grid, node_ids: list[int], config: Config) -> dict[int, int]:
    """Node id by partition id for the partitions 0..K-1; nodes with higher partition ids are left idle."""
    settings = RecordDict({"config": settings_record(config, RoundSettings(0))})
    questions = [Message(settings, node_id, HANDSHAKE) for node_id in node_ids]
    nodes: dict[int, int] = {}
    for reply in grid.send_and_receive(questions, timeout=HANDSHAKE_TIMEOUT):
        node_id = reply.metadata.src_node_id
        partition = int(number(checked(reply), "partition-id"))
        if partition in nodes:
            raise ConfigError(f"Two SuperNodes hold partition {partition}: give each its own partition-id.")
        nodes[partition] = node_id
    missing = [partition for partition in range(config.num_clients) if partition not in nodes]
    if missing:
        raise ConfigError(
            f"No SuperNode answered for partition {', '.join(map(str, missing[:10]))} ({len(missing)} missing of "
            f"{config.num_clients}). {_how_to_start(config.num_clients)}"
        )
    return {partition: nodes[partition] for partition in range(config.num_clients)}


def _how_to_start(num_clients: int) -> str:
    return (
        "In simulation, start the run with\n"
        f'  flwr run . --stream --federation-config "num-supernodes={num_clients}" --run-config "engine=\'flower\'"\n'
        'In deployment, start a SuperNode per client, each with its own --node-config "partition-id=N", N from 0.'
    )
