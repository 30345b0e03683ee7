"""Squared per-example gradients of a whole batch, from one forward and one backward pass.

A layer's output gradient δ_b and its input x_b hold the gradient of its weights for example b (Goodfellow, arXiv
1510.01799): δ_bᵀ x_b for a Linear. So a batch costs one pass and one small product per layer and example, and the
gradients of all weights for all examples, 4 bytes each, never exist at once. Parameters that enter by broadcasting
(LayerNorm, LayerScale, tokens, the position embedding) get a copy per example, whose gradient is that example's. All
other parameters go through `torch.func.vmap` over `grad`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers.layer_scale import LayerScale
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fl_taskarith.models.per_client import QKV_BIASES, ROOT_TOKENS, SCALES, is_patch_embedding

PRODUCT_BYTES = {"cpu": 2**22, "cuda": 2**28}  # of weight gradients at a time: what a cache holds; many for a GPU


def label_scores(logits: Tensor, labels: Tensor, score: str) -> Tensor:
    """Return the "log-prob" or raw "logit" of each example's label: [B] from logits [B, classes], labels int64 [B]."""
    of_classes = logits if score == "logit" else logits.log_softmax(1)
    return of_classes.gather(1, labels.unsqueeze(1)).squeeze(1)


LabelsOf = Callable[[Tensor], Iterator[tuple[Tensor, Tensor | None]]]
"""From logits [B, classes], without gradient, to labels int64 [B] with their factor s, [B] from 0, or None for 1."""


def add_squared_gradients(
    sums: Mapping[str, Tensor], model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, score: str,
    labels_of: LabelsOf,
) -> None:  # fmt: skip
    """Add Σ_b s_b (∂ score_b / ∂θ)² of a batch to `sums`.

    Args:
        sums: float32 by name, of the shapes of `weights`; added to in place.
        model: in eval mode. Its own parameters serve for names not in `weights`.
        weights: the scored tensors, without gradients.
        inputs: model inputs, float32 [B, 3, S, S].
        score: "log-prob" or "logit" (`label_scores`).
        labels_of: of the labels whose scores are differentiated.
    """
    layers = _Layers(model, weights, len(inputs))
    with torch.enable_grad(), layers.watched():
        logits = functional_call(model, layers.replaced, (inputs,))
    for labels, share in labels_of(logits.detach()):
        scale = None if share is None else share.sqrt()
        with torch.enable_grad():
            total = label_scores(logits, labels, score).sum()
        copies, outputs = layers.copies, layers.outputs
        leaves = [*copies.values(), *outputs.values()]
        gradients: tuple[Tensor, ...] = ()
        if leaves:
            gradients = torch.autograd.grad(total, leaves, retain_graph=share is not None, materialize_grads=True)
        for name, gradient in zip(copies, gradients[: len(copies)], strict=True):
            sums[name].add_(_scaled(gradient, scale).square().sum(0).view(sums[name].shape))
        for name, delta in zip(outputs, gradients[len(copies) :], strict=True):
            delta = _scaled(delta, scale)
            if f"{name}.weight" in sums:
                _add_products(sums[f"{name}.weight"], *layers.factors(name, delta))
            if f"{name}.bias" in sums:
                channel = 1 if isinstance(layers.modules[name], nn.Conv2d) else -1
                each = delta.movedim(channel, -1).flatten(1, -2) if delta.ndim > 2 else delta.unsqueeze(1)
                sums[f"{name}.bias"].add_(each.sum(1).square().sum(0))
            for bias, third in zip(QKV_BIASES, delta.chunk(3, -1), strict=False):
                if (own := f"{name.removesuffix('qkv')}{bias}") in layers.thirds:
                    sums[own].add_(third.sum(1).square().sum(0))
        for name, gradient in _by_vmap(model, weights, layers.left_over, inputs, labels, score).items():
            sums[name].add_(_scaled(gradient, scale).square().sum(0))


def add_gradients(
    sums: Mapping[str, Tensor], model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, score: str,
    labels_of: LabelsOf,
) -> None:  # fmt: skip
    """Add Σ_b s_b ∂ score_b / ∂θ of a batch to `sums`; shapes and arguments are those of `add_squared_gradients`."""
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    with torch.enable_grad():
        logits = functional_call(model, leaves, (inputs,))
        scores = [_scaled(label_scores(logits, labels, score), share) for labels, share in labels_of(logits.detach())]
        total = torch.cat(scores).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        sums[name].add_(gradient)


class _Layers:
    """How the per-example gradient of each scored parameter is computed, for one batch.

    Attributes:
        modules: by name, the Linear and patch-embedding layers whose δ and x are recorded.
        outputs: their outputs, in the graph.
        replaced: what the forward pass uses in place of the model's parameters.
        copies: one leaf [B, ...] per broadcast parameter.
        thirds: names of biases [d] that are added to a third of the output [B, T, 3d] of such a layer.
        left_over: names that need vmap.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], batch: int) -> None:
        self.replaced: dict[str, Tensor] = dict(weights)
        self.copies: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.norms: dict[str, nn.LayerNorm] = {}
        self.outputs: dict[str, Tensor] = {}
        self.thirds: list[str] = []
        self.left_over: list[str] = []
        self._inputs: dict[str, Tensor] = {}
        for name, value in weights.items():
            owner, _, own_name = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, nn.Linear) or is_patch_embedding(module):
                self.modules[owner] = module
            elif _is_plain_norm(module, own_name, f"{owner}.bias" in weights):
                assert isinstance(module, nn.LayerNorm)
                self.norms[owner] = module
                self.copies[name] = self._copy(value, batch)
                # The layer itself then only normalises; its output is scaled and shifted per example afterwards.
                self.replaced[name] = torch.ones_like(value) if own_name == "weight" else torch.zeros_like(value)
            elif own_name in QKV_BIASES and isinstance(module, EvaAttention) and module.qkv_bias_separate:
                self.modules[f"{owner}.qkv"] = module.qkv
                self.thirds.append(name)
            elif isinstance(module, LayerScale) or own_name in SCALES:
                self.copies[name] = self.replaced[name] = self._copy(value.unsqueeze(0), batch)
            elif name in ROOT_TOKENS and value.shape[0] == 1:
                self.copies[name] = self.replaced[name] = self._copy(value[0], batch)
            else:
                self.left_over.append(name)

    @staticmethod
    def _copy(value: Tensor, batch: int) -> Tensor:
        return value.expand(batch, *value.shape).clone().requires_grad_()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the layers' inputs and outputs in a forward pass, and apply the copies of LayerNorm's parameters."""
        handles = [module.register_forward_hook(partial(self._record, name)) for name, module in self.modules.items()]
        handles += [module.register_forward_hook(partial(self._affine, name)) for name, module in self.norms.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        passed_by = self.modules.keys() - self.outputs.keys()  # their weights are used, and they are not called
        self.left_over += [name for name in self.replaced if name.rpartition(".")[0] in passed_by]

    def factors(self, name: str, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return δ [B, tokens, out] and x [B, tokens, in] of a layer, from its output's gradient."""
        module, inputs = self.modules[name], self._inputs[name]
        if isinstance(module, nn.Conv2d):
            patches = functional.unfold(inputs, module.kernel_size, stride=module.stride)
            return delta.flatten(2).transpose(1, 2), patches.transpose(1, 2)
        if inputs.ndim == 2:
            return delta.unsqueeze(1), inputs.unsqueeze(1)
        return delta.flatten(1, -2), inputs.flatten(1, -2)

    def _record(self, name: str, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name in self.outputs:
            raise NotImplementedError(f"the layer {name} is used twice in a forward pass")
        leaf = not output.requires_grad
        output = output.detach().requires_grad_() if leaf else output
        self._inputs[name], self.outputs[name] = arguments[0].detach(), output
        return output.clone() if leaf else output  # timm adds biases in place, which a leaf does not allow

    def _affine(self, name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        between = [1] * (output.ndim - 2)
        for own_name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if (copy := self.copies.get(f"{name}.{own_name}")) is not None:
                output = combine(output, copy.view(len(copy), *between, copy.shape[1]))
        return output


def _is_plain_norm(module: nn.Module, own_name: str, bias_is_scored: bool) -> bool:
    """Return whether this is a LayerNorm over the last axis whose parameter can be applied after it.

    A bias that is not scored stays inside the layer, so a scored weight cannot come after it.
    """
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    return own_name == "bias" or bias_is_scored or module.bias is None


def _add_products(total: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """Add Σ_b (δ_bᵀ x_b)² for δ [B, tokens, out] and x [B, tokens, in] to `total` [out, in] or [out, in, h, w]."""
    flat = total.view(len(total), -1)
    together = max(1, PRODUCT_BYTES[total.device.type] // (4 * flat.numel()))
    if together > 1:
        for left, right in zip(delta.split(together), inputs.split(together), strict=True):
            flat.add_(torch.bmm(left.transpose(1, 2), right).square_().sum(0))
        return
    product = torch.empty_like(flat)
    for left, right in zip(delta, inputs, strict=True):
        torch.mm(left.T, right, out=product)
        flat.addcmul_(product, product)


def _by_vmap(
    model: nn.Module, weights: Mapping[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor, score: str
) -> dict[str, Tensor]:
    """Return the gradient of each example, [B, ...], for parameters that the forward pass uses in any way."""
    if not names:
        return {}

    def of_one(scored: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**weights, **scored}, (image.unsqueeze(0),))
        return label_scores(logits, label.unsqueeze(0), score)[0]

    with plain_attention(model), torch.no_grad():
        gradients: dict[str, Tensor] = vmap(grad(of_one), in_dims=(None, 0, 0))(
            {name: weights[name] for name in names}, inputs, labels
        )
    return gradients


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Use unfused attention in timm's blocks: the fused kernel has no batching rule for vmap."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """Return values [B, ...] times scale [B]."""
    return values if scale is None else values * scale.view(-1, *[1] * (values.ndim - 1))
