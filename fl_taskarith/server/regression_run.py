"""A run on regression data: K parameter vectors in place of an image model, and distances to the truth."""

import math
import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor

from fl_taskarith.client.regression_client import CPU
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.records import metric, to_record, to_tensors
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.mixtures.matching import (
    cluster_accuracy,
    largest_matched_distance,
    mean_matched_distance,
    mean_nearest_distance,
)
from fl_taskarith.server.interruption import finishing_rounds
from fl_taskarith.server.run import Progress, overhead, record_round
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.storage.tensor_file import write_sealed
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.training.schedules import learning_rate
from fl_taskarith.workspace.regression_data import adversary_of, mixture_of


class MixtureRun:
    """Rounds of a strategy over clients with regression data."""

    def __init__(
        self,
        config: Config,
        logbook: Logbook,
        progress: Progress | None,
        grid: PartitionGrid,
        strategy: Callable[[Config, torch.device], FedAvg],
    ) -> None:
        self.config = config
        self.logbook = logbook
        self.progress = progress
        self.deadline: float | None = None  # of time.time; from then on the run ends after its round, saved
        self.grid = grid
        self.mixture = mixture_of(config)
        self.strategy = strategy(config, CPU)
        self.theta = self.mixture.start(config.start, config.start_radius)

    def context(self, server_round: int) -> RoundContext:
        """Return what the strategy needs to know for a round."""
        rate = learning_rate(self.config, server_round, [])
        return RoundContext(rate, shard_size=lambda _: self.config.examples_per_client)

    def execute(self) -> None:
        """Start, or go on from the last checkpoint; run the rounds that are left; export the final θ."""
        first_round = 1
        if (restored := self.logbook.restored) is None:
            self._finish({"round": 0, "clients": 0, "uplink_bytes": 0, "downlink_bytes": 0})
        else:
            self.theta = restored.trained["theta"]
            self.strategy.load_state(restored.strategy_state)
            first_round = restored.round + 1
        with finishing_rounds():
            self.strategy.start(
                self.grid,
                to_record({"theta": self.theta}),
                self.config.num_rounds,
                context_of=self.context,
                first_round=first_round,
                after_round=self._after_round,
            )
        self.logbook.note(rounds=self.logbook.rows[-1]["round"], converged=self.strategy.converged)
        if self.config.save_model:
            tensors = {"theta": self.theta, "truth": self.mixture.truth}
            write_sealed(self.logbook.output("model.safetensors"), tensors, self.logbook.owner)

    def _after_round(self, server_round: int, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        started = time.perf_counter()
        self.theta = to_tensors(arrays, CPU)["theta"]
        norm = metric(metrics, "client-update-norm")
        row: Row = {
            "round": server_round,
            "learning_rate": metrics["learning-rate"] if self.config.strategy != "fed-em" else None,
            "train_loss": metrics["train-loss"],
            "client_update_norm": None if math.isnan(norm) else norm,
            "update_norm": metrics["update-norm"],
            "clients": metrics["clients"],
            "failed_clients": self.strategy.failures.take(),
            "uplink_bytes": metrics["uplink-bytes"],
            "downlink_bytes": metrics["downlink-bytes"],
            "cluster_accuracy": self._accuracy(metrics),
            "train_seconds": metrics["train-seconds"],
            "overhead_seconds": overhead(metric(metrics, "round-seconds"), metric(metrics, "train-seconds")),
        }
        self._finish(row, started)

    def _finish(self, row: Row, started: float | None = None) -> None:
        """Complete `row` by distances to the truth, write it to the log, and save a checkpoint where one is due."""
        truth = self.mixture.truth
        row["largest_distance"] = largest_matched_distance(self.theta, truth)
        row["matched_distance"] = mean_matched_distance(self.theta, truth)
        row["nearest_distance"] = mean_nearest_distance(self.theta, truth)
        row["evaluate_seconds"] = 0.0 if started is None else time.perf_counter() - started
        trained = {"theta": self.theta}
        record_round(
            self.logbook, self.config, row, self.progress,
            lambda: Checkpoint(row["round"], trained, {}, self.strategy.state()),
            last=row["round"] == self.config.num_rounds or self.strategy.converged, deadline=self.deadline,
        )  # fmt: skip

    def _accuracy(self, metrics: MetricRecord) -> float:
        """Return the share of this round's honest clients that are in their cluster."""
        partitions, clusters = (torch.tensor(metrics[name]) for name in ("partitions", "clusters"))
        honest = ~adversary_of(self.config).byzantine[partitions]
        true = self.mixture.assignment[partitions]
        return cluster_accuracy(clusters[honest], true[honest], self.config.num_clusters)


def describe_mixture(config: Config) -> dict[str, dict[str, int | float] | str]:
    """Return facts about a run for run.json: sizes of clusters, least separation, and the number of attackers."""
    mixture, byzantine = mixture_of(config), adversary_of(config).byzantine
    sizes: Tensor = mixture.assignment.bincount(minlength=config.num_clusters)
    return {
        "device": "cpu",
        "mixture": {
            "smallest_cluster": int(sizes.min()),
            "largest_cluster": int(sizes.max()),
            "least_separation": mixture.least_separation,
            "byzantine_clients": int(byzantine.sum()),
        },
    }
