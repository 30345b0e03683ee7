"""Averaging of linear layers by how much of each input a client has seen, after RegMean. Pure: no Flower, no data set.

For one layer with inputs x, RegMean (Jin et al., ICLR 2023) merges the weights W_k into the W that best predicts every
client's own outputs, Σ_k ‖W X_k − W_k X_k‖², which is (Σ W_k G_k)(Σ G_k)⁻¹ with G_k = X_k X_kᵀ. As a task vector, with
clients that are not in the round holding on to the present weights by γ, it is

    ΔW = (Σ_S ΔW_k G_k)(Σ_S G_k + γ Σ_∉S G_k + εI)⁻¹.

Here every G_k is its diagonal, Σ x_j² over the client's tokens (behind the last attention of a model that computes the
class token alone, over that one: no other output is read). Then each entry of W has a minimiser of its own, so
projecting on a mask gives the constrained minimiser, and a client sends one number per input, where the full G of a
ViT-S take 134 MB. Equal G_k and γ = ε = 0 give FedAvg; γ > 0 shortens the step where others have much to lose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def per_entry(diagonal: Tensor, out_features: int, indices: Tensor | None) -> Tensor:
    """Return the diagonal [in] as a factor on the entries of W: [out, in], or [n] for a mask's flat `indices`."""
    if indices is None:
        return diagonal[None].expand(out_features, -1)
    return diagonal[indices % len(diagonal)]


class GramAnchoredSum:
    """Adds up ΔW_k and its factors of one layer, client by client; all tensors have the shape of ΔW."""

    def __init__(self) -> None:
        self._weighted: Tensor | None = None
        self._factors: Tensor | None = None

    def add(self, change: Tensor, factors: Tensor) -> None:
        """Add one client's ΔW_k and G_k, float32 of the shape of ΔW."""
        if self._weighted is None or self._factors is None:
            self._weighted, self._factors = change.float() * factors, factors.float().clone()
            return
        self._weighted.addcmul_(change.float(), factors)
        self._factors += factors

    def result(self, absent: Tensor, anchor: float, epsilon: float) -> Tensor:
        """Return ΔW, in its shape; zero for an input that no client in the round has seen.

        Args:
            absent: Σ_∉S G_k, of the shape of ΔW.
            anchor: γ.
            epsilon: ε, as a share of the mean of Σ_S G_k over the entries given.
        """
        if self._weighted is None or self._factors is None:
            raise ValueError("there are no task vectors to aggregate")
        divisor = self._factors + anchor * absent + epsilon * self._factors.mean()
        return torch.where(divisor > 0, self._weighted / divisor, 0.0)


def total(diagonals: Mapping[int, Mapping[str, Tensor]], name: str) -> Tensor:
    """Return Σ_k G_k, [in], of the layer `name` over all clients, by ascending client."""
    return torch.stack([diagonals[client][name] for client in sorted(diagonals)]).sum(0)
