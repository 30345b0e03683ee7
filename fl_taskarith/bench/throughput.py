"""Images per second of training and evaluation in a federated round, against a bare loop and the device's peak."""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fl_taskarith.bench import harness
from fl_taskarith.bench.harness import CLIENTS, LOCAL_STEPS, STEPS, Result, measure, medians, round_settings, seconds_of
from fl_taskarith.bench.round import Bare, federation_of_clients
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import AUTOCAST_TYPES, autocast, evaluate, set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.workspace import Workspace, workspace

PEAK_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product counts as the device's peak
PEAK_PRODUCTS = 10
EVALUATION_BATCHES = 8


def bench_throughput(options: Namespace) -> Result:
    """Alternate training and evaluation in a federation with a bare loop compiled the same way; measure the peak.

    Floating-point operations are those of the whole model's matrix products, forward once for evaluation, forward and
    backward for training, as torch counts them; shares of the peak are of a large product in the same precision.
    """
    home, precision = workspace(round_settings(options)), options.precision
    head, operations = harness.random_head(home), operations_per_image(home)
    peak = peak_product(home.device, precision, PEAK_SIDE[home.device.type])
    batch = home.evaluation_batch
    evaluated = evaluated_images(home, EVALUATION_BATCHES)
    with scratch_folder() as folder:
        federated, bare = federation_of_clients(home, Frozen(head), folder), Bare(home, head)
        works: dict[str, Callable[[], object]] = {
            "training, federated": federated,
            "training, bare loop": bare,
            "evaluation, ours": lambda: evaluate(
                home.compiled_network, evaluated, home.preprocessing, batch_size=batch, precision=precision
            ),
            "evaluation, bare loop": lambda: bare_evaluation(bare.network, home, evaluated, precision),
        }
        first = {name: seconds_of(work, home.device) for name, work in works.items()}
        measured = measure(works, options.repeats, home.device)
    images = {"training": STEPS * options.batch_size, "evaluation": len(evaluated)}
    part_of = {name: name.split(",")[0] for name in works}
    speed = {name: images[part_of[name]] / seconds for name, seconds in medians(measured).items()}
    shares = {name: speed[name] * operations[part_of[name]] / peak for name in works}
    lines = [
        f"evaluation in batches of {batch}; peak of a matrix product {peak / 1e12:.2f} TFLOP/s",
        *(
            f"{name:<22} {speed[name]:9.1f} images/s  {100 * shares[name]:5.1f} % of the peak  "
            f"(first call {first[name]:.1f} s)"
            for name in works
        ),
        f"evaluation against its bare loop: {speed['evaluation, ours'] / speed['evaluation, bare loop']:.2f}",
    ]
    figures = {
        **{"clients": CLIENTS, "local_steps": LOCAL_STEPS, "evaluation_batch": batch, "peak_flop_per_second": peak},
        **{"flop_per_image": operations, "seconds": measured, "first_call_seconds": first},
        **{"images_per_second": speed, "share_of_peak": shares},
    }
    return Result(speed["training, federated"] / speed["training, bare loop"], figures, lines)


def evaluated_images(home: Workspace, batches: int) -> ImageSet:
    """Return test images [n, 3, height, width] in so many full batches of evaluation, some of them several times."""
    return home.data.test.take(torch.arange(home.evaluation_batch * batches) % len(home.data.test))


def bare_evaluation(network: nn.Module, home: Workspace, examples: ImageSet, precision: str) -> float:
    """Return the accuracy on [n, channels, height, width] images, from a loop of its own."""
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=home.device)
    with torch.inference_mode():
        for start in range(0, len(examples), home.evaluation_batch):
            chosen = slice(start, start + home.evaluation_batch)
            inputs = home.preprocessing.evaluation_inputs(examples.images[chosen])
            with autocast(home.device, precision):
                logits = network(inputs)
            correct += (logits.argmax(1) == examples.labels[chosen]).sum()
    return correct.item() / len(examples)


def operations_per_image(home: Workspace) -> dict[str, float]:
    """Count the operations of one image's matrix products, a multiplication and an addition as two."""
    set_trained(home.model, home.trained_names(1))
    inputs = torch.zeros(1, 3, home.config.input_size, home.config.input_size, device=home.device)
    counts = {}
    for name in ("evaluation", "training"):
        with FlopCounterMode(display=False) as counter:
            loss = functional.cross_entropy(home.model(inputs), torch.zeros(1, dtype=torch.int64, device=home.device))
            if name == "training":
                loss.backward()
        counts[name] = float(counter.get_total_flops())
    return counts


def peak_product(device: torch.device, precision: str, side: int) -> float:
    """Return the floating-point operations per second of products of [side, side] matrices, the best of three runs."""
    left, right = (torch.randn(side, side, device=device, dtype=AUTOCAST_TYPES[precision]) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PEAK_PRODUCTS):
            torch.mm(left, right, out=product)

    multiply()
    return 2 * side**3 * PEAK_PRODUCTS / min(seconds_of(multiply, device) for _ in range(3))
