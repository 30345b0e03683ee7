"""Questions to all clients beside training: for the head's sums, the scores of a mask, or Grams."""

from collections.abc import Callable, Iterator

import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.records import payload_bytes
from fl_taskarith.engine.replies import Failures, Layout, check_examples, check_finite, number, tensors_of
from fl_taskarith.engine.round_reply import Traffic


def ask_all(
    grid: PartitionGrid,
    failures: Failures,
    content: RecordDict,
    message_type: str,
    layout: Layout,
    device: torch.device,
    traffic: Traffic,
    examples_of: Callable[[int], int] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Send `content` to all clients; yield the partition and tensors of each good reply, by ascending partition.

    Args:
        layout: the types and shapes of the tensors that are asked for.
        traffic: the bytes and the clients' seconds are added to it.
        examples_of: the number of examples that a partition must report, if the caller knows it.

    Raises:
        ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
    """
    partitions = grid.get_node_ids()
    traffic.downlink += len(partitions) * payload_bytes(content.array_records["arrays"])

    def read(reply: Message) -> tuple[int, dict[str, Tensor]]:
        client = reply.metadata.src_node_id
        if examples_of is not None:
            check_examples(reply, examples_of(client))
        tensors = tensors_of(reply, "arrays", device, layout)
        check_finite(reply, tensors)
        traffic.seconds += number(reply, "train-seconds")
        traffic.uplink += payload_bytes(reply.content.array_records["arrays"])
        return client, tensors

    messages = (Message(content, partition, message_type) for partition in partitions)
    yield from failures.read(grid.exchange(messages), read)
