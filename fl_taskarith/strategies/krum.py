"""Krum: the one task vector that lies closest to its neighbours (Blanchard et al., NeurIPS 2017)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.merging.cluster_rules import aggregate_by
from fl_taskarith.strategies.fedavg import FedAvg, Reply, held


class Krum(FedAvg):
    """Reckons with f = ⌊βn⌋ Byzantine among n replies, β = `trimmed-share`, or with the most that n can bear."""

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """The chosen client's task vector."""
        vectors = held(replies)
        return aggregate_by("krum", vectors, [1.0] * len(vectors), self.config.trimmed_share) if vectors else {}
