"""Local steps, evaluation and features of one model. Pure PyTorch: it knows neither Flower nor a strategy."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.data.batches import Preprocessing, batch_positions, draw_augmentations
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.data.prefix_cache import CachedInputs
from fl_taskarith.errors import Divergence
from fl_taskarith.models.compilation import Network
from fl_taskarith.seeding import torch_seed
from fl_taskarith.storage.correctness import packed
from fl_taskarith.storage.progress import tracked
from fl_taskarith.training.local_loss import LocalLoss
from fl_taskarith.training.sparse_sgdm import SparseSGDM

Inputs = Preprocessing | CachedInputs
"""Makes the network's inputs from what an `ImageSet` holds: images, or positions in a prefix cache."""

AUTOCAST_TYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NEVER = 2**31 - 1  # steps
LOSS_SCALE = 2.0**10  # of fp16 gradients: far from their smallest values, and from overflow for losses of a few nats

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats, and accuracy in [0, 1], over `examples` images.

    `correct` says of each image, in order, whether it was classified right: see `storage.correctness`. It is empty
    where that is not known.
    """

    loss: float
    accuracy: float
    examples: int
    correct: str = ""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed-precision context of `precision` ("fp32", "tf32", "bf16", "fp16") on `device`."""
    dtype = AUTOCAST_TYPES[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def set_matrix_products(precision: str) -> None:
    """Let a GPU multiply float32 matrices in TF32 (10 bits of mantissa) under "tf32", and under no other precision.

    This holds for the whole process. By default torch uses TF32 in convolutions, such as a ViT's patch embedding, but
    not in matrix products. A GPU before Ampere, or a CPU without units for it, computes in float32 either way.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def train_locally(
    model: Network,
    examples: ImageSet,
    shard: Tensor,
    optimizer: torch.optim.Optimizer,
    preprocessing: Inputs,
    *,
    local_steps: int,
    batch_size: int,
    precision: str,
    generator: np.random.Generator,
    loss: LocalLoss = LocalLoss(),  # noqa: B008  (frozen)
) -> float:
    """Take J steps of `optimizer` on `loss` over random batches of one shard; return the mean loss of the steps.

    The host waits for the device once, at the end; under fp16 once per step, to see whether gradients are finite. There
    the loss is multiplied by `LOSS_SCALE`, halved whenever they are not; such a step is skipped and reported.

    Args:
        model: holds the global weights; parameters that require a gradient are trained in place.
        examples: the training set, images uint8 [N, C, H, W] or positions in a prefix cache int64 [N].
        shard: positions of the client's own examples in it, int64 [n].
        generator: the only source of randomness; its seed also seeds torch, for models with dropout.

    Raises:
        Divergence: under fp16, no step had finite gradients.
    """
    device = examples.images.device
    _seed_torch(torch_seed(generator), device)
    positions = torch.from_numpy(batch_positions(len(shard), batch_size, local_steps, generator)).to(shard.device)
    steps, batch = positions.shape
    augmentations = draw_augmentations(steps, batch, preprocessing.crop_padding, generator, device)
    scaler = torch.amp.GradScaler(
        device.type, init_scale=LOSS_SCALE, growth_interval=NEVER, enabled=precision == "fp16"
    )
    batches = list(zip(shard[positions], augmentations, strict=True))

    def inputs() -> Iterator[Tensor]:
        return (preprocessing.training_inputs(examples.images[chosen], drawn) for chosen, drawn in batches)

    network, loss_sum = loss.network(model), torch.zeros((), device=device)
    with autocast(device, precision):
        references: Sequence[Tensor | None] = loss.references(network, inputs()) or [None] * steps
    network.train()
    for (chosen, _), batch_inputs, reference in zip(batches, inputs(), references, strict=True):
        with autocast(device, precision):
            value = loss(network(batch_inputs), examples.labels[chosen], reference)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        if scaler.is_enabled() and isinstance(optimizer, SparseSGDM):
            optimizer.zero_masked_gradients()
        scaler.step(optimizer)
        scaler.update()
        loss_sum += value.detach()
    if scaler.is_enabled():
        report_skipped(scaler.get_scale(), steps)
    return loss_sum.item() / local_steps


def _seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch on this device alone: for absent devices it takes milliseconds, much of a small model's step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def report_skipped(scale: float, steps: int) -> None:
    """Warn of fp16 steps that were left out: each halved the loss scale, which ended at `scale`.

    Raises:
        Divergence: all of the steps were.
    """
    skipped = round(math.log2(LOSS_SCALE / scale)) if scale else steps
    if skipped == steps:
        raise Divergence(
            f"None of {steps} steps had finite gradients in fp16: lower learning-rate, or use precision bf16 or fp32."
        )
    if skipped:
        log.warning("%d of %d steps were left out: their gradients overflowed fp16.", skipped, steps)


@torch.inference_mode()
def evaluate(
    model: Network, examples: ImageSet, preprocessing: Inputs, *, batch_size: int, precision: str
) -> Evaluation:
    """Return loss and accuracy of `model` on `examples`, images [n, C, H, W] or positions [n]; NaN without any."""
    if not len(examples):
        return Evaluation(math.nan, math.nan, 0)
    device = examples.images.device
    loss = torch.zeros((), device=device, dtype=torch.float64)
    correct: list[Tensor] = []
    model.eval()
    for images, labels in tracked(_batches(examples, batch_size), -(-len(examples) // batch_size), "Evaluation"):
        with autocast(device, precision):
            logits = model(preprocessing.evaluation_inputs(images)).float()
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        correct.append(logits.argmax(1) == labels)
    right = torch.cat(correct).cpu().numpy()
    return Evaluation(loss.item() / len(examples), int(right.sum()) / len(examples), len(examples), packed(right))


@torch.inference_mode()
def extract_features(
    model: Network, examples: ImageSet, preprocessing: Inputs, *, batch_size: int, precision: str
) -> Tensor:
    """Return the inputs of the head (timm's pre-logits: the normalised class token): float32 [n, width]."""
    model.eval()
    parts = [torch.empty(0, model.num_features, device=examples.images.device)]
    for images, _ in tracked(_batches(examples, batch_size), -(-len(examples) // batch_size), "Features"):
        with autocast(examples.images.device, precision):
            tokens = model.forward_features(preprocessing.evaluation_inputs(images))
            parts.append(model.forward_head(tokens, pre_logits=True).float())
    return torch.cat(parts)


@torch.inference_mode()
def input_square_sums(
    model: nn.Module, names: Sequence[str], network: Network, examples: ImageSet, preprocessing: Inputs, batch_size: int
) -> dict[str, Tensor]:
    """Return Σ x_j² over the tokens of `examples`, [in], of the inputs x to each linear layer with a weight in `names`.

    The sum is over the tokens that the layer is computed for: behind the last block's attention the class token alone.

    Args:
        network: runs on the inputs; its linear layers are modules of `model`, by which they are named.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].flatten(0, -2).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    hooks = [
        module.register_forward_pre_hook(partial(add, f"{name}.weight"))
        for name, module in model.named_modules()
        if f"{name}.weight" in names
    ]
    try:
        model.eval()
        for images, _ in _batches(examples, batch_size):
            network(preprocessing.evaluation_inputs(images))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[name].float() for name in names}


def set_trained(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Let exactly the named parameters require a gradient, and return them in the order of `names`.

    So a frozen prefix costs no backward pass: autograd stops at the first trained layer.
    """
    parameters = dict(model.named_parameters())
    wanted = set(names)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
    return [parameters[name] for name in names]


def _batches(examples: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(examples), batch_size):
        yield examples.images[start : start + batch_size], examples.labels[start : start + batch_size]
