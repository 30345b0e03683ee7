"""The most memory that rounds of few and of many clients take, against model, gradients, momentum and activations."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from fl_taskarith.bench.report import Bench, peak_bytes, resident_bytes
from fl_taskarith.bench.worker import ONLY_ROUNDS, start, train_round, workers
from fl_taskarith.config.settings import Config, load
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import autocast, set_trained
from fl_taskarith.workspace.machine import available_threads, choose_device

LOCAL_STEPS = 2  # momentum exists from the first, and so every tensor there will be from the second
CLASSES = 100
BARE = 0  # clients of the loop without a federation


def bench_memory(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    batch_size: int = 32,
    clients: Sequence[int] = (2, 10, 40),
    precision: str = "fp32",
    device_name: str = "auto",
) -> Bench:
    """Peak memory of two rounds for each number of sampled clients, and of SGDM steps in a loop without a federation.

    Each in a process of its own, on synthetic images, beyond what the process holds once torch is imported (on a GPU:
    what torch has allocated). The loop's is model + gradients + momentum + activations, and what kernels need.
    """
    peaks: dict[int, int] = {}
    with scratch_folder() as folder:
        for count in (BARE, *clients):
            config = _config(max(1, count), model_name, input_size, batch_size, precision, device_name, folder)
            with workers([count]) as processes:
                peaks[count] = processes[count].apply(_peak_of_rounds if count else _peak_of_loop, (config,))
    federated = {count: peak for count, peak in peaks.items() if count != BARE}
    ratio = max(federated.values()) / peaks[BARE]
    lines = [
        f"{model_name} at {input_size} px, batches of {batch_size}, {precision}, on {choose_device(device_name).type}",
        f"bare loop              {peaks[BARE] / 2**20:7.0f} MiB",
        *(
            f"{count:>3} clients in a round  {peak / 2**20:7.0f} MiB  {peak / peaks[BARE]:.2f} times"
            for count, peak in federated.items()
        ),
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "batch_size": batch_size,
        "precision": precision,
        "peak_bytes_bare": peaks[BARE],
        "peak_bytes_by_clients": federated,
    }
    return Bench("memory", ratio, figures, tuple(lines))


def _peak_of_rounds(config: Config) -> int:
    device, before = choose_device(config.device), resident_bytes()
    start(config)
    for number in (1, 2):
        train_round(number)
    return peak_bytes(device) - (before if device.type == "cpu" else 0)


def _peak_of_loop(config: Config) -> int:
    """Steps on one random batch with torch's own optimizer; nothing of ours but the model's construction."""
    device, before = choose_device(config.device), resident_bytes()
    torch.set_num_threads(config.threads)
    model = build_model(config.model, CLASSES, config.input_size, "none", download=False, seed=0).to(device)
    names = [name for name, _ in model.named_parameters() if name not in HEAD_PARAMETERS]
    fused = True if device.type == "cpu" else None  # as a client's
    trained = set_trained(model, names)
    optimizer = torch.optim.SGD(trained, lr=config.peak_rate, momentum=config.momentum, fused=fused)
    torch.nn.init.normal_(model.get_parameter(HEAD_PARAMETERS[0]), std=0.05)
    inputs = torch.randn(config.batch_size, 3, config.input_size, config.input_size, device=device)
    labels = torch.arange(config.batch_size, device=device) % CLASSES
    for _ in range(2 * LOCAL_STEPS):
        with autocast(device, config.precision):
            loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return peak_bytes(device) - (before if device.type == "cpu" else 0)


def _config(
    clients: int, model_name: str, input_size: int, batch_size: int, precision: str, device_name: str, folder: Path
) -> Config:
    return load(
        overrides={
            **ONLY_ROUNDS,
            "dataset": "synthetic",
            "model": model_name,
            "input_size": input_size,
            "num_clients": clients,
            "participation": 1.0,
            "sharding": "iid",
            "local_steps": LOCAL_STEPS,
            "batch_size": batch_size,
            "learning_rate": 1e-4,
            "precision": precision,
            "compile": "off",
            "device": device_name,
            "threads": available_threads(),
            "results_dir": str(folder / str(clients)),
        }
    )
