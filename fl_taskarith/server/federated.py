"""The federated form of a run: rounds of a strategy over the clients of an engine."""

import logging
import math
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.records import metric, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.replies import check_examples, check_finite, number, tensors_of, told
from fl_taskarith.masking.mask import Mask
from fl_taskarith.mixtures.matching import cluster_accuracy
from fl_taskarith.models.backbone import linear_shapes
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.server.personal_accuracy import evaluate_clients
from fl_taskarith.server.run import Progress, Run, overhead, scheduled_rate, solved_logit_scale
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.client_files import frozen_name
from fl_taskarith.storage.progress import tracked
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.strategies import strategy_class
from fl_taskarith.workspace.clusters import clustered
from fl_taskarith.workspace.global_model import Frozen, Weights
from fl_taskarith.workspace.make_mask import Sums
from fl_taskarith.workspace.views import VIEWS, byzantine_clients, group_of
from fl_taskarith.workspace.workspace import Resident

log = logging.getLogger("fl_taskarith")


class FederatedRun(Run):
    """Rounds of a strategy over the clients of an engine."""

    def __init__(
        self, config: Config, home: Resident, logbook: Logbook, progress: Progress | None, grid: PartitionGrid
    ) -> None:
        super().__init__(config, home, logbook, progress)
        self.grid = grid
        self.strategy = strategy_class(config.strategy)(config, home.device, partial(scheduled_rate, config, logbook))
        self.strategy.state_folder = str(logbook.client_states)
        # No callback of the strategy's refers to this run: in a cycle, it and its `home` would outlive it in memory.
        self.strategy.logit_scale = partial(solved_logit_scale, logbook)
        self.strategy.shard_size = lambda partition: len(home.shards[partition])

    def execute(self) -> None:
        """All rounds; then, where clients have models of their own, their accuracy: clients.csv, means in run.json."""
        super().execute()
        self.logbook.note(server_state_bytes=sum(value.nbytes for value in self.strategy.state().values()))
        arrays = to_record(self.model.trained)
        messages = self.strategy.configure_evaluate(self.config.num_rounds, arrays, ConfigRecord(), self.grid)
        if means := evaluate_clients(self.grid, messages, self.logbook.folder / "clients.csv", self.strategy.failures):
            log.info(
                "Mean over clients on their own classes: test accuracy %(own_test_accuracy).4f of their own models, "
                "%(global_test_accuracy).4f of the global one.",
                means,
            )
            self.logbook.note(clients=means)
        if failed := self.strategy.failures.take():
            self.logbook.note(failed_evaluations=failed)

    def ridge_statistics(self, row: Row) -> RidgeStatistics:
        """The sum of all clients' statistics, in partition order."""
        sent = to_record(self.model.trained)
        current = RoundSettings(row.get("round", 0), 0.0, self.strategy.state_folder, "", self.strategy.frozen_name)
        content = RecordDict({"config": settings_record(self.config, current), "arrays": sent})
        partitions = self.grid.get_node_ids()
        questions = (Message(content, partition, "query.ridge") for partition in partitions)
        row["downlink_bytes"] += len(partitions) * payload_bytes(sent)
        classes = self.home.data.dataset.classes
        shapes = RidgeStatistics.shapes(self.home.model.num_features, len(classes))
        asked = {name: (torch.float64, shape) for name, shape in shapes.items()}
        total: RidgeStatistics | None = None

        def read(reply: Message) -> RidgeStatistics:
            check_examples(reply, len(self.home.shards[reply.metadata.src_node_id]))
            statistics = tensors_of(reply, "arrays", self.home.device, asked)
            check_finite(reply, statistics)
            row["train_seconds"] += number(reply, "train-seconds")
            row["uplink_bytes"] += payload_bytes(reply.content.array_records["arrays"])
            return RidgeStatistics(**statistics)

        replies = self.strategy.failures.read(self.grid.exchange(questions), read)
        for statistics in tracked(replies, len(partitions), "Ridge head: sums of the clients"):
            total = statistics if total is None else total + statistics
            row["clients"] += row.get("round", 0) == 0
        if total is None:
            raise self.strategy.failures.of_all("The ridge head")
        self._warn_of_missing_classes(total)
        return total

    def client_sums(self, head: Weights, row: Row) -> Sums:
        """Return what asks all clients for their scores and adds them up in partition order (`make_mask.Sums`).

        Each calibration round sends them the head, [classes, features] and [classes], and the mask of what is left;
        scores have the shapes of the mask's tensors, in float32.
        """

        def sums(calibration_round: int, alive: Mask) -> tuple[Weights, int]:
            sent = to_record(Frozen(head, alive).tensors())
            content = RecordDict(
                {"config": settings_record(self.config, RoundSettings(calibration_round)), "arrays": sent}
            )
            partitions = self.grid.get_node_ids()
            row["downlink_bytes"] += len(partitions) * payload_bytes(sent)
            questions = (Message(content, partition, "query.sensitivity") for partition in partitions)
            total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in alive.tensors.items()}
            examples = 0
            asked = {name: (torch.float32, tuple(value.shape)) for name, value in alive.tensors.items()}

            def read(reply: Message) -> tuple[Weights, int]:
                shard = len(self.home.shards[reply.metadata.src_node_id])
                scored = min(shard, self.config.calibration_per_client or shard)
                check_examples(reply, scored)
                scores = tensors_of(reply, "arrays", self.home.device, asked)
                check_finite(reply, scores)
                row["train_seconds"] += number(reply, "train-seconds")
                row["uplink_bytes"] += payload_bytes(reply.content.array_records["arrays"])
                return scores, scored

            replies = self.strategy.failures.read(self.grid.exchange(questions), read)
            for scores, scored in tracked(replies, len(partitions), "Calibration: scores of the clients"):
                examples += scored
                for name, value in scores.items():
                    total[name] += value
            if not examples:
                raise self.strategy.failures.of_all(f"Calibration round {calibration_round}")
            return total, examples

        return sums

    def distribute(self, row: Row) -> None:
        """The frozen head and the mask to every client, once; later messages only name them."""
        tensors = self.model.frozen.tensors()
        self.strategy.frozen_name = frozen_name(tensors) if tensors else ""
        if not tensors:
            return
        arrays = to_record(tensors)
        settings = RoundSettings(0, state_folder=self.strategy.state_folder, frozen_name=self.strategy.frozen_name)
        content = RecordDict({"config": settings_record(self.config, settings), "arrays": arrays})
        partitions = self.grid.get_node_ids()
        sent = (Message(content, partition, "query.frozen") for partition in partitions)
        for _ in self.strategy.failures.read(self.grid.exchange(sent), told):
            pass  # a client that cannot keep them answers with an error
        for file in Path(self.strategy.state_folder).glob("frozen-*.safetensors"):
            if file.name != self.strategy.frozen_name:  # of before the head was solved anew
                file.unlink(missing_ok=True)
        row["downlink_bytes"] += len(partitions) * payload_bytes(arrays)

    def complete(self, row: Row) -> None:
        """How many clients failed at anything since the last row."""
        row["failed_clients"] = self.strategy.failures.take()

    def _warn_of_missing_classes(self, statistics: RidgeStatistics) -> None:
        """A class whose examples all lie with clients that failed is never predicted."""
        absent = (statistics.class_counts == 0).nonzero().flatten().tolist()
        if absent:
            named = ", ".join(str(self.home.data.dataset.classes[index]) for index in absent[:10])
            log.warning(
                "No client sent statistics of %d classes (%s): the ridge head cannot predict them.", len(absent), named
            )

    def train_rounds(self, first_round: int, last_round: int) -> None:
        """The strategy's own loop."""
        self.strategy.mask = self.model.frozen.mask
        self.strategy.linear_shapes = linear_shapes(self.home.model, self.model.trained)
        self.strategy.start(
            self.grid,
            to_record(self.model.trained),
            last_round,
            first_round=first_round,
            after_round=self._after_round,
        )

    def state(self) -> Checkpoint:
        """The strategy's tensors and the names of the clients' states."""
        return Checkpoint(0, {}, {}, self.strategy.state(), client_states=self.strategy.client_states)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Both back into the strategy."""
        self.strategy.load_state(checkpoint.strategy_state)
        self.strategy.client_states = dict(checkpoint.client_states)

    def _after_round(self, server_round: int, arrays: ArrayRecord, metrics: MetricRecord) -> None:
        row: Row = {
            "round": server_round,
            "learning_rate": metrics["learning-rate"],
            "train_loss": metrics["train-loss"],
            "client_update_norm": metrics["client-update-norm"],
            "client_cosine": metrics.get("client-cosine"),
            "update_norm": metrics["update-norm"],
            "clients": metrics["clients"],
            "uplink_bytes": metrics["uplink-bytes"],
            "downlink_bytes": metrics["downlink-bytes"],
            "train_seconds": metrics["train-seconds"],
            "overhead_seconds": overhead(metric(metrics, "round-seconds"), metric(metrics, "train-seconds")),
        }
        if clustered(self.config):
            row["cluster_accuracy"] = self._cluster_accuracy(metrics)
        self.finish_round(row, to_tensors(arrays, self.home.device))

    def _cluster_accuracy(self, metrics: MetricRecord) -> float:
        """Share of this round's honest clients that picked the cluster of their group; nan without any."""
        told = zip(metrics["partitions"], metrics["clusters"], strict=True)  # type: ignore[arg-type]
        honest = [(group_of(self.config, int(partition)), cluster) for partition, cluster in told
                  if not byzantine_clients(self.config)[int(partition)]]  # fmt: skip
        if not honest:
            return math.nan
        groups, clusters = (torch.tensor(each, dtype=torch.int64) for each in zip(*honest, strict=True))
        return cluster_accuracy(clusters, groups, max(self.config.num_clusters, len(VIEWS[self.config.client_groups])))
