"""The most memory that rounds of few and of many clients take, against model, gradients, momentum and activations."""

from argparse import Namespace

import torch
from torch import Tensor
from torch.nn import functional

from fl_taskarith.bench import harness
from fl_taskarith.bench.run_process import Start, in_new_process, start, train_round
from fl_taskarith.config.settings import Config
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import autocast, set_trained
from fl_taskarith.workspace.machine import choose_device

LOCAL_STEPS = 2  # momentum exists from the first, and so every tensor there will be from the second
BARE = 0  # clients of the loop without a federation


def bench_memory(options: Namespace) -> harness.Result:
    """Measure the peak of two rounds for each number of sampled clients, and of SGDM steps without a federation.

    Each in a process of its own, on synthetic images, beyond what the process holds once torch is imported (on a GPU:
    what torch has allocated). The loop's is model + gradients + momentum + activations, and what kernels need.
    """
    with scratch_folder() as folder:
        configs = {count: harness.round_settings(options, num_clients=max(1, count), local_steps=LOCAL_STEPS,
                                         results_dir=str(folder / str(count)))
                   for count in (BARE, *options.clients)}  # fmt: skip
        peaks = {count: in_new_process(_peak, config, count == BARE) for count, config in configs.items()}
    bare = peaks.pop(BARE)
    lines = [f"{'bare loop':<22} {bare / 2**20:7.0f} MiB"]
    lines += [f"{count:>3} clients in a round  {peak / 2**20:7.0f} MiB  {peak / bare:.2f} times"
              for count, peak in peaks.items()]  # fmt: skip
    return harness.Result(max(peaks.values()) / bare, {"peak_bytes_bare": bare, "peak_bytes_by_clients": peaks}, lines)


def _peak(config: Config, bare: bool) -> int:
    """Return the peak of this process beyond what it holds now, in bytes; on a GPU the peak of torch."""
    device = choose_device(config.device)
    before = harness.resident_bytes() if device.type == "cpu" else 0
    if bare:
        _bare_loop(config, device)
    else:
        start(Start(config))
        for _ in range(2):
            train_round()
    return harness.peak_bytes(device) - before


def _bare_loop(config: Config, device: torch.device) -> None:
    """Take steps on one random batch with torch's own optimizer; nothing of ours but the model's construction."""
    torch.set_num_threads(config.threads)
    model = harness.random_model(config.model, config.input_size, device)
    names = [name for name, _ in model.named_parameters() if name not in HEAD_PARAMETERS]
    fused = True if device.type == "cpu" else None  # as a client does
    optimizer = torch.optim.SGD(set_trained(model, names), config.peak_rate, config.momentum, fused=fused)
    inputs = torch.randn(config.batch_size, 3, config.input_size, config.input_size, device=device)
    labels = torch.arange(config.batch_size, device=device) % harness.CLASSES

    def loss() -> Tensor:
        with autocast(device, config.precision):
            return functional.cross_entropy(model(inputs), labels)

    harness.take_steps([loss] * 2 * LOCAL_STEPS, optimizer)
