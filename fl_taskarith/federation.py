"""A federated run from its configuration to its results folder: head, rounds, evaluation, log."""

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fl_taskarith.client import features_of
from fl_taskarith.config import AUTO, Config
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.records import metric, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.sequential import ClientCallable, SequentialGrid
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.errors import ClientFailure
from fl_taskarith.logbook import COLUMNS, Logbook, Row, describe_device
from fl_taskarith.models.backbone import HEAD_PARAMETERS
from fl_taskarith.models.heads import RIDGE_GRID, RidgeSolver, RidgeStatistics, choose_ridge_lambda, fit_logit_scale
from fl_taskarith.optim import scheduled_learning_rate
from fl_taskarith.resident import EVALUATION_BATCH, Resident, available_threads, resident
from fl_taskarith.strategies import STRATEGIES
from fl_taskarith.training import Evaluation, evaluate

if TYPE_CHECKING:
    import pandas

log = logging.getLogger("fl_taskarith")

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


def run_federation(
    config: Config, client_app: ClientCallable, grid: Grid | None = None, progress: Progress | None = None
) -> History:
    """Run or continue the federation that `config` describes, and draw its curves.

    Args:
        client_app: the Flower ClientApp; called in this process by the sequential engine.
        grid: Flower's own Grid, needed by engine = "flower" only.
        progress: called with (round, last round, row) after each round.

    Raises:
        FlTaskarithError: with the cause, in the user's terms; the results so far stay in the folder.
    """
    show_log()
    # Every process of the run, Ray's actors among them, computes with the same number of threads, stated here.
    shared = dataclasses.replace(config, threads=config.threads or available_threads())
    home = resident(shared)
    sizes = [len(shard) for shard in home.shards]
    with Logbook(config) as logbook:
        log.info("Results: %s", logbook.folder)
        logbook.note(
            device=describe_device(home.device),
            threads=shared.threads,
            parameters=_count_parameters(home),
            shards={"clients": len(sizes), "smallest": min(sizes), "largest": max(sizes)},
            data={split: len(getattr(home.data, split)) for split in ("train", "validation", "calibration", "test")},
        )
        partitions = _choose_engine(shared, client_app, grid)
        _Run(shared, home, partitions, logbook, progress).run()
    _draw_curves(logbook.folder)
    log.info("Finished: %s", logbook.rounds_csv)
    return History(logbook.folder, logbook.rows)


class _Run:
    """The steps of one run over what they share."""

    def __init__(
        self, config: Config, home: Resident, grid: PartitionGrid, logbook: Logbook, progress: Progress | None
    ) -> None:
        self.config = config
        self.home = home
        self.grid = grid
        self.logbook = logbook
        self.progress = progress
        self.strategy = STRATEGIES[config.strategy](config, home.device)

    def run(self) -> None:
        restored = self.logbook.restored
        if restored is None:
            weights, done = self._round_zero(), 0
        else:
            weights = {name: tensor.to(self.home.device) for name, tensor in restored.weights.items()}
            done = restored.round
            self.strategy.load_state({name: t.to(self.home.device) for name, t in restored.strategy_state.items()})
        self.strategy.start(
            self.grid, to_record(weights), self.config.num_rounds, first_round=done + 1, after_round=self._after_round
        )

    def _round_zero(self) -> dict[str, torch.Tensor]:
        """Solve the head, evaluate it on the frozen backbone, and log both as round 0."""
        self.home.load(self.home.pretrained)
        weights = dict(self.home.pretrained)
        row: Row = {"round": 0, "clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
        started = time.perf_counter()
        if self.config.head == "ridge":
            weights |= self._ridge_head(row)
        row["overhead_seconds"] = time.perf_counter() - started - row["train_seconds"]
        self._evaluate(weights, row)
        self._finish_round(row)
        self.logbook.save_checkpoint(0, weights, self.strategy.state())
        return weights

    def _ridge_head(self, row: Row) -> dict[str, torch.Tensor]:
        """The head's weight and bias from the sum of all clients' statistics; λ and scale by validation if "auto"."""
        settings = RecordDict({"config": settings_record(self.config, 0)})
        questions = [Message(settings, partition, "query.ridge") for partition in self.grid.get_node_ids()]
        total: RidgeStatistics | None = None
        for reply in self.grid.exchange(questions):
            arrays = reply.content.array_records["arrays"]
            statistics = RidgeStatistics(**to_tensors(arrays, self.home.device))
            total = statistics if total is None else total + statistics
            row["clients"] += 1
            row["uplink_bytes"] += payload_bytes(arrays)
            row["train_seconds"] += metric(reply.content.metric_records["metrics"], "train-seconds")
        if total is None:
            raise ClientFailure("No client sent statistics for the ridge head.")
        solver = RidgeSolver(total)

        self.home.load(self.home.pretrained)
        validation = self.home.data.validation
        features = features_of(self.home, validation)
        ridge_lambda = self.config.ridge_lambda
        if ridge_lambda == AUTO:
            ridge_lambda = choose_ridge_lambda(solver, features, validation.labels)
            if ridge_lambda in (RIDGE_GRID[0], RIDGE_GRID[-1]):
                log.warning("ridge-lambda = %g lies at the edge of the searched grid: it is not tuned.", ridge_lambda)
        head = solver.solve(float(ridge_lambda))
        logit_scale = self.config.logit_scale
        if logit_scale == AUTO:
            logit_scale = fit_logit_scale(head.scores(features), validation.labels)
        scaled = head.scaled(float(logit_scale))
        self.logbook.note(head={"kind": "ridge", "ridge_lambda": ridge_lambda, "logit_scale": logit_scale})
        return dict(zip(HEAD_PARAMETERS, (scaled.weight.float(), scaled.bias.float()), strict=True))

    def _after_round(self, server_round: int, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        config = self.config
        row: Row = {
            "round": server_round,
            "learning_rate": scheduled_learning_rate(
                config.schedule, config.learning_rate, server_round, config.num_rounds, config.warmup_rounds
            ),
            "train_loss": metrics["train-loss"],
            "clients": metrics["clients"],
            "uplink_bytes": metrics["uplink-bytes"],
            "downlink_bytes": metrics["downlink-bytes"],
            "train_seconds": metrics["train-seconds"],
            "overhead_seconds": metric(metrics, "round-seconds") - metric(metrics, "train-seconds"),
        }
        weights = to_tensors(arrays, self.home.device)
        last = server_round == config.num_rounds
        if last or server_round % config.evaluate_every == 0:
            self._evaluate(weights, row)
        self._finish_round(row)
        if last or server_round % config.checkpoint_every == 0:
            self.logbook.save_checkpoint(server_round, weights, self.strategy.state())

    def _evaluate(self, weights: dict[str, torch.Tensor], row: Row) -> None:
        """Validation and test loss and accuracy of the global model, into `row`."""
        started = time.perf_counter()
        self.home.load(weights)
        for split, examples in (("val", self.home.data.validation), ("test", self.home.data.test)):
            measured: Evaluation = evaluate(
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

    def _finish_round(self, row: Row) -> None:
        self.logbook.write_round(row)
        if self.progress is not None:
            self.progress(row["round"], self.config.num_rounds, row)
        else:
            log.info("%s", describe_round(row, self.config.num_rounds))


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


def show_log() -> None:
    """Send our log to standard output, where `flwr run --stream` and notebooks show it; once per process."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _choose_engine(config: Config, client_app: ClientCallable, grid: Grid | None) -> PartitionGrid:
    if config.engine == "sequential":
        return SequentialGrid(client_app, config.num_clients)
    if grid is None:
        raise ValueError('engine = "flower" needs the Grid of a Flower run')
    return SuperNodeGrid(grid, config)


def _count_parameters(home: Resident) -> dict[str, int]:
    trained = home.trained_names(home.config.num_rounds)
    return {
        "total": sum(parameter.numel() for parameter in home.parameters.values()),
        "trained": sum(home.parameters[name].numel() for name in trained),
    }


def _draw_curves(folder: Path) -> None:
    from fl_taskarith.study.plots import plot_curves

    plot_curves([folder], folder / "curves")
