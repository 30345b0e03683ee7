"""Flower's own engine: SuperNodes, simulated by Ray or real ones, seen by partition id."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.replies import CLIENT_ERROR, LACKS_FROZEN, checked, complaint, guarded
from fl_taskarith.errors import ClientFailure, ConfigError, named_error, printable

NODES_TIMEOUT = 30.0  # seconds for the SuperNodes to register; simulated ones do so at once
HANDSHAKE_TIMEOUT = 300.0  # seconds for those connected to start Python, import torch and tell their partition
HANDSHAKE, FROZEN = "query.partition", "query.frozen"
STARTUP = 60.0  # seconds beyond `client-timeout` that a SuperNode may take to start its ClientApp's process

log = logging.getLogger(__name__)


class SuperNodeGrid(PartitionGrid):
    """Wraps the Grid that Flower hands to a ServerApp; translates partition ids to its node ids and back.

    A SuperNode that stops counts as a failure of its client (`on-client-failure`), until another one with its partition
    id connects: a restarted SuperNode has a new node id. One that lacks the frozen head and mask, as after a restart on
    an empty disk, receives them again; the traffic of such repeats is not counted.
    """

    def __init__(self, grid: Grid, config: Config, nodes_timeout: float = NODES_TIMEOUT) -> None:
        """Wait for K SuperNodes and ask each for its partition.

        Raises:
            ConfigError: partitions held twice, or missing under `on-client-failure` = "stop"; says how to start them.
        """
        self._grid = grid
        self._config = config
        self._nodes: dict[int, int] = {}  # node id by partition
        self._known: set[int] = set()  # the node ids that were asked for their partition
        self._lost: set[int] = set()  # partitions whose SuperNode did not answer when last asked
        self._frozen: RecordDict | None = None  # what clients were sent last to keep
        self._wait_for_nodes(nodes_timeout)

    def get_node_ids(self) -> range:
        """Return the partition ids 0..K-1."""
        return range(self._config.num_clients)

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield replies in the order of `messages`; an error reply in place of one that is late.

        All are collected first, for Flower returns them as they arrive. The limit is the sum of each client's
        `client-timeout`, because clients that share a machine work one after the other. Flower itself answers for a
        stopped SuperNode, within two of its heartbeats.
        """
        sent = {message.metadata.dst_node_id: message for message in messages}
        if self._lost & sent.keys():
            self._register(self._strangers(), at_start=False)
        replies = self._ask(sent)
        lacking = [partition for partition, reply in replies.items() if _says(reply, LACKS_FROZEN)]
        if lacking and self._frozen is not None:
            log.info("The frozen head and mask are sent again to clients that lack them: %s", _listed(lacking))
            self._ask({partition: Message(self._frozen, partition, FROZEN) for partition in lacking})
            again = {partition: sent[partition] for partition in lacking}
            replies |= self._ask({partition: Message(message.content, partition, message.metadata.message_type)
                                  for partition, message in again.items()})  # fmt: skip
        if any(message.metadata.message_type == FROZEN for message in sent.values()):
            self._frozen = next(iter(sent.values())).content
        yield from (replies[partition] for partition in sent)

    def _ask(self, messages: Mapping[int, Message]) -> dict[int, Message]:
        """Return a reply by partition to each message, which is addressed to a partition; note who is lost or back."""
        each = self._config.client_timeout
        timeout = STARTUP + len(messages) * each if each else None
        within = f" within {timeout:g} s" if timeout else ""
        reachable = {partition: message for partition, message in messages.items() if partition in self._nodes}
        for partition, message in reachable.items():
            message.metadata.dst_node_id = self._nodes[partition]
        # Where a SuperNode has stopped it is the SuperLink that answers: only the message tells for whom.
        received = self._received(list(reachable.values()), timeout)
        replies = {}
        for partition, message in messages.items():
            reply = received.get(self._nodes[partition]) if partition in reachable else None
            stopped = reply is None or (reply.has_error() and reply.metadata.src_node_id != self._nodes[partition])
            (self._lost.add if stopped else self._lost.discard)(partition)
            if reply is None:
                reason = "no SuperNode holds its partition" if partition not in reachable else f"no answer{within}"
                reply = Message(Error(CLIENT_ERROR, f"{reason}: did its SuperNode stop?"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = partition  # strategies know clients by partition
            replies[partition] = reply
        return replies

    def _received(self, messages: list[Message], timeout: float | None) -> dict[int, Message]:
        """Return what came back, by the SuperNode that was asked; nothing in its name from another one.

        Where Flower cannot read a reply it returns none of them, and does not say whose it is: then each SuperNode is
        asked again by itself. Their work is done twice.
        """
        received = dict[int, Message]()
        try:
            replies = list(self._grid.send_and_receive(messages, timeout=timeout)) if messages else []
        except Exception as error:
            reason = f"its reply cannot be read ({named_error(error)})"
            if len(messages) == 1:
                return {messages[0].metadata.dst_node_id: Message(Error(CLIENT_ERROR, reason), reply_to=messages[0])}
            log.warning("Of %d replies one cannot be read: each client is asked by itself.", len(messages))
            for message in messages:
                again = Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)
                received |= self._received([again], timeout)
            return received
        sent_to = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        for reply in replies:
            node = sent_to.get(reply.metadata.reply_to_message_id)
            if node is not None and (reply.has_error() or reply.metadata.src_node_id == node):
                received.setdefault(node, reply)
        return received

    def _wait_for_nodes(self, timeout: float) -> None:
        """Wait until every partition has its SuperNode, or `timeout` seconds are over and no further ones connect."""
        deadline = time.monotonic() + timeout
        while missing := [partition for partition in self.get_node_ids() if partition not in self._nodes]:
            strangers, late = self._strangers(), time.monotonic() > deadline
            if len(strangers) >= len(missing) or (strangers and late):
                self._register(strangers, at_start=True)
            elif late:
                break
            else:
                time.sleep(0.5)
        if not missing:
            return
        num_clients = self._config.num_clients
        lack = (
            f'engine = "flower" needs one SuperNode per client: num-clients = {num_clients}, but {len(self._known)} '
            f"are connected, and none answered for partition {_listed(missing)} ({len(missing)} missing)."
        )
        if self._config.on_client_failure == "stop" or not self._nodes:
            raise ConfigError(f"{lack} {_how_to_start(num_clients)} Or set num-clients = {max(1, missing[0])}.")
        self._lost.update(missing)
        log.warning("%s The run goes on without them (on-client-failure = skip).", lack)

    def _strangers(self) -> list[int]:
        """Return the node ids of connected SuperNodes that were not asked for their partition yet."""
        return sorted(set(self._grid.get_node_ids()) - self._known)

    def _register(self, node_ids: list[int], *, at_start: bool) -> None:
        """Ask these SuperNodes for their partitions; those with partition ids of K and more stay idle.

        Raises:
            ConfigError: two hold the same partition; later on a second one is left idle.
        """
        self._known.update(node_ids)
        settings = RecordDict({"config": settings_record(self._config, RoundSettings(0))})
        questions = [Message(settings, node_id, HANDSHAKE) for node_id in node_ids]
        for reply in self._received(questions, HANDSHAKE_TIMEOUT).values():
            try:
                partition = guarded(reply, _partition_told)
            except ClientFailure as failure:
                log.warning("A SuperNode cannot take part: %s", failure)
                continue
            if partition in self._nodes and partition not in self._lost:
                twice = f"Two SuperNodes hold partition {partition}: give each its own partition-id."
                if at_start and self._config.on_client_failure == "stop":
                    raise ConfigError(twice)
                log.warning("%s The later one is left idle.", twice)
                continue
            if not at_start:
                log.info("Another SuperNode has connected with partition-id %d.", partition)
            self._nodes[partition] = reply.metadata.src_node_id
            self._lost.discard(partition)


def _partition_told(reply: Message) -> int:
    """Return the partition that a SuperNode says it holds."""
    partition = checked(reply).content.metric_records["metrics"]["partition-id"]
    if isinstance(partition, bool) or not isinstance(partition, int) or partition < 0:
        raise complaint(reply, f"without a partition-id from 0 ({printable(partition)})")
    return partition


def _says(reply: Message, code: int) -> bool:
    return reply.has_error() and reply.error.code == code


def _listed(partitions: list[int]) -> str:
    return ", ".join(map(str, partitions[:10])) + (", ..." if len(partitions) > 10 else "")


def _how_to_start(num_clients: int) -> str:
    return (
        "In simulation, start the run with\n"
        f'  flwr run . --stream --federation-config "num-supernodes={num_clients}" --run-config "engine=\'flower\'"\n'
        'In deployment, start a SuperNode per client, each with its own --node-config "partition-id=N", N from 0.'
    )
