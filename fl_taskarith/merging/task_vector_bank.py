"""The newest task vector of every client, so that a round's mean is over all clients that have ever replied.

With few clients per round and few classes per client, the mean of a round points to the classes at hand; the mean of
everybody's newest task vector does not (MIFA: Gu et al., NeurIPS 2021; for gradients SAG: Schmidt, Le Roux, Bach 2017).
A task vector of older weights is stale, and each one is applied in about 1/C rounds, with C the share of clients per
round: tune the server's step for it. Pure: no Flower, no data set.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fl_taskarith.merging.aggregate import WeightedMean

EXAMPLES, AGE = "examples", "age"


class TaskVectorBank:
    """Σ n_k γ^age_k τ_k / Σ n_k γ^age_k over the clients that have replied; the age of a task vector is in rounds.

    A client that has never replied has no weight, so the first round is FedAvg's (a strategy may wait until `len` is
    K). With all clients in every round and float32 the mean is FedAvg's to the bit.

    Args:
        dtype: in which task vectors are stored, float32 or bfloat16; sums are float32.
        decay: γ, 1 to let a task vector count until it is replaced.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, decay: float = 1.0) -> None:
        self.dtype = dtype
        self.decay = decay
        self._names: list[str] = []
        self._vectors: dict[int, dict[str, Tensor]] = {}
        self._examples: dict[int, float] = {}
        self._ages: dict[int, int] = {}

    def begin_round(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Let all task vectors grow a round older; drop all if task vectors have other shapes from now on, `shapes`."""
        self._names = list(shapes)
        for vector in self._vectors.values():
            if {name: tuple(value.shape) for name, value in vector.items()} != dict(shapes):
                self._vectors, self._examples, self._ages = {}, {}, {}
                break
        self._ages = {client: age + 1 for client, age in self._ages.items()}

    def put(self, client: int, task_vector: Mapping[str, Tensor], examples: float) -> None:
        """Store a copy of a client's newest task vector, of the `begin_round` shapes, in place of its last one."""
        self._vectors[client] = {name: value.to(self.dtype, copy=True) for name, value in task_vector.items()}
        self._examples[client], self._ages[client] = examples, 0

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean, float32 in the `begin_round` shapes, added up by ascending client."""
        mean = WeightedMean()
        for client in sorted(self._vectors):
            weight = self._examples[client] * self.decay ** self._ages[client]
            if weight > 0:  # γ = 0, or an age at which γ^age is too small for a number
                mean.add(self._vectors[client], weight)
        result = mean.result()
        return {name: result[name] for name in self._names if name in result}  # an order that no file has changed

    @property
    def bytes(self) -> int:
        """The bytes that the task vectors take."""
        return sum(value.nbytes for vector in self._vectors.values() for value in vector.values())

    def __len__(self) -> int:
        return len(self._vectors)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, for a checkpoint: task vectors as "CLIENT/name", (examples, age) [2] as "CLIENT/"."""
        facts = {
            client: torch.tensor([self._examples[client], self._ages[client]], dtype=torch.float64)
            for client in self._vectors
        }
        return {
            f"{client}/{name}": value
            for client, vector in self._vectors.items()
            for name, value in {"": facts[client], **vector}.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned, in the same names and shapes."""
        self._vectors, self._examples, self._ages = {}, {}, {}
        for key, value in tensors.items():
            client, _, name = key.partition("/")
            if name:
                self._vectors.setdefault(int(client), {})[name] = value
            else:
                self._examples[int(client)], self._ages[int(client)] = float(value[0]), int(value[1])
