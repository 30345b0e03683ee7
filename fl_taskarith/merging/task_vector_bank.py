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


class TaskVectorBank:
    """Σ n_k γ^age_k τ_k / Σ n_k γ^age_k over the clients that have replied; the age of a task vector is in rounds.

    A client that has never replied has no weight, so the first round is FedAvg's (a strategy may wait until `len` is
    K). With all clients in every round and float32 the mean is FedAvg's to the bit.

    Args:
        dtype: in which task vectors are stored, float32 or bfloat16; sums are float32.
        decay: γ, 1 to let a task vector count until it is replaced.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, decay: float = 1.0) -> None:
        self.dtype, self.decay = dtype, decay
        self._names: list[str] = []
        self._newest: dict[int, tuple[dict[str, Tensor], float, int]] = {}  # by client: τ_k, n_k, age

    def begin_round(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Let all task vectors grow a round older; drop all if task vectors have other shapes from now on, `shapes`."""
        self._names = list(shapes)
        layouts = [{name: tuple(value.shape) for name, value in vector.items()} for vector, *_ in self._newest.values()]
        kept = {} if any(layout != dict(shapes) for layout in layouts) else self._newest
        self._newest = {client: (vector, examples, age + 1) for client, (vector, examples, age) in kept.items()}

    def put(self, client: int, task_vector: Mapping[str, Tensor], examples: float) -> None:
        """Store a copy of a client's newest task vector, of the `begin_round` shapes, in place of its last one."""
        copies = {name: value.to(self.dtype, copy=True) for name, value in task_vector.items()}
        self._newest[client] = copies, examples, 0

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean, float32 in the `begin_round` shapes, added up by ascending client."""
        mean = WeightedMean()
        for _, (vector, examples, age) in sorted(self._newest.items()):
            if (weight := examples * self.decay**age) > 0:  # γ = 0, or an age at which γ^age is too small for a number
                mean.add(vector, weight)
        result = mean.result()
        return {name: result[name] for name in self._names if name in result}  # an order that no file has changed

    def __len__(self) -> int:
        return len(self._newest)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, for a checkpoint: task vectors as "CLIENT/name", (examples, age) [2] as "CLIENT/"."""
        return {
            f"{client}/{name}": value
            for client, (vector, examples, age) in self._newest.items()
            for name, value in {"": torch.tensor([examples, age], dtype=torch.float64), **vector}.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned, in the same names and shapes."""
        groups: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            client, _, name = key.partition("/")
            groups.setdefault(int(client), {})[name] = value
        facts = {client: group.pop("").tolist() for client, group in groups.items()}
        self._newest = {client: (group, facts[client][0], int(facts[client][1])) for client, group in groups.items()}
