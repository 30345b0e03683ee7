"""One round of mask calibration: our per-example gradients against one backward pass per example."""

import multiprocessing
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.bench.report import Bench, alternate, median, peak_bytes
from fl_taskarith.masking.sensitivity import sensitivity_sums
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model
from fl_taskarith.workspace.machine import available_threads, choose_device

CLASSES = 100
MEMORY = 2.0  # GiB, the setting's default
LARGEST_ERROR = 1e-4  # of the summed scores between the two, relative, over all weights


def bench_fisher(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    examples: int = 128,
    repeats: int = 3,
    device_name: str = "auto",
) -> Bench:
    """Time per example and extra memory of both, on random weights and images, with true labels and log-prob scores.

    The loop is what one writes first: a forward pass, `backward()`, and the squared gradients of all parameters added
    up, for one example after the other. Memory is the growth of a fresh process's peak while it scores.

    Raises:
        RuntimeError: the two do not compute the same.
    """
    device = choose_device(device_name)
    torch.set_num_threads(available_threads())
    task = _Task(model_name, input_size, examples, device)
    ours, theirs = task.ours(), task.loop()
    error = sum(float((ours[name] - theirs[name]).abs().sum()) for name in ours)
    error /= sum(float(value.abs().sum()) for value in theirs.values())
    if not error < LARGEST_ERROR:
        raise RuntimeError(f"the two sums differ by a share of {error:.2e}, expected below {LARGEST_ERROR:g}")

    measured = alternate({"ours": task.ours, "loop": task.loop}, repeats, device)
    per_example = {name: median(seconds) / examples for name, seconds in measured.items()}
    memory = {name: _extra_memory(name, (model_name, input_size, examples, device)) for name in measured}
    ratio = per_example["loop"] / per_example["ours"]
    lines = [
        f"{model_name} at {input_size} px, {examples} examples, median of {repeats} on {device.type} with "
        f"{torch.get_num_threads()} threads; the sums agree to a share of {error:.1e}",
        *(
            f"{name:<5} {1000 * per_example[name]:7.1f} ms per example   {memory[name] / 2**30:5.2f} GiB extra memory"
            for name in measured
        ),
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "examples": examples,
        "repeats": repeats,
        "seconds": measured,
        "seconds_per_example": per_example,
        "extra_memory_bytes": memory,
        "relative_error": error,
    }
    return Bench("fisher", ratio, figures, tuple(lines))


class _Task:
    """Random weights and images, and the two ways to score them."""

    def __init__(self, model_name: str, input_size: int, examples: int, device: torch.device) -> None:
        model = build_model(model_name, CLASSES, input_size, weights="none", download=False, seed=0)
        torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05)
        self.model = model.to(device).eval()
        generator = torch.Generator().manual_seed(0)
        shape = (examples, 3, input_size, input_size)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        self.targets = torch.randint(0, CLASSES, (examples,), generator=generator).to(device)
        self.weights = {
            name: parameter.detach() for name, parameter in self.model.named_parameters() if name not in HEAD_PARAMETERS
        }

    def ours(self) -> dict[str, Tensor]:
        return sensitivity_sums(
            self.model,
            self.weights,
            self.images,
            self.targets,
            _inputs_of,
            labels="true",
            score="log-prob",
            generator=np.random.default_rng(0),
            memory=MEMORY,
        )

    def loop(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        for image, target in zip(self.images, self.targets, strict=True):
            self.model.zero_grad()
            self.model(_inputs_of(image.unsqueeze(0))).log_softmax(1)[0, target].backward()
            for name, total in sums.items():
                gradient = self.model.get_parameter(name).grad
                assert gradient is not None
                total += gradient**2
        self.model.zero_grad()
        return sums


def _inputs_of(images: Tensor) -> Tensor:
    return images.float() / 128 - 1


def _extra_memory(name: str, task: tuple[str, int, int, torch.device]) -> int:
    """Bytes by which the peak of a new process grows while it scores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grow, (name, task))


def _grow(name: str, arguments: tuple[str, int, int, torch.device]) -> int:
    torch.set_num_threads(available_threads())
    task = _Task(*arguments)
    works: dict[str, Callable[[], object]] = {"ours": task.ours, "loop": task.loop}
    before = peak_bytes(arguments[3])
    works[name]()
    return peak_bytes(arguments[3]) - before
