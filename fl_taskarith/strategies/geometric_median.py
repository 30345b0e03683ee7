"""The geometric median of the task vectors (RFA: Pillutla, Kakade, Harchaoui, IEEE TSP 2022)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import geometric_median
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class GeometricMedian(FedAvg):
    """The point of least summed distance to the task vectors; every client counts alike."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return that point, in the shapes of `weights`; distances are over all tensors together."""
        return geometric_median(all_task_vectors(replies))
