"""Sensitivity of each weight, the diagonal of the Fisher information, and its saliency, from gradients."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_taskarith.masking.per_example import add_gradients, add_squared_gradients
from fl_taskarith.storage.progress import tracked

GIBIBYTE = 2**30
MOST_AT_ONCE = {"cpu": 16, "cuda": 256}  # examples in a pass; a CPU's cache is best used by few


def sensitivity_sums(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, targets: Tensor,
    inputs_of: Callable[[Tensor], Tensor], *, labels: str, score: str, generator: np.random.Generator, memory: float,
    add: Callable[..., None] = add_squared_gradients,
) -> dict[str, Tensor]:  # fmt: skip
    """Return Σ_x (∂ s(x, y) / ∂θ_j)² over examples x; divided by their number, it is the diagonal Fisher information.

    F_j = E_x E_{y ~ p_θ(y|x)} (∂ log p_θ(y|x) / ∂θ_j)² (Iurada et al., ICLR 2025, eq. 4). Gradients are per example,
    then squared: the square of a batch's mean gradient is another quantity, with another ranking.

    Args:
        model: in any mode; run in eval mode, without dropout. Its own parameters serve for names not in `weights`,
            among them the head, whose scores carry the logit scale, so that p_θ is calibrated.
        weights: the scored tensors, used in place of the model's own of these names; neither is changed.
        images: uint8 [n, 3, H, W]; `inputs_of` makes model inputs of a part of them.
        targets: the true labels, int64 [n]; used under labels = "true" only.
        labels: y is "sampled" from p_θ(y|x) by `generator`, once per example, the "true" one (empirical Fisher), or
            "expected": the sum over all classes weighted by p_θ(y|x), exact in y, with a backward pass for each class.
        score: s is the "log-prob", or the raw "logit" of y as in the published TaLoS code.
        memory: GiB that the examples of one pass may take; decides how many are in a pass, at most `MOST_AT_ONCE`.
        add: how a batch is added to the sums; `add_gradients` leaves out the square.

    Returns:
        float32 sums by name, of the shapes of `weights`.
    """
    draws = torch.from_numpy(generator.random(len(targets))).to(targets.device)
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
    detached = {name: value.detach() for name, value in weights.items()}
    was_training = model.training
    was_trained = [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            needed = _bytes_per_example(model, detached, inputs_of(images[:1]))
            chunk = min(max(1, int(memory * GIBIBYTE / needed)), MOST_AT_ONCE[targets.device.type])
            starts = range(0, len(targets), chunk)
            for start in tracked(starts, len(starts), "Calibration: sensitivities"):
                part = slice(start, start + chunk)

                def labels_of(logits: Tensor, part: slice = part) -> Iterator[tuple[Tensor, Tensor | None]]:
                    if labels == "expected":
                        for label, share in enumerate(logits.softmax(1).unbind(1)):
                            yield torch.full_like(targets[part], label), share
                    else:
                        yield targets[part] if labels == "true" else _sampled_labels(logits, draws[part]), None

                add(sums, model, detached, inputs_of(images[part]), score, labels_of)
    finally:
        model.train(was_training)
        for parameter, trained in zip(model.parameters(), was_trained, strict=True):
            parameter.requires_grad_(trained)
    return sums


def saliency_sums(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, targets: Tensor,
    inputs_of: Callable[[Tensor], Tensor], memory: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Return |Σ_x θ_j ∂ log p_θ(y|x) / ∂θ_j| over examples x of true labels y; over their number, the saliency.

    It is SNIP's (Lee et al., ICLR 2019, eq. 5), without its normalisation, which changes no ranking. Summed over
    clients and divided by all examples it is SSFL's (Ohib et al., 2025), the mean of the clients' saliencies, weighted
    by their examples: gradients cancel within a client and never between clients. Arguments and float32 sums, of the
    shapes of `weights`, are as of `sensitivity_sums`.
    """
    sums = sensitivity_sums(
        model, weights, images, targets, inputs_of,
        labels="true", score="log-prob", generator=np.random.default_rng(0), memory=memory, add=add_gradients,
    )  # fmt: skip
    return {name: (value * weights[name]).abs_() for name, value in sums.items()}


def _sampled_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the labels whose interval of the cumulated softmax holds `draws`, [B] in [0, 1)."""
    cumulated = logits.double().softmax(1).cumsum(1)
    return (cumulated <= draws.unsqueeze(1)).sum(1).clamp_max(logits.shape[1] - 1)


def _bytes_per_example(model: nn.Module, weights: Mapping[str, Tensor], one: Tensor) -> int:
    """Return the bytes that a forward pass of one example, [1, 3, S, S], saves, doubled for the backward pass."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        functional_call(model, leaves, (one,))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *leaves.values())}
    return 2 * sum(size for pointer, size in saved.items() if pointer not in own) + one.numel() * 4
