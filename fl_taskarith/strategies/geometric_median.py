"""The geometric median of the task vectors (Pillutla, Kakade, Harchaoui, IEEE TSP 2022: robust federated averaging)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import geometric_median
from fl_taskarith.strategies.fedavg import FedAvg, Reply, held


class GeometricMedian(FedAvg):
    """The point of least summed distance to the replies; every client counts alike."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Distances are over all tensors together."""
        vectors = held(replies)
        return geometric_median(vectors) if vectors else {}
