"""A round of federated averaging against the same number of steps in a bare loop without any federation."""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.bench import harness
from fl_taskarith.client.app import app
from fl_taskarith.client.cohort import train_together
from fl_taskarith.config.settings import Config
from fl_taskarith.data.batches import Augmentation, batch_positions, draw_augmentations
from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.records import metric, to_record
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.sequential import SequentialGrid
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import frozen_name, write_frozen
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.training.local import autocast, set_trained
from fl_taskarith.workspace.global_model import Frozen
from fl_taskarith.workspace.machine import choose_device
from fl_taskarith.workspace.make_mask import make_mask, server_sums
from fl_taskarith.workspace.workspace import Workspace, workspace

Place = tuple[str, str]  # folder and name of a file of the clients


def bench_round(options: Namespace) -> harness.Result:
    """Alternate 10 clients x 4 steps through strategy, engine and client with 40 steps of torch's SGD.

    Both train the backbone under a frozen random head, on synthetic images that lie on the device, with the same
    preprocessing. With `density` above 0 the federated round trains that share of the weights, chosen at random, and
    the bare loop still all of them.
    """
    masked = {"mask_rule": "random", "density": options.density} if options.density else {}
    home = workspace(harness.round_settings(options, **masked))
    head = harness.random_head(home)
    mask = make_mask(home, server_sums(home, head)).mask if masked else None
    with scratch_folder() as folder:
        federated, bare = federation_of_clients(home, Frozen(head, mask), folder), Bare(home, head)
        measured = harness.measure({"federated": federated, "bare": bare}, options.repeats, home.device)
    seconds, outside = harness.medians(measured), median(federated.outside[1:])
    lines = [
        *harness.time_lines(seconds, harness.STEPS * options.batch_size),
        f"weights updated: {'all' if mask is None else f'{mask.updated:,}'}; outside the clients: {outside:.3f} s",
    ]
    figures = {
        **{"clients": harness.CLIENTS, "local_steps": harness.LOCAL_STEPS, "density": options.density or 1.0},
        **{"seconds": measured, "seconds_per_round": seconds, "seconds_outside_clients": outside},
    }
    return harness.Result(seconds["federated"] / seconds["bare"], figures, lines)


class Federation:
    """The first rounds of a federation on `grid`, from the same weights at every call.

    `arrays` is what the last call ended on, `outside` lists the seconds of each one's first round beyond the clients'.
    """

    def __init__(
        self,
        grid: PartitionGrid,
        config: Config,
        weights: Mapping[str, Tensor],
        rounds: int = 1,
        frozen: tuple[str, str] = ("", ""),
    ) -> None:
        """Start from `weights`, tensors of any shape; `frozen` is the file of what is fixed in a round."""
        self.grid, self.config, self.weights, self.rounds, self.frozen = grid, config, weights, rounds, frozen
        self.arrays = ArrayRecord()
        self.outside: list[float] = []

    def __call__(self) -> None:
        """Run the rounds."""
        strategy = FedAvg(self.config, choose_device(self.config.device))
        context = RoundContext(self.config.peak_rate, *self.frozen)
        result = strategy.start(self.grid, to_record(self.weights), self.rounds, context_of=lambda _: context)
        self.arrays, metrics = result.arrays, result.train_metrics_clientapp[1]
        self.outside.append(metric(metrics, "round-seconds") - metric(metrics, "train-seconds"))


def federation_of_clients(
    home: Workspace, frozen: Frozen, folder: Path, clients: int = harness.CLIENTS, at_once: int = 1
) -> Federation:
    """Return a round of all our clients from the starting weights, as in a run, its files in `folder`.

    So many are trained `at_once`, where they can be. The tensors of `frozen` have the shapes of the model's.
    """
    trained = {name: home.pretrained[name] for name in home.trained_names(1)}
    start = trained if frozen.mask is None else frozen.mask.gather(trained)
    name = frozen_name(frozen.tensors())
    write_frozen(folder, name, frozen.tensors())
    grid = SequentialGrid(app, clients, train_together if at_once > 1 else None, at_once)
    return Federation(grid, home.config, start, 1, (str(folder), name))


class Bare:
    """As many steps as a round has, on a model of its own, with one optimizer throughout."""

    def __init__(
        self, home: Workspace, head: dict[str, Tensor], steps: int = harness.STEPS, compile_mode: str | None = None
    ) -> None:
        """Copy the model with a head of weight [classes, features] and bias [classes], and draw all batches.

        The network is compiled under torch.compile's `compile_mode`, by default under that of the settings.
        """
        self.home, mode = home, home.config.compile if compile_mode is None else compile_mode
        home.load(head)
        self.model = copy.deepcopy(home.model)
        self.parameters = set_trained(self.model, home.trained_names(1))
        self.network: nn.Module = self.model
        if mode != "off":
            self.network = cast(nn.Module, torch.compile(self.model, mode=mode, dynamic=False))
        self.draw(steps, random_generator(0, "bench round"))

    def draw(self, steps: int, generator: np.random.Generator) -> None:
        """Draw the batches of all steps, as a client draws them."""
        home, batch = self.home, self.home.config.batch_size
        self.batches = torch.from_numpy(batch_positions(len(home.data.train), batch, steps, generator)).to(home.device)
        self.augmentations = draw_augmentations(steps, batch, home.preprocessing.crop_padding, generator, home.device)

    def __call__(self) -> None:
        """Take the steps."""
        harness.take_steps(self.losses(), self.optimizer(harness.LEARNING_RATE)).item()

    def optimizer(self, rate: float) -> torch.optim.SGD:
        """Return torch's own, with the kernels that a client uses."""
        fused = True if self.home.device.type == "cpu" else None
        return torch.optim.SGD(self.parameters, rate, self.home.config.momentum, fused=fused)

    def losses(self) -> Iterator[Callable[[], Tensor]]:
        """Return what computes the loss, a scalar, of each step."""
        self.model.train()
        images, labels = self.home.data.train.images, self.home.data.train.labels

        def loss(batch: Tensor, augmentation: Augmentation) -> Tensor:
            inputs = self.home.preprocessing.training_inputs(images[batch], augmentation)
            with autocast(self.home.device, self.home.config.precision):
                return functional.cross_entropy(self.network(inputs), labels[batch])

        return (partial(loss, *each) for each in zip(self.batches, self.augmentations, strict=True))
