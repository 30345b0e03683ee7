"""A training step whose last block computes the class token alone, against the same step with timm's own block."""

from collections.abc import Callable
from typing import cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.bench.report import Bench, alternate, median
from fl_taskarith.models.class_token_block import compute_class_token_only
from fl_taskarith.models.suffix import Suffix, prefix_tokens
from fl_taskarith.models.vit_glyph import vit_glyph  # noqa: F401 (so that timm knows it)
from fl_taskarith.workspace.machine import available_threads, choose_device

CLASSES, STEPS = 100, 4  # steps are timed together
RATE = 1e-3


def bench_class_token(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    batch_size: int = 32,
    trainable_blocks: int = 2,
    repeats: int = 5,
    device_name: str = "auto",
) -> Bench:
    """Seconds of forward, backward and a plain SGD step of the last blocks, and of all of them, in turn.

    Raises:
        RuntimeError: both blocks do not give the same losses.
    """
    device = choose_device(device_name)
    torch.set_num_threads(available_threads())
    works: dict[str, Callable[[], float]] = {}
    for blocks in (trainable_blocks, 0):
        for cut in (False, True):
            name = f"{f'last {blocks} blocks' if blocks else 'all blocks'}, {'class token' if cut else 'every token'}"
            works[name] = _steps(model_name, input_size, batch_size, blocks, cut, device)
    losses = {name: work() for name, work in works.items()}
    measured = alternate(works, repeats, device)
    per_step = {name: median(seconds) / STEPS for name, seconds in measured.items()}
    names = list(works)
    for whole, cut_name in (names[:2], names[2:]):
        if abs(losses[whole] - losses[cut_name]) > 1e-4 * abs(losses[whole]):
            raise RuntimeError(f"losses with and without the other tokens differ: {losses}")
    lines = [
        f"{model_name} at {input_size} px, batches of {batch_size}, median of {repeats} turns of {STEPS} steps on "
        f"{device.type} with {available_threads()} threads",
        *(f"{name:<28} {1e3 * seconds:8.1f} ms per step  {batch_size / seconds:7.1f} images/s"
          for name, seconds in per_step.items()),
        f"all blocks: {per_step[names[2]] / per_step[names[3]]:.2f}",
    ]  # fmt: skip
    figures = {
        "model": model_name,
        "input_size": input_size,
        "batch_size": batch_size,
        "trainable_blocks": trainable_blocks,
        "repeats": repeats,
        "seconds_per_step": per_step,
        "seconds": measured,
        "loss": losses,
    }
    return Bench("class-token", per_step[names[0]] / per_step[names[1]], figures, tuple(lines))


def _steps(
    model_name: str, input_size: int, batch_size: int, trained: int, cut: bool, device: torch.device
) -> Callable[[], float]:
    """`STEPS` steps on one batch; the loss of the last. With `trained` blocks the others' tokens are made before."""
    torch.manual_seed(0)
    model = cast(VisionTransformer, timm.create_model(model_name, num_classes=CLASSES, img_size=input_size).to(device))
    images = torch.randn(batch_size, 3, input_size, input_size, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    if cut:
        compute_class_token_only(model)
    first = len(model.blocks) - trained if trained else 0
    network: nn.Module = Suffix(model, first) if trained else model
    inputs: Tensor = prefix_tokens(model, images, first) if trained else images
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    network.train()

    def steps() -> float:
        for _ in range(STEPS):
            loss = functional.cross_entropy(network(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.item()

    return steps
