"""What a federated and a centralized run share: round 0, evaluation, log, checkpoints, the exported model."""

import dataclasses
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fl_taskarith.checkpoint import Checkpoint
from fl_taskarith.config import AUTO, Config
from fl_taskarith.errors import ClientFailure
from fl_taskarith.logbook import COLUMNS, Logbook, Row
from fl_taskarith.models.backbone import HEAD_PARAMETERS, export_model
from fl_taskarith.models.heads import RIDGE_GRID, RidgeSolver, RidgeStatistics, choose_ridge_lambda, fit_logit_scale
from fl_taskarith.optim import learning_rate
from fl_taskarith.resident import EVALUATION_BATCH, Resident
from fl_taskarith.training import evaluate

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]
Progress = Callable[[int, int, Row], None]


@dataclass(frozen=True)
class History:
    """What a run left: its folder, and the rows of its rounds.csv."""

    folder: Path
    rows: list[Row]

    def frame(self) -> "pandas.DataFrame":
        """The rows as a pandas table."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(COLUMNS))


class Run(ABC):
    """One run over its resident data and model; `execute` does all of it, or what is left of it.

    A subclass says where the head's statistics come from and how the rounds are trained.
    """

    def __init__(self, config: Config, home: Resident, logbook: Logbook, progress: Progress | None) -> None:
        self.config = config
        self.home = home
        self.logbook = logbook
        self.progress = progress

    @abstractmethod
    def ridge_statistics(self, row: Row) -> RidgeStatistics:
        """Of all training examples under the pretrained backbone; adds clients, bytes and seconds to `row`."""

    @abstractmethod
    def train(self, weights: Weights, first_round: int) -> None:
        """Rounds `first_round`..num-rounds from `weights`; calls `finish_round` after each."""

    @abstractmethod
    def save_checkpoint(self, server_round: int, weights: Weights) -> None:
        """Save `weights` and whatever else the rounds keep."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take that back from a checkpoint, whose tensors are on the device."""

    def execute(self) -> None:
        """Round 0 or the last checkpoint, the rounds that are left, and the export of the final model."""
        restored = self.logbook.restored
        if restored is None:
            weights, first_round = self._round_zero(), 1
        else:
            restored = dataclasses.replace(
                restored,
                weights=self._on_device(restored.weights),
                strategy_state=self._on_device(restored.strategy_state),
            )
            weights, first_round = restored.weights, restored.round + 1
            self.restore(restored)
        self._final = weights
        self.train(weights, first_round)
        if self.config.save_model:
            self.home.load(self._final)
            export_model(
                self.home.model,
                self.logbook.folder / "model.safetensors",
                self.home.data.dataset.classes,
                {"dataset": self.config.dataset, "weights": self.config.weights, "round": str(self.config.num_rounds)},
            )

    def learning_rate(self, server_round: int) -> float:
        """Of `server_round`, from the schedule and the validation losses logged so far."""
        losses = [row.get("val_loss") for row in self.logbook.rows if row["round"] < server_round]
        return learning_rate(self.config, server_round, [loss for loss in losses[1:] if loss is not None])

    def finish_round(self, row: Row, weights: Weights) -> None:
        """Evaluate where due, write the row, and save a checkpoint where due."""
        server_round, config = row["round"], self.config
        last = server_round == config.num_rounds
        if last or server_round % config.evaluate_every == 0:
            self._evaluate(weights, row)
        self.logbook.write_round(row)
        if self.progress is not None:
            self.progress(server_round, config.num_rounds, row)
        else:
            log.info("%s", describe_round(row, config.num_rounds))
        if last or server_round % config.checkpoint_every == 0:
            self.save_checkpoint(server_round, weights)
        self._final = weights

    def _on_device(self, tensors: Weights) -> Weights:
        return {name: tensor.to(self.home.device) for name, tensor in tensors.items()}

    def _round_zero(self) -> Weights:
        """Solve the head on the frozen backbone and evaluate it."""
        started = time.perf_counter()
        row: Row = {"round": 0, "clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
        weights = dict(self.home.pretrained)
        if self.config.head == "ridge":
            weights |= self._solve_ridge_head(row)
        row["overhead_seconds"] = overhead(time.perf_counter() - started, row["train_seconds"])
        self.finish_round(row, weights)
        return weights

    def _solve_ridge_head(self, row: Row) -> Weights:
        """The head's weight and bias; λ and logit scale by validation where they are "auto"."""
        solver = RidgeSolver(self.ridge_statistics(row))
        self.home.load(self.home.pretrained)
        validation = self.home.data.validation
        features = self.home.features(validation)
        ridge_lambda, logit_scale = self.config.ridge_lambda, self.config.logit_scale
        if ridge_lambda == AUTO:
            ridge_lambda = choose_ridge_lambda(solver, features, validation.labels)
            if ridge_lambda in (RIDGE_GRID[0], RIDGE_GRID[-1]):
                log.warning("ridge-lambda = %g lies at the edge of the searched grid: it is not tuned.", ridge_lambda)
        head = solver.solve(float(ridge_lambda))
        if logit_scale == AUTO:
            logit_scale = fit_logit_scale(head.scores(features), validation.labels)
        scaled = head.scaled(float(logit_scale))
        self.logbook.note(head={"kind": "ridge", "ridge_lambda": ridge_lambda, "logit_scale": logit_scale})
        return dict(zip(HEAD_PARAMETERS, (scaled.weight.float(), scaled.bias.float()), strict=True))

    def _evaluate(self, weights: Weights, row: Row) -> None:
        """Validation and test loss and accuracy of `weights`, into `row`."""
        started = time.perf_counter()
        self.home.load(weights)
        for split, examples in (("val", self.home.data.validation), ("test", self.home.data.test)):
            measured = evaluate(
                self.home.model,
                examples,
                self.home.preprocessing,
                batch_size=EVALUATION_BATCH,
                precision=self.config.precision,
            )
            if not measured.examples:
                continue
            if not math.isfinite(measured.loss):
                raise ClientFailure(f"Round {row['round']}: the {split} loss is {measured.loss}. Lower learning-rate.")
            row[f"{split}_loss"], row[f"{split}_accuracy"] = measured.loss, measured.accuracy
        row["evaluate_seconds"] = time.perf_counter() - started


def overhead(wall_seconds: float, client_seconds: float) -> float:
    """Seconds of a round that no client worked; 0 where clients ran side by side for longer than the round."""
    return max(0.0, wall_seconds - client_seconds)


def describe_round(row: Row, num_rounds: int) -> str:
    """One line for the terminal."""
    words = [f"round {row['round']:>3}/{num_rounds}"]
    for column, name, form in (
        ("train_loss", "train loss", "{:.4f}"),
        ("val_accuracy", "val accuracy", "{:.4f}"),
        ("test_loss", "test loss", "{:.4f}"),
        ("test_accuracy", "test accuracy", "{:.4f}"),
    ):
        if row.get(column) is not None:
            words.append(f"{name} {form.format(row[column])}")
    seconds = sum(row.get(name) or 0.0 for name in ("train_seconds", "overhead_seconds", "evaluate_seconds"))
    return "  ".join([*words, f"{seconds:.1f} s"])
