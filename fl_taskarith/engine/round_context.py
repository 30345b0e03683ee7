"""What the server tells a strategy before each round, in one piece."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fl_taskarith.engine.grid import RoundSettings
from fl_taskarith.masking.mask import Mask


@dataclass(frozen=True)
class RoundContext:
    """What holds for all clients in a round.

    Attributes:
        learning_rate: the clients' step size in this round.
        state_folder: the folder in which clients keep files between rounds.
        frozen_name: the clients' file of the frozen tensors and the mask; empty if nothing is frozen.
        mask: the mask in that file; None if all entries are trained.
        linear_shapes: (out, in) of the weights of the trained linear layers, by name.
        logit_scale: the factor between the ridge head's own scores and the model's.
        shard_size: the number of examples of a partition; None if the server does not know it.
    """

    learning_rate: float = 0.0
    state_folder: str = ""
    frozen_name: str = ""
    mask: Mask | None = None
    linear_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    logit_scale: float = 1.0
    shard_size: Callable[[int], int] | None = None

    def settings(self, server_round: int, state_name: str = "") -> RoundSettings:
        """Return what a message of this round says beside tensors; `state_name` is the receiver's newest file."""
        return RoundSettings(
            server_round, self.learning_rate, self.state_folder, state_name, self.frozen_name, self.logit_scale
        )
