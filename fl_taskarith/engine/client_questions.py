"""Questions to all clients beside training: for the head's sums, the scores of a mask, or Grams."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.question import Question
from fl_taskarith.engine.records import payload_bytes
from fl_taskarith.engine.replies import Failures
from fl_taskarith.engine.round_reply import Traffic

Check = Callable[[int, dict[str, Tensor]], object]
"""Raises a ValueError where a client's tensors are no sums over the examples of its shard."""

LARGEST_SQUARES = 1e12  # per example: squared gradients, or squared inputs of a layer; far beyond any model's


def ask_all(
    grid: PartitionGrid,
    failures: Failures,
    content: RecordDict,
    message_type: str,
    question: Question,
    device: torch.device,
    traffic: Traffic,
    check: Check,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Send `content` to all clients; yield the partition and tensors of each good reply, by ascending partition.

    The tensors have the shapes of the question's layout.

    Args:
        question: what is asked for in the record "arrays".
        traffic: the bytes and the clients' seconds are added to it.
        check: is called with the partition and the tensors of each reply.

    Raises:
        ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
    """
    partitions = grid.get_node_ids()
    question = dataclasses.replace(question, clients=partitions)
    traffic.downlink += len(partitions) * payload_bytes(content.array_records["arrays"])

    def read(reply: Message) -> tuple[int, dict[str, Tensor]]:
        answer = question.read(reply, device, failures.most_seconds)
        tensors = answer.tensors["arrays"]
        check(answer.client, tensors)
        traffic.seconds += answer.numbers["train-seconds"]
        traffic.uplink += answer.bytes
        return answer.client, tensors

    messages = (Message(content, partition, message_type) for partition in partitions)
    yield from failures.read(grid.exchange(messages), read)


def check_squares(tensors: dict[str, Tensor], examples: float) -> None:
    """Check that tensors of any shape can be sums of squares over so many examples.

    Raises:
        ValueError: an entry is negative, or far too large.
    """
    for name, value in tensors.items():
        if value.numel():
            least, most = (float(each) for each in value.aminmax())
            if not 0 <= least <= most <= LARGEST_SQUARES * max(examples, 1):
                raise ValueError(f"{name} goes from {least:g} to {most:g}, and is a sum of squares over {examples:g}")
