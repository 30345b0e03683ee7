"""The centralized baseline: the same data, model, steps and evaluation, without clients. One round is one epoch."""

import math
import time

import torch

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import Divergence
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.seeding import random_generator
from fl_taskarith.server.run import Progress, Run, scheduled_rate, solved_logit_scale
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.training.local import set_trained, train_locally
from fl_taskarith.training.sparse_sgdm import SparseSGDM, sgdm
from fl_taskarith.workspace.global_model import Weights
from fl_taskarith.workspace.workspace import Workspace


class CentralizedRun(Run):
    """SGDM over the whole training set; its momentum is carried from epoch to epoch, and saved in checkpoints."""

    def __init__(self, config: Config, home: Workspace, logbook: Logbook, progress: Progress | None) -> None:
        super().__init__(config, home, logbook, progress)
        self._momentum: Weights = {}

    def ridge_statistics(self, row: Row) -> RidgeStatistics:
        """Return the statistics of the pooled training set."""
        started = time.perf_counter()
        self.home.place(self.model)
        examples = self.home.data.train
        features = self.home.features(examples)
        row["train_seconds"] += time.perf_counter() - started
        return RidgeStatistics.of(features, examples.labels, len(self.home.data.dataset.classes))

    def train_rounds(self, first_round: int, last_round: int) -> None:
        """Train epochs `first_round`..`last_round` of ⌈n / batch-size⌉ steps each."""
        config, home = self.config, self.home
        for epoch in range(first_round, last_round + 1):
            started = time.perf_counter()
            home.place(self.model)
            names, mask = list(self.model.trained), self.model.frozen.mask
            parameters = set_trained(home.model, names)
            rate = scheduled_rate(config, self.logbook, epoch)
            optimizer = sgdm(zip(names, parameters, strict=True), config, rate, mask)
            self._restore_momentum(optimizer, names)
            train_loss = train_locally(
                home.compiled_network,
                home.data.train,
                torch.arange(len(home.data.train), device=home.device),
                optimizer,
                home.preprocessing,
                local_steps=math.ceil(len(home.data.train) / config.batch_size),
                batch_size=config.batch_size,
                precision=config.precision,
                generator=random_generator(config.seed, "centralized training", epoch),
                loss=home.local_loss(solved_logit_scale(self.logbook)),
            )
            if not math.isfinite(train_loss):
                raise Divergence(f"Epoch {epoch}: the training loss is {train_loss}. Lower learning-rate.")
            self._keep_momentum(optimizer, names)
            if mask is None:
                trained = {name: parameter.detach().clone() for name, parameter in zip(names, parameters, strict=True)}
            else:
                trained = mask.gather({name: parameter.detach() for name, parameter in home.parameters.items()})
            update = {name: value - self.model.trained[name] for name, value in trained.items()}
            row: Row = {
                "round": epoch,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "train_loss": train_loss,
                "update_norm": task_vector_norm(update),
                "clients": 0,
                "uplink_bytes": 0,
                "downlink_bytes": 0,
                "train_seconds": time.perf_counter() - started,
                "overhead_seconds": 0.0,
            }
            if self.finish_round(row, trained):
                break

    def distribute(self, row: Row) -> None:
        """Send nothing, for there are no clients."""

    def state(self) -> Checkpoint:
        """Return a checkpoint with the momentum buffers, by parameter name and in the parameters' shapes."""
        return Checkpoint(0, {}, {}, self._momentum)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the momentum buffers back, in the parameters' shapes."""
        self._momentum = dict(checkpoint.strategy_state)

    def _restore_momentum(self, optimizer: SparseSGDM, names: list[str]) -> None:
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            if name in self._momentum:
                optimizer.state[parameter]["momentum_buffer"] = self._momentum[name]

    def _keep_momentum(self, optimizer: SparseSGDM, names: list[str]) -> None:
        buffers = (
            optimizer.state[parameter].get("momentum_buffer") for parameter in optimizer.param_groups[0]["params"]
        )
        self._momentum = {name: buffer for name, buffer in zip(names, buffers, strict=True) if buffer is not None}
