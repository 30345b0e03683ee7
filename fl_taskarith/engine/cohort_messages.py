"""Messages to several virtual clients at once, for clients whose work is cheaper together than one by one.

A message to a cohort goes to its first client and lists all of them; its reply is for all. A message without a list is
to its receiver alone, so clients have one way of answering.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.replies import check_examples, metrics_of, number, numbers
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.errors import ClientFailure, Divergence

COHORT = "cohort"


def cohort_size(config: Config) -> int:
    """Return how many clients one message is to, 0 for all: clients with images answer one by one."""
    return config.clients_at_once if config.dataset == REGRESSION else 1


def cohort_messages(content: RecordDict, partitions: Sequence[int], size: int, message_type: str) -> Iterator[Message]:
    """Yield messages with the same `content` to cohorts of `size` partitions each, or with 0 one message to all."""
    size = size or len(partitions)
    for start in range(0, len(partitions), size):
        cohort = list(partitions[start : start + size])
        addressed_content = RecordDict({**content, COHORT: ConfigRecord({"partitions": cohort})})
        yield Message(addressed_content, cohort[0], message_type)


def addressed(message: Message, partition: int) -> list[int]:
    """Return the partitions that a message is to; `partition` is the receiver's."""
    if COHORT not in message.content.config_records:
        return [partition]
    listed = message.content.config_records[COHORT]["partitions"]
    if not isinstance(listed, list):
        raise TypeError("a cohort is a list of partitions")
    return [int(each) for each in listed]


@dataclass(frozen=True)
class CohortReply:
    """What clients report beside tensors: cluster, loss and number of examples of each, and the seconds of work."""

    partitions: list[int]
    clusters: list[int]
    losses: list[float]
    examples: list[float]
    seconds: float

    @classmethod
    def read(cls, reply: Message, config: Config, shard_size: Callable[[int], int] | None) -> "CohortReply":
        """Check the reply of one client, or of a cohort whose members all have the same number of examples.

        Raises:
            Divergence: a loss is NaN or infinite.
            ClientFailure: a number is missing, or is not one that the client can have.
        """
        client, metrics = reply.metadata.src_node_id, metrics_of(reply)
        listed, losses = metrics.get("partitions"), metrics.get("losses")
        size = len(listed) if isinstance(listed, list) and cohort_size(config) != 1 else 1
        for loss in losses if isinstance(losses, list) else [losses]:
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
        examples, seconds = number(reply, "num-examples"), number(reply, "train-seconds")
        return cls([int(each) for each in partitions], [int(each) for each in clusters], losses,
                   [examples] * size, seconds)  # fmt: skip

    @classmethod
    def joined(cls, replies: Sequence["CohortReply"]) -> "CohortReply":
        """Return the replies of one round as one, in their order."""
        return cls(
            [partition for reply in replies for partition in reply.partitions],
            [cluster for reply in replies for cluster in reply.clusters],
            [loss for reply in replies for loss in reply.losses],
            [examples for reply in replies for examples in reply.examples],
            sum(reply.seconds for reply in replies),
        )

    def metrics(self, client_update_norm: float, update_norm: float, traffic: Traffic) -> MetricRecord:
        """Return the metrics of the round; the loss is a mean weighted by numbers of examples."""
        weighted = sum(loss * examples for loss, examples in zip(self.losses, self.examples, strict=True))
        return MetricRecord(
            {
                "train-loss": weighted / sum(self.examples),
                "client-update-norm": client_update_norm,
                "update-norm": update_norm,
                "clients": len(self.partitions),
                "partitions": self.partitions,
                "clusters": self.clusters,
                "train-seconds": self.seconds,
                "downlink-bytes": traffic.downlink,
                "uplink-bytes": traffic.uplink,
            }
        )
