"""Messages to several virtual clients at once, for clients whose work is cheaper done together than one by one.

A message to a cohort goes to its first client and lists all of them; its reply speaks for all. A message without a list
is to its receiver alone, so clients need one way of answering and not two.
"""

import math
from collections.abc import Iterator, Sequence

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.engine.records import metric
from fl_taskarith.errors import Divergence

COHORT = "cohort"


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


class Heard:
    """What the clients of one round told beside tensors, in order."""

    def __init__(self) -> None:
        self.partitions: list[int] = []
        self.clusters: list[int] = []
        self._losses: list[float] = []
        self._examples: list[float] = []
        self._seconds = 0.0

    def add(self, metrics: MetricRecord) -> int:
        """Take in one reply, of one client or a cohort; returns of how many.

        Raises:
            Divergence: a client's loss is NaN or infinite.
        """
        partitions, clusters, losses = (_numbers(metrics[name]) for name in ("partitions", "clusters", "losses"))
        for partition, loss in zip(partitions, losses, strict=True):
            if not math.isfinite(loss):
                raise Divergence(f"Client {int(partition)} diverged: its loss is {loss}. Lower learning-rate.")
        self.partitions += [int(partition) for partition in partitions]
        self.clusters += [int(cluster) for cluster in clusters]
        self._losses += losses
        self._examples += [metric(metrics, "num-examples")] * len(losses)
        self._seconds += metric(metrics, "train-seconds")
        return len(losses)

    def metrics(self, client_update_norm: float, update_norm: float, downlink: int, uplink: int) -> MetricRecord:
        """Of the round: the loss is a mean by numbers of examples."""
        weighted = sum(loss * examples for loss, examples in zip(self._losses, self._examples, strict=True))
        return MetricRecord(
            {
                "train-loss": weighted / sum(self._examples),
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


def _numbers(value: object) -> list[float]:
    return [float(each) for each in value] if isinstance(value, list) else [float(value)]  # type: ignore[arg-type]
