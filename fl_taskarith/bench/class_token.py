"""A training step whose last block computes the class token alone, against the same step with timm's own block."""

from argparse import Namespace
from collections.abc import Callable
from typing import cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.bench.harness import CLASSES, Result, measure, medians, require_equal, take_steps, time_lines
from fl_taskarith.models.class_token_block import compute_class_token_only
from fl_taskarith.models.suffix import Suffix, prefix_tokens
from fl_taskarith.models.vit_glyph import vit_glyph  # noqa: F401 (so that timm knows it)
from fl_taskarith.workspace.machine import available_threads, choose_device

STEPS = 4  # timed together
RATE = 1e-3


def bench_class_token(options: Namespace) -> Result:
    """Alternate forward, backward and a plain SGD step of the last blocks, and of all, with both kinds of last block.

    Raises:
        RuntimeError: both kinds do not give the same losses.
    """
    torch.set_num_threads(available_threads())
    works = {
        f"{f'last {blocks} blocks' if blocks else 'all blocks'}, {kind}": _steps(options, blocks, kind == "class token")
        for blocks in (options.trainable_blocks, 0)
        for kind in ("every token", "class token")
    }
    last_whole, last_token, all_whole, all_token = works
    losses = {name: work() for name, work in works.items()}
    measured = measure(works, options.repeats, choose_device(options.device))
    per_step = medians(measured, STEPS)
    require_equal(losses, last_whole, last_token, 1e-4)
    require_equal(losses, all_whole, all_token, 1e-4)
    lines = time_lines(per_step, options.batch_size, dict.fromkeys(works, "per step"))
    lines.append(f"all blocks: {per_step[all_whole] / per_step[all_token]:.2f}")
    figures = {"seconds_per_step": per_step, "seconds": measured, "loss": losses}
    return Result(per_step[last_whole] / per_step[last_token], figures, lines)


def _steps(options: Namespace, trained: int, cut: bool) -> Callable[[], float]:
    """Return `STEPS` steps on one batch, which give the last loss; `trained` blocks alone take tokens made before."""
    torch.manual_seed(0)
    device, size = choose_device(options.device), options.input_size
    created = timm.create_model(options.model, num_classes=CLASSES, img_size=size)
    model = cast(VisionTransformer, created.to(device))
    images = torch.randn(options.batch_size, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (options.batch_size,), device=device)
    if cut:
        compute_class_token_only(model)
    first = len(model.blocks) - trained if trained else 0
    network: nn.Module = Suffix(model, first) if trained else model
    inputs: Tensor = prefix_tokens(model, images, first) if trained else images
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    network.train()
    losses = [lambda: functional.cross_entropy(network(inputs), labels)] * STEPS
    return lambda: take_steps(losses, optimizer).item()
