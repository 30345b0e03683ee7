"""What a client minimises: a loss of its scores, and for two losses what another model says of the same inputs."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.models.compilation import Network

NOT_TRUE, ANCHORED = "not-true-distillation", "feature-anchoring"
REFERRING = (NOT_TRUE, ANCHORED)  # losses that take one more forward pass per step


class ScoresAndFeatures(nn.Module):
    """A network that returns its scores [B, c] with the features [B, d] of which its head computes them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, c] and features [B, d] of the network's inputs, [B, 3, S, S] or [B, T, d]."""
        network = self.network
        features: Tensor = network.forward_head(network.forward_features(inputs), pre_logits=True)
        return network.head(features), features


Outputs = Tensor | tuple[Tensor, Tensor]
"""Scores [B, c], or those with features [B, d]."""


@dataclass(frozen=True)
class LocalLoss:
    """The loss of local steps.

    Attributes:
        name: "cross-entropy", "squared" (`local_loss`), or the cross-entropy with a second term:
            "not-true-distillation" adds β τ² KL(q ‖ p) over the classes that are not the label (`not_true_divergence`)
            between the model at the start of the round, q, and now, p (Lee et al., NeurIPS 2022; they have τ = 1);
            "feature-anchoring" adds (μ/2) ‖h_θ(x) − h_θ₀(x)‖² of the head's inputs h, averaged over the batch.
        logit_scale: of the ridge head; see `local_loss`.
        weight: β or μ.
        temperature: τ.
        reference_weights: holds θ₀ in the model while it is entered; by default the model stays as it is.
    """

    name: str = "cross-entropy"
    logit_scale: float = 1.0
    weight: float = 0.0
    temperature: float = 1.0
    reference_weights: Callable[[], AbstractContextManager[object]] = nullcontext

    def network(self, model: Network) -> nn.Module:
        """Return what computes the `Outputs` that this loss takes: `model` itself, or with its features."""
        return ScoresAndFeatures(model) if self.name == ANCHORED else model

    @torch.no_grad()
    def references(self, network: nn.Module, batches: Iterable[Tensor]) -> list[Tensor] | None:
        """Return the scores [B, c] or features [B, d], to which the second term holds the model, of each batch.

        This is a forward pass over all batches of a round before its first step: about a third of what the steps
        themselves cost. None for a loss without such a term.

        Args:
            network: that of `network`, on the round's first weights; in evaluation mode afterwards.
            batches: its inputs, [B, 3, S, S] or tokens [B, T, d].
        """
        if self.name not in REFERRING:
            return None
        network.eval()
        with self.reference_weights():
            return [(outputs[1] if isinstance(outputs, tuple) else outputs).float()
                    for outputs in map(network, batches)]  # fmt: skip

    def __call__(self, outputs: Outputs, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the mean loss, a scalar, of outputs for labels int64 [B], with the batch's own reference."""
        scores, features = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = local_loss(scores, labels, self.name, self.logit_scale)
        if reference is None:
            return loss
        if features is not None:
            return loss + 0.5 * self.weight * (features.float() - reference).square().sum(1).mean()
        divergence = not_true_divergence(scores.float(), reference, labels, self.temperature)
        return loss + self.weight * self.temperature**2 * divergence


def local_loss(scores: Tensor, labels: Tensor, name: str, logit_scale: float = 1.0) -> Tensor:
    """Return the mean loss of scores [b, c], labels int64 [b]: "squared" is ½‖scores/s − one-hot‖², else cross-entropy.

    s = `logit_scale` is the factor of the ridge head's own scores that calibrates their softmax. The ridge head
    minimises the "squared" loss: its targets are bounded, so a client changes its features by the residuals alone.
    """
    if name != "squared":
        return functional.cross_entropy(scores, labels)
    targets = functional.one_hot(labels, scores.shape[1])
    return 0.5 * (scores.float() / logit_scale - targets).square().sum(1).mean()


def not_true_divergence(scores: Tensor, reference: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the mean of KL(q ‖ p) over all classes but the label, q the softmax of the reference, p of the scores.

    Args:
        scores, reference: [b, c], divided by the temperature before the softmax over c − 1 classes.
        labels: int64 [b].
    """
    others = torch.arange(scores.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    others = others + (others >= labels.unsqueeze(1))
    found, wanted = ((each.gather(1, others) / temperature).log_softmax(1) for each in (scores, reference))
    return (wanted.exp() * (wanted - found)).sum() / len(labels)
