"""A real round of federated averaging against the same number of steps in a bare loop without any federation."""

import copy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.bench.report import Bench, alternate, median
from fl_taskarith.client.app import app
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.batches import batch_positions, draw_augmentations
from fl_taskarith.engine.records import metric, to_record
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import frozen_name, write_frozen
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.training.local import autocast, set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.machine import available_threads
from fl_taskarith.workspace.make_mask import make_mask, server_sums
from fl_taskarith.workspace.workspace import Resident, resident

CLIENTS, LOCAL_STEPS = 10, 4
LEARNING_RATE = 1e-4


def bench_round(
    model_name: str = "vit_small_patch14_dinov2",
    input_size: int = 98,
    batch_size: int = 32,
    density: float = 0.0,
    precision: str = "fp32",
    repeats: int = 3,
    device_name: str = "auto",
) -> Bench:
    """Seconds of 10 clients x 4 steps through strategy, engine and client, and of 40 steps of torch's SGD, in turn.

    Both train the backbone under a frozen random head, on synthetic images that lie on the device, with the same
    preprocessing. With `density` above 0 the federated round trains that share of the weights, chosen at random, and
    the bare loop still all of them.
    """
    config = round_config(model_name, input_size, batch_size, precision, device_name, density=density)
    home = resident(config)
    head = {name: torch.randn_like(home.pretrained[name]) * 0.05 for name in HEAD_PARAMETERS}
    mask = make_mask(home, server_sums(home, head)).mask if density else None
    with scratch_folder() as folder:
        federated = Federated(config, home, Frozen(head, mask), folder)
        bare = Bare(config, home, head)
        measured = alternate({"federated": federated, "bare": bare}, repeats, home.device)
    seconds = {name: median(values) for name, values in measured.items()}
    outside = median(federated.outside[1:])
    ratio = seconds["federated"] / seconds["bare"]
    images = CLIENTS * LOCAL_STEPS * batch_size
    lines = [
        f"{model_name} at {input_size} px, {CLIENTS} clients x {LOCAL_STEPS} steps of {batch_size} images, "
        f"{precision}, {'dense' if mask is None else f'{mask.updated:,} weights updated'}, median of {repeats} on "
        f"{home.device.type} with {torch.get_num_threads()} threads",
        f"federated  {seconds['federated']:8.3f} s   {images / seconds['federated']:8.1f} images/s, "
        f"{outside:.3f} s of it outside the clients",
        f"bare loop  {seconds['bare']:8.3f} s   {images / seconds['bare']:8.1f} images/s",
    ]
    figures = {
        "model": model_name,
        "input_size": input_size,
        "clients": CLIENTS,
        "local_steps": LOCAL_STEPS,
        "batch_size": batch_size,
        "density": density or 1.0,
        "precision": precision,
        "repeats": repeats,
        "seconds": measured,
        "seconds_per_round": seconds,
        "seconds_outside_clients": outside,
    }
    return Bench("round", ratio, figures, tuple(lines))


def round_config(
    model_name: str,
    input_size: int,
    batch_size: int,
    precision: str,
    device_name: str,
    *,
    density: float = 0.0,
    compile_mode: str = "off",
) -> Config:
    """A round of `CLIENTS` x `LOCAL_STEPS` over synthetic images: of all weights, or of a random share `density`."""
    return load(
        overrides={
            "dataset": "synthetic",
            "model": model_name,
            "weights": "none",
            "input_size": input_size,
            "num_clients": CLIENTS,
            "participation": 1.0,
            "sharding": "iid",
            "local_steps": LOCAL_STEPS,
            "batch_size": batch_size,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "precision": precision,
            "compile": compile_mode,
            "device": device_name,
            "threads": available_threads(),
            **({"mask_rule": "random", "density": density} if density else {"mask_rule": "none"}),
        }
    )


class Federated:
    """Called: a round from the starting weights, as in a run; `outside` has its seconds beyond the clients'."""

    def __init__(self, config: Config, home: Resident, frozen: Frozen, folder: Path) -> None:
        self.config, self.home = config, home
        trained = {name: home.pretrained[name] for name in home.trained_names(1)}
        self.start = trained if frozen.mask is None else frozen.mask.gather(trained)
        self.folder, self.name = folder, frozen_name(frozen.tensors())
        write_frozen(folder, self.name, frozen.tensors())
        self.outside: list[float] = []

    def __call__(self) -> None:
        """One round."""
        strategy = FedAvg(self.config, self.home.device)
        context = RoundContext(LEARNING_RATE, str(self.folder), self.name)
        grid = SequentialGrid(app, CLIENTS)
        result = strategy.start(grid, to_record(self.start), 1, context_of=lambda server_round: context)
        metrics = result.train_metrics_clientapp[1]
        self.outside.append(metric(metrics, "round-seconds") - metric(metrics, "train-seconds"))


class Bare:
    """Called: as many steps as a round has, on a model of its own, one optimizer throughout."""

    def __init__(self, config: Config, home: Resident, head: dict[str, Tensor]) -> None:
        self.config, self.home = config, home
        home.load(head)
        self.model = copy.deepcopy(home.model)
        self.parameters = set_trained(self.model, home.trained_names(1))
        self.network: nn.Module = self.model
        if config.compile != "off":
            self.network = cast(nn.Module, torch.compile(self.model, mode=config.compile, dynamic=False))
        generator = random_generator(0, "bench round")
        everything = batch_positions(len(home.data.train), config.batch_size, CLIENTS * LOCAL_STEPS, generator)
        self.batches = torch.from_numpy(everything).to(home.device)
        padding = home.preprocessing.crop_padding
        self.augmentations = draw_augmentations(len(everything), config.batch_size, padding, generator, home.device)

    def __call__(self) -> None:
        """As many steps as a round has."""
        images, labels = self.home.data.train.images, self.home.data.train.labels
        device, precision = self.home.device, self.config.precision
        fused = True if device.type == "cpu" else None  # as a client's
        optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE, momentum=self.config.momentum, fused=fused)
        loss_sum = torch.zeros((), device=device)
        self.model.train()
        for batch, augmentation in zip(self.batches, self.augmentations, strict=True):
            inputs = self.home.preprocessing.training_inputs(images[batch], augmentation)
            with autocast(device, precision):
                loss = functional.cross_entropy(self.network(inputs), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
        loss_sum.item()
