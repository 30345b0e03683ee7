"""Sensitivity of each weight: the diagonal of the Fisher information, from per-example gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.func import functional_call, grad, vmap

LABELS = ("sampled", "true", "expected")
SCORES = ("log-prob", "logit")

GIBIBYTE = 2**30


def sensitivity_sums(
    model: VisionTransformer,
    weights: Mapping[str, Tensor],
    images: Tensor,
    targets: Tensor,
    inputs_of: Callable[[Tensor], Tensor],
    *,
    labels: str,
    score: str,
    generator: np.random.Generator,
    memory: float,
) -> dict[str, Tensor]:
    """Σ_x (∂ s(x, y) / ∂θ_j)² over examples x: divided by their number, the diagonal Fisher information F_j.

    F_j = E_x E_{y ~ p_θ(y|x)} (∂ log p_θ(y|x) / ∂θ_j)² (Iurada et al., ICLR 2025, eq. 4). Gradients are per example,
    then squared: the square of a batch's mean gradient is another quantity with another ranking.

    Args:
        model: in any mode; run in eval mode, without dropout. Its own parameters serve for names not in `weights`,
            among them the head, whose scores carry the logit scale, so that p_θ is calibrated.
        weights: the scored tensors, used in place of the model's own of these names; neither is changed.
        images: uint8 [n, 3, H, W]; `inputs_of` makes model inputs of a part of them.
        targets: the true labels, int64 [n]; used under labels = "true" only.
        labels: y is "sampled" from p_θ(y|x) once per example, the "true" one (empirical Fisher), or "expected": the
            sum over all classes weighted by p_θ(y|x), exact in y and as many times as expensive as there are classes.
        score: s is the "log-prob", or the raw "logit" of y as in the published TaLoS code.
        generator: of the sampled labels.
        memory: GiB that per-example gradients and activations may take; sets how many examples go at once.

    Returns:
        float32 sums by name, of the shapes of `weights`.
    """
    draws = torch.from_numpy(generator.random(len(targets))).to(targets.device)
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
    detached = {name: value.detach() for name, value in weights.items()}

    def objective(scored: dict[str, Tensor], image: Tensor, target: Tensor, draw: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, scored, (image.unsqueeze(0),))[0]
        label = _sampled_label(logits.detach(), draw) if labels == "sampled" else target
        of_classes = logits if score == "logit" else logits.log_softmax(0)
        return of_classes.gather(0, label.unsqueeze(0))[0]

    per_example = vmap(grad(objective), in_dims=(None, 0, 0, 0))
    with _plain_attention(model), torch.no_grad():
        chunk = _examples_at_once(model, detached, inputs_of(images[:1]), memory)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            inputs = inputs_of(images[part])
            if labels != "expected":
                gradients = per_example(detached, inputs, targets[part], draws[part])
                _add_squares(sums, gradients)
                continue
            probabilities = functional_call(model, detached, (inputs,)).softmax(1)
            for label, share in enumerate(probabilities.unbind(1)):
                gradients = per_example(detached, inputs, torch.full_like(targets[part], label), draws[part])
                _add_squares(sums, gradients, share)
    return sums


def _sampled_label(logits: Tensor, draw: Tensor) -> Tensor:
    """The label whose interval of the cumulated softmax holds `draw` in [0, 1): inverse transform sampling."""
    cumulated = logits.double().softmax(0).cumsum(0)
    return (cumulated <= draw).sum().clamp_max(len(logits) - 1)


def _add_squares(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], shares: Tensor | None = None) -> None:
    """Add Σ_b shares_b · g_b² of per-example gradients [B, ...] to the sums; every share is 1 if none are given."""
    for name, gradient in gradients.items():
        squares = gradient.square()  # not in place: two parameters' gradients may be views of the same memory
        if shares is not None:
            squares.mul_(shares.view(-1, *[1] * (squares.ndim - 1)))
        sums[name].add_(squares.sum(0))


@contextmanager
def _plain_attention(model: VisionTransformer) -> Iterator[None]:
    """Eval mode with attention written out: the fused kernel has no batching rule. Puts everything back afterwards."""
    was_training = model.training
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _examples_at_once(model: VisionTransformer, weights: Mapping[str, Tensor], one: Tensor, memory: float) -> int:
    """How many examples fit in `memory` GiB: each takes its gradients, and what one forward pass saves."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        functional_call(model, leaves, (one,))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    activations = sum(size for pointer, size in saved.items() if pointer not in own)
    gradients = sum(value.numel() * 4 for value in weights.values())
    return max(1, int(memory * GIBIBYTE / (activations + gradients)))
