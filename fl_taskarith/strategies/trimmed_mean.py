"""The coordinate-wise trimmed mean of the task vectors (Yin et al., ICML 2018)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import trimmed_mean
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class TrimmedMean(FedAvg):
    """Drops the ⌊βn⌋ smallest and largest of n values per entry, β = `trimmed-share`; every client counts alike."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the trimmed mean of every entry, in the shapes of `weights`."""
        return trimmed_mean(all_task_vectors(replies), self.config.trimmed_share)
