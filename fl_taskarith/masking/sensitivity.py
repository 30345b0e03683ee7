"""Sensitivity of each weight: the diagonal of the Fisher information, from per-example gradients.

`torch.func.vmap` over `grad` gives them for a whole chunk of examples. For the weights of Linear layers it gives the
two factors instead, the layer's input and the gradient of its output, whose product is the per-example gradient
(Goodfellow, arXiv 1510.01799): one product at a time then takes the place of 4 bytes per weight and example.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

LABELS = ("sampled", "true", "expected")
SCORES = ("log-prob", "logit")

GIBIBYTE = 2**30
PRODUCT_BYTES = {"cpu": 2**20, "cuda": 2**28}  # of weight gradients at a time: what a cache holds; many for a GPU


def sensitivity_sums(
    model: nn.Module,
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
    linear = _linear_weights(model, weights)
    direct = {name: value for name, value in detached.items() if name not in linear}
    fixed = {name: value for name, value in detached.items() if name in linear}

    def objective(
        scored: dict[str, Tensor], taps: dict[str, Tensor], image: Tensor, target: Tensor, draw: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with _tapped(linear, taps) as layer_inputs:
            logits: Tensor = functional_call(model, {**fixed, **scored}, (image.unsqueeze(0),))[0]
        label = _sampled_label(logits.detach(), draw) if labels == "sampled" else target
        of_classes = logits if score == "logit" else logits.log_softmax(0)
        return of_classes.gather(0, label.unsqueeze(0))[0], layer_inputs

    per_example = vmap(grad(objective, argnums=(0, 1), has_aux=True), in_dims=(None, None, 0, 0, 0))
    with _plain_attention(model), torch.no_grad():
        taps, needed = _measure(model, detached, linear, inputs_of(images[:1]))
        chunk = max(1, int(memory * GIBIBYTE / needed))
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            inputs = inputs_of(images[part])
            label_shares: list[tuple[Tensor, Tensor | None]] = [(targets[part], None)]
            if labels == "expected":
                shares = functional_call(model, detached, (inputs,)).softmax(1).unbind(1)
                label_shares = [(torch.full_like(targets[part], label), share) for label, share in enumerate(shares)]
            for label, share in label_shares:
                (gradients, deltas), layer_inputs = per_example(direct, taps, inputs, label, draws[part])
                scale = None if share is None else share.sqrt()
                _add_squares(sums, gradients, scale)
                _add_squares_of_products(sums, deltas, layer_inputs, scale)
    return sums


def _sampled_label(logits: Tensor, draw: Tensor) -> Tensor:
    """The label whose interval of the cumulated softmax holds `draw` in [0, 1): inverse transform sampling."""
    cumulated = logits.double().softmax(0).cumsum(0)
    return (cumulated <= draw).sum().clamp_max(len(logits) - 1)


def _add_squares(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scale: Tensor | None) -> None:
    """Add Σ_b (scale_b · g_b)² of per-example gradients g [B, ...]; scale is 1 if none is given."""
    for name, gradient in gradients.items():
        sums[name].add_(_scaled(gradient, scale).square().sum(0))


def _add_squares_of_products(
    sums: Mapping[str, Tensor], deltas: Mapping[str, Tensor], inputs: Mapping[str, Tensor], scale: Tensor | None
) -> None:
    """Add Σ_b (scale_b · G_b)² of G_b = δ_bᵀ x_b, the gradient of a Linear's weight, from δ and x [B, ..., ·].

    A few products at a time: they are squared and added while they lie in the cache, and gradients of all weights for
    all examples, by far the largest thing here, never exist at once.
    """
    for name, delta in deltas.items():
        total = sums[name]
        left, right = _scaled(delta, scale).flatten(1, -2).transpose(1, 2), inputs[name].flatten(1, -2)
        together = max(1, PRODUCT_BYTES[total.device.type] // (4 * total.numel()))
        for a, b in zip(left.split(together), right.split(together), strict=True):
            product = torch.bmm(a, b)
            if together == 1:
                total.addcmul_(product[0], product[0])
            else:
                total.add_(product.square_().sum(0))


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """values [B, ...] times scale [B]."""
    return values if scale is None else values * scale.view(-1, *[1] * (values.ndim - 1))


def _linear_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """The Linear layers whose weight is scored, by the name of that weight."""
    layers = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layers[name] for name in weights if name in layers}


@contextmanager
def _tapped(layers: Mapping[str, nn.Linear], taps: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Add taps[name] (zeros) to what each layer returns, and collect what each gets.

    The gradient of a tap is δ, that of the layer's output. Fills the dictionary that it yields.
    """
    inputs: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = arguments[0]
            return output + taps[name] if name in taps else output

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
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


def _measure(
    model: nn.Module, weights: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], one: Tensor
) -> tuple[dict[str, Tensor], int]:
    """From one example, [1, 3, S, S]: zero taps of the layers, and the bytes that an example needs.

    Those are what a forward pass saves, about as much again for the gradients on the way back, and the per-example
    gradients of all weights outside of the Linear layers.
    """
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        _tapped(layers, {}) as inputs,
    ):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        functional_call(model, leaves, (one,))
    taps = {
        name: torch.zeros(*inputs[name].shape[:-1], layer.out_features, device=one.device)
        for name, layer in layers.items()
    }
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *leaves.values())}
    activations = sum(size for pointer, size in saved.items() if pointer not in own)
    gradients = sum(4 * value.numel() for name, value in weights.items() if name not in layers)
    return taps, 2 * activations + gradients
