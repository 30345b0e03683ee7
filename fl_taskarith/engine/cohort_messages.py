"""Messages to several virtual clients at once, for clients whose work is cheaper together than one by one.

A message to a cohort goes to its first client and lists all of them; its reply is for all. A message without a list is
to its receiver alone, so clients have one way of answering.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.question import LOSS, WORKED, Answer, Range
from fl_taskarith.engine.round_reply import Traffic

COHORT = "cohort"
ANYTHING = 1e9  # times what is usual of losses and steps: beyond it a client has diverged, or lies


def cohort_size(config: Config) -> int:
    """Return how many clients one message is to, 0 for all: clients with images answer one by one."""
    return config.at_once if config.dataset == REGRESSION else 1


def cohorts(partitions: Sequence[int], size: int) -> dict[int, list[int]]:
    """Return the partitions in groups of `size`, or with 0 in one, each by the first of its group."""
    size = size or len(partitions)
    return {partitions[start]: list(partitions[start : start + size]) for start in range(0, len(partitions), size)}


def cohort_messages(content: RecordDict, groups: Mapping[int, list[int]], message_type: str) -> Iterator[Message]:
    """Yield a message with the same `content` to each group of `cohorts`."""
    for first, cohort in groups.items():
        addressed_content = RecordDict({**content, COHORT: ConfigRecord({"partitions": list(cohort)})})
        yield Message(addressed_content, first, message_type)


def cohort_numbers(config: Config, members: int) -> dict[str, Range]:
    """Return where the numbers of a reply of so many clients must lie, by metric."""
    losses = replace(LOSS, length=members)
    if config.dataset == REGRESSION:
        most = ANYTHING * output_square(config) * (1 + 1 / config.noise**2)
        least = min(0.0, math.log(config.noise)) - 1  # −log-likelihoods of narrow densities are below 0
        losses = replace(losses, low=least, high=most)
    clusters = Range(0, config.num_clusters - 1, whole=True, length=members)
    partitions = Range(0, config.num_clients - 1, whole=True, length=members)
    return {**WORKED, "losses": losses, "partitions": partitions, "clusters": clusters}


def output_square(config: Config) -> float:
    """Return a bound on the mean square of the outputs of regression data: ‖θ*‖² + σ², or 1 if that is less."""
    return 1 + config.separation**2 + config.farthest_separation**2 + config.noise**2


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
    def of(cls, answer: Answer, partitions: Sequence[int]) -> "CohortReply":
        """Return what a client, or a cohort of these `partitions` with as many examples each, answered.

        Raises:
            ValueError: it is an answer of others.
        """
        lists, numbers = answer.lists, answer.numbers
        if lists["partitions"] != list(partitions):
            raise ValueError(f"it is of clients {lists['partitions'][:5]}, not {list(partitions)[:5]}")
        clusters = [int(each) for each in lists["clusters"]]
        return cls(list(partitions), clusters, lists["losses"], [numbers["num-examples"]] * len(partitions),
                   numbers["train-seconds"])  # fmt: skip

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
