"""The coordinate-wise median of the task vectors (Yin et al., ICML 2018)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import coordinate_median
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class Median(FedAvg):
    """Every client counts alike, whatever its number of examples; all replies of a round are in memory at once."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the median of every entry, in the shapes of `weights`."""
        return coordinate_median(all_task_vectors(replies))
