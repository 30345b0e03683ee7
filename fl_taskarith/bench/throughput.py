"""Images per second of training and evaluation inside a federated round, against a bare compiled loop and the device's
fastest matrix product.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fl_taskarith.bench.report import Bench, alternate, median, seconds_of
from fl_taskarith.bench.round import CLIENTS, LOCAL_STEPS, Bare, Federated, round_config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import AUTOCAST_TYPES, autocast, evaluate, set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.machine import available_threads
from fl_taskarith.workspace.workspace import Resident, resident

PEAK_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product counts as the device's peak
PEAK_PRODUCTS = 10
EVALUATION_BATCHES = 8


def bench_throughput(
    model_name: str = "vit_small_patch16_224.dino",
    input_size: int = 224,
    batch_size: int = 64,
    precision: str = "bf16",
    compile_mode: str = "default",
    repeats: int = 5,
    device_name: str = "auto",
) -> Bench:
    """Training and evaluation, each in a federation and in a bare loop compiled the same way, in turn; and the peak.

    Floating-point operations are those of the whole model's matrix products, forward once for evaluation, forward and
    backward for training, as torch counts them; shares of the peak are of a large product in the same precision.
    """
    config = round_config(model_name, input_size, batch_size, precision, device_name, compile_mode=compile_mode)
    home = resident(config)
    head = {name: torch.randn_like(home.pretrained[name]) * 0.05 for name in HEAD_PARAMETERS}
    operations = _operations_per_image(home)
    peak = _peak(home.device, precision)
    evaluated = home.data.test.take(torch.arange(home.evaluation_batch * EVALUATION_BATCHES) % len(home.data.test))
    with scratch_folder() as folder:
        federated, bare = Federated(config, home, Frozen(head), folder), Bare(config, home, head)
        works: dict[str, Callable[[], object]] = {
            "training, federated": federated,
            "training, bare loop": bare,
            "evaluation, ours": lambda: evaluate(
                home.compiled_network,
                evaluated,
                home.preprocessing,
                batch_size=home.evaluation_batch,
                precision=precision,
            ),
            "evaluation, bare loop": lambda: _bare_evaluation(bare.network, home, evaluated, precision),
        }
        first = {name: seconds_of(work, home.device) for name, work in works.items()}
        measured = alternate(works, repeats, home.device)
    images = dict.fromkeys(works, len(evaluated)) | dict.fromkeys(list(works)[:2], CLIENTS * LOCAL_STEPS * batch_size)
    speed = {name: images[name] / median(seconds) for name, seconds in measured.items()}
    shares = {name: speed[name] * operations[name.split(",")[0]] / peak for name in works}
    training = speed["training, federated"] / speed["training, bare loop"]
    lines = [
        f"{model_name} at {input_size} px, {CLIENTS} clients x {LOCAL_STEPS} steps of {batch_size} images, evaluation "
        f"in batches of {home.evaluation_batch}, {precision}, compile = {compile_mode}, median of {repeats} on "
        f"{home.device.type} with {available_threads()} threads; peak of a matrix product {peak / 1e12:.2f} TFLOP/s",
        *(
            f"{name:<22} {speed[name]:9.1f} images/s  {100 * shares[name]:5.1f} % of the peak  "
            f"(first call {first[name]:.1f} s)"
            for name in works
        ),
        f"evaluation against its bare loop: {speed['evaluation, ours'] / speed['evaluation, bare loop']:.2f}",
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "clients": CLIENTS,
        "local_steps": LOCAL_STEPS,
        "batch_size": batch_size,
        "evaluation_batch": home.evaluation_batch,
        "precision": precision,
        "compile": compile_mode,
        "repeats": repeats,
        "peak_flop_per_second": peak,
        "flop_per_image": operations,
        "seconds": measured,
        "first_call_seconds": first,
        "images_per_second": speed,
        "share_of_peak": shares,
    }
    return Bench("throughput", training, figures, tuple(lines))


def _bare_evaluation(network: nn.Module, home: Resident, examples: ImageSet, precision: str) -> float:
    """Accuracy in a loop of its own."""
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


def _operations_per_image(home: Resident) -> dict[str, float]:
    """Floating-point operations of one image's matrix products, a multiplication and an addition counted as two."""
    set_trained(home.model, home.trained_names(1))
    inputs = torch.zeros(1, 3, home.config.input_size, home.config.input_size, device=home.device)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = functional.cross_entropy(home.model(inputs), torch.zeros(1, dtype=torch.int64, device=home.device))
            if backward:
                loss.backward()
        counts.append(float(counter.get_total_flops()))
    return {"evaluation": counts[0], "training": counts[1]}


def _peak(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of products of large square matrices, the best of three runs."""
    side = PEAK_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=AUTOCAST_TYPES[precision]) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PEAK_PRODUCTS):
            torch.mm(left, right, out=product)

    multiply()
    return 2 * side**3 * PEAK_PRODUCTS / min(seconds_of(multiply, device) for _ in range(3))
