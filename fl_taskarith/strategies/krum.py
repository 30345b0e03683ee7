"""Krum: the one task vector that lies closest to its neighbours (Blanchard et al., NeurIPS 2017)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.robust import aggregate_by
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class Krum(FedAvg):
    """Assumes f = ⌊βn⌋ Byzantine clients among n, β = `trimmed-share`, or the most that Krum of n tolerates."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the chosen client's task vector, in the shapes of `weights`."""
        vectors = all_task_vectors(replies)
        return aggregate_by("krum", vectors, [1.0] * len(vectors), self.config.trimmed_share)
