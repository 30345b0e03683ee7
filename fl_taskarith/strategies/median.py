"""The coordinate-wise median of the task vectors (Yin et al., ICML 2018)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import coordinate_median
from fl_taskarith.strategies.fedavg import FedAvg, Reply, held


class Median(FedAvg):
    """Every client counts alike, whatever its number of examples; all replies of a round are held at once."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """The median of every entry."""
        vectors = held(replies)
        return coordinate_median(vectors) if vectors else {}
