"""One round of mask calibration: our per-example gradients against one backward pass per example."""

from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.bench.harness import CLASSES, Result, measure, medians, peak_bytes, random_model, time_lines
from fl_taskarith.bench.run_process import in_new_process
from fl_taskarith.masking.sensitivity import sensitivity_sums
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.workspace.machine import available_threads, choose_device

MEMORY = 2.0  # GiB, the setting's default
LARGEST_ERROR = 1e-4  # of the summed scores between the two, relative, over all weights


def bench_fisher(options: Namespace) -> Result:
    """Measure time per example and extra memory of both, on random weights and images, with log-prob scores.

    The loop is what one writes first: a forward pass, `backward()`, and the squared gradients of all parameters added
    up, for one example after the other. Memory is the growth of a fresh process's peak while it scores.

    Raises:
        RuntimeError: the two do not compute the same.
    """
    torch.set_num_threads(available_threads())
    scorer = Scorer(options)
    ours, theirs = scorer.ours(), scorer.loop()
    error = sum(float((ours[name] - theirs[name]).abs().sum()) for name in ours)
    error /= sum(float(value.abs().sum()) for value in theirs.values())
    if not error < LARGEST_ERROR:
        raise RuntimeError(f"the two sums differ by a share of {error:.2e}, expected below {LARGEST_ERROR:g}")
    measured = measure({"ours": scorer.ours, "loop": scorer.loop}, options.repeats, scorer.device)
    per_example = medians(measured, options.examples)
    memory = {name: in_new_process(extra_memory, name, options) for name in measured}
    notes = {name: f"per example, {extra / 2**30:5.2f} GiB extra memory" for name, extra in memory.items()}
    figures = {"seconds": measured, "seconds_per_example": per_example, "extra_memory_bytes": memory,
               "relative_error": error}  # fmt: skip
    lines = [*time_lines(per_example, 0, notes), f"the sums agree to a share of {error:.1e}"]
    return Result(per_example["loop"] / per_example["ours"], figures, lines)


class Scorer:
    """Random weights and images, and the two ways to score the weights."""

    def __init__(self, options: Namespace) -> None:
        self.device, size, examples = choose_device(options.device), options.input_size, options.examples
        self.model = random_model(options.model, size, self.device).eval()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (examples, 3, size, size), generator=generator, dtype=torch.uint8)
        self.images = images.to(self.device)
        self.targets = torch.randint(0, CLASSES, (examples,), generator=generator).to(self.device)
        self.weights = {
            name: parameter.detach() for name, parameter in self.model.named_parameters() if name not in HEAD_PARAMETERS
        }

    def ours(self) -> dict[str, Tensor]:
        """Return the summed squared gradients of every weight, in its shape, by the package."""
        return sensitivity_sums(
            self.model, self.weights, self.images, self.targets, _inputs_of, labels="true", score="log-prob",
            generator=np.random.default_rng(0), memory=MEMORY,
        )  # fmt: skip

    def loop(self) -> dict[str, Tensor]:
        """Return the summed squared gradients of every weight, in its shape, by one backward pass per example."""
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


def extra_memory(name: str, options: Namespace) -> int:
    """Return the bytes by which scoring the way `name` raises the peak of this process."""
    torch.set_num_threads(available_threads())
    scorer = Scorer(options)
    before = peak_bytes(scorer.device)
    getattr(scorer, name)()
    return peak_bytes(scorer.device) - before
