"""What the clients of one round sent back, as an aggregation algorithm sees it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Traffic:
    """Bytes of arrays in the messages of one round, as Flower serialises them, summed over its clients.

    seconds: that clients worked on questions of the round beside training.
    """

    downlink: int = 0
    uplink: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What one client sent back.

    client: its partition. task_vector: τ of what was sent to it; may be overwritten when the next reply is asked for.
    step_coefficient_sum: ‖a‖₁, how many plain SGD steps its local ones amount to (`optim.step_coefficient_sum`).
    others: tensors of its other array records, by the record's key.
    """

    client: int
    task_vector: dict[str, Tensor]
    num_examples: float
    step_coefficient_sum: float = 1.0
    others: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)


def held(replies: Iterable[Reply]) -> list[dict[str, Tensor]]:
    """All task vectors at once, in tensors of their own, for rules that cannot fold one at a time."""
    return [{name: value.clone() for name, value in reply.task_vector.items()} for reply in replies]
