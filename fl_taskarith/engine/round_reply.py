"""What the clients of one round sent back, as an aggregation algorithm sees it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fl_taskarith.errors import ConfigError


@dataclass
class Traffic:
    """Bytes of arrays in the messages of one round, as Flower serialises them, summed over its clients.

    seconds: the time that clients worked on questions of the round beside training.
    """

    downlink: int = 0
    uplink: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What one client sent back.

    client: its partition. task_vector: τ of the tensors that were sent to it, of their shapes; it may be overwritten
    when the next reply is asked for. step_coefficient_sum: ‖a‖₁, the number of plain SGD steps that the client's steps
    amount to (`training.schedules.step_coefficient_sum`). others: the tensors of its other array records, by key.
    """

    client: int
    task_vector: dict[str, Tensor]
    num_examples: float
    step_coefficient_sum: float = 1.0
    others: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


class OnePass:
    """Replies that can be iterated over once, and say so the second time."""

    def __init__(self, replies: Iterator[Reply]) -> None:
        self._replies: Iterator[Reply] | None = replies

    def __iter__(self) -> Iterator[Reply]:
        if self._replies is None:
            raise ConfigError(
                "A strategy iterated over its replies twice, and they are gone after the first time. Copy what is "
                "needed again: all_task_vectors(replies), of fl_taskarith.strategies.fedavg, copies the task vectors."
            )
        replies, self._replies = self._replies, None
        return replies


def all_task_vectors(replies: Iterable[Reply]) -> list[dict[str, Tensor]]:
    """Copy all task vectors, in their shapes, for rules that need all of them at once."""
    return [{name: value.clone() for name, value in reply.task_vector.items()} for reply in replies]
