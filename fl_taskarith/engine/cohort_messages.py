"""Messages to several virtual clients at once, for clients whose work is cheaper done together than one by one.

A message to a cohort goes to its first client and lists all of them; its reply speaks for all. A message without a list
is to its receiver alone, so clients need one way of answering and not two.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.replies import check_examples, metrics_of, number, numbers
from fl_taskarith.errors import ClientFailure, Divergence

COHORT = "cohort"


def cohort_size(config: Config) -> int:
    """How many clients one message is to, 0 for all: those on images answer one by one."""
    return config.clients_at_once if config.dataset == REGRESSION else 1


def cohort_messages(content: RecordDict, partitions: Sequence[int], size: int, message_type: str) -> Iterator[Message]:
    """Messages with the same `content` to cohorts of `size` of the `partitions` each, or with 0 to all of them."""
    size = size or len(partitions)
    for start in range(0, len(partitions), size):
        cohort = list(partitions[start : start + size])
        addressed_content = RecordDict({**content, COHORT: ConfigRecord({"partitions": cohort})})
        yield Message(addressed_content, cohort[0], message_type)


def addressed(message: Message, partition: int) -> list[int]:
    """The partitions that a message is to; `partition` is the receiver's."""
    if COHORT not in message.content.config_records:
        return [partition]
    listed = message.content.config_records[COHORT]["partitions"]
    if not isinstance(listed, list):
        raise TypeError("a cohort is a list of partitions")
    return [int(each) for each in listed]


@dataclass(frozen=True)
class Choices:
    """What one reply tells beside tensors, of one client or of each of a cohort; all have as many examples."""

    partitions: list[int]
    clusters: list[int]
    losses: list[float]
    examples: float
    seconds: float

    @classmethod
    def of(cls, reply: Message, config: Config, shard_size: Callable[[int], int] | None) -> "Choices":
        """Of a reply.

        Raises:
            Divergence: a loss is NaN or infinite.
            ClientFailure: a number is missing, or is not one that the client can have.
        """
        client, listed = reply.metadata.src_node_id, metrics_of(reply).get("partitions")
        size = len(listed) if isinstance(listed, list) and cohort_size(config) != 1 else 1
        for loss in _listed(metrics_of(reply).get("losses")):
            if isinstance(loss, float) and not math.isfinite(loss):
                raise Divergence(f"Client {client} diverged: its loss is {loss}. Lower learning-rate.")
        partitions, clusters, losses = (numbers(reply, name, size) for name in ("partitions", "clusters", "losses"))
        if partitions[0] != client or not all(cluster in range(config.num_clusters) for cluster in clusters):
            raise ClientFailure(
                f"Client {client} sent a reply of client {partitions[0]:g} and cluster {clusters[0]:g}: expected its "
                f"own, and a cluster from 0 to {config.num_clusters - 1}."
            )
        if shard_size is not None:
            check_examples(reply, shard_size(client))
        return cls(
            [int(each) for each in partitions],
            [int(each) for each in clusters],
            losses,
            number(reply, "num-examples"),
            number(reply, "train-seconds"),
        )


class Heard:
    """What the clients of one round told beside tensors, in order."""

    def __init__(self) -> None:
        self.partitions: list[int] = []
        self.clusters: list[int] = []
        self._losses: list[float] = []
        self.examples: list[float] = []
        self._seconds = 0.0

    def add(self, choices: Choices) -> int:
        """Take in one reply; returns of how many clients."""
        self.partitions += choices.partitions
        self.clusters += choices.clusters
        self._losses += choices.losses
        self.examples += [choices.examples] * len(choices.losses)
        self._seconds += choices.seconds
        return len(choices.losses)

    def metrics(self, client_update_norm: float, update_norm: float, downlink: int, uplink: int) -> MetricRecord:
        """Of the round: the loss is a mean by numbers of examples."""
        weighted = sum(loss * examples for loss, examples in zip(self._losses, self.examples, strict=True))
        return MetricRecord(
            {
                "train-loss": weighted / sum(self.examples),
                "client-update-norm": client_update_norm,
                "update-norm": update_norm,
                "clients": len(self.partitions),
                "partitions": self.partitions,
                "clusters": self.clusters,
                "train-seconds": self._seconds,
                "downlink-bytes": downlink,
                "uplink-bytes": uplink,
            }
        )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
