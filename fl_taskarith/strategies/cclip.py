"""Centred clipping of the task vectors (Karimireddy et al., ICML 2021)."""

from collections.abc import Iterable

from torch import Tensor

from fl_taskarith.config.rule import AUTO
from fl_taskarith.merging.robust import centred_clipping, distances
from fl_taskarith.strategies.fedavg import FedAvg, Reply, all_task_vectors


class CentredClipping(FedAvg):
    """v ← v + mean_k (τ_k − v) · min(1, ρ/‖τ_k − v‖), `clipping-iterations` times; every client counts alike.

    v starts at zero, or at the last round's result (`clipping-start`). ρ is `clipping-radius`; "auto" is the median
    distance of the round's task vectors from that start, so that about half of them are clipped: our choice, because no
    fixed radius suits all models.
    """

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return v after the last iteration, in the shapes of `weights`."""
        vectors, config = all_task_vectors(replies), self.config
        start = self.recalled("centre", vectors[0])
        radius = config.clipping_radius
        if radius == AUTO:
            radius = float(distances(vectors, start).nanquantile(0.5)) or 1.0  # all at the start: nothing to clip
        centre = centred_clipping(vectors, float(radius), config.clipping_iterations, start)
        if config.clipping_start == "previous":
            self.keep("centre", centre)
        return centre
