"""The federated form of a run: rounds of a strategy over the clients of an engine."""

import logging
import math
from collections.abc import Iterator
from functools import partial

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.client_questions import Check, ask_all, check_squares
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.question import Question, layout_of
from fl_taskarith.engine.records import metric, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.errors import own_code
from fl_taskarith.masking.calibration import Sums
from fl_taskarith.masking.mask import Mask
from fl_taskarith.mixtures.matching import cluster_accuracy
from fl_taskarith.models.backbone import linear_shapes
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.server.personal_accuracy import evaluate_clients, own_accuracies
from fl_taskarith.server.run import Progress, Run, overhead, scheduled_rate, solved_logit_scale
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.client_files import frozen_name
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.storage.progress import tracked
from fl_taskarith.storage.run_folder import Logbook, Row
from fl_taskarith.strategies import strategy_class
from fl_taskarith.workspace.clusters import clustered
from fl_taskarith.workspace.global_model import Frozen, Weights
from fl_taskarith.workspace.views import VIEWS, byzantine_clients, group_of
from fl_taskarith.workspace.workspace import Workspace

log = logging.getLogger("fl_taskarith")


class FederatedRun(Run):
    """Rounds of a strategy over the clients of an engine."""

    def __init__(
        self, config: Config, home: Workspace, logbook: Logbook, progress: Progress | None, grid: PartitionGrid
    ) -> None:
        super().__init__(config, home, logbook, progress)
        home.client_states.forget()
        self.grid = grid
        with own_code("strategy", config.strategy):
            self.strategy = strategy_class(config.strategy)(config, home.device)
        self.frozen_name = ""  # the clients' file of the frozen tensors and the mask

    def context(self, server_round: int) -> RoundContext:
        """Return what the strategy needs to know for a round."""
        shards = self.home.shards  # no callback refers to this run: in a cycle, it and its `home` would outlive it
        return RoundContext(
            scheduled_rate(self.config, self.logbook, server_round),
            str(self.logbook.client_states),
            self.frozen_name,
            self.model.frozen.mask,
            linear_shapes(self.home.model, self.model.trained),
            solved_logit_scale(self.logbook),
            lambda partition: len(shards[partition]),
        )

    def execute(self) -> None:
        """All rounds; then, where clients have models of their own, their accuracy: clients.csv, means in run.json."""
        super().execute()
        self.logbook.note(server_state_bytes=sum(value.nbytes for value in self.strategy.state().values()))
        arrays = to_record(self.model.trained)
        last = self.logbook.rows[-1]["round"]
        self.strategy.context = self.context(last)
        messages = self.strategy.configure_evaluate(last, arrays, ConfigRecord(), self.grid)
        question = Question(last, self.grid.get_node_ids(), own_accuracies(self.home.data),
                            examples_of=self._shard_size)  # fmt: skip
        failures = self.strategy.failures
        if means := evaluate_clients(self.grid, messages, self.logbook.output("clients.csv"), failures, question):
            log.info(
                "Mean over clients on their own classes: test accuracy %(own_test_accuracy).4f of their own models, "
                "%(global_test_accuracy).4f of the global one.",
                means,
            )
            self.logbook.note(clients=means)
        if failed := self.strategy.failures.take():
            self.logbook.note(failed_evaluations=failed)
        self._write_layers()

    def _write_layers(self) -> None:
        """What the strategy measured of single tensors: a row per round and tensor in layers.csv, means in run.json."""
        measured = {kind: table for kind, table in self.strategy.measured().items() if table}
        if not measured:
            return
        names = [name for name in self.model.trained if name in next(iter(measured.values()))]
        rows = [
            {"round": self.logbook.rows[-1]["round"] - left, "tensor": name}
            | {kind: float(table[name][-1 - left]) for kind, table in measured.items()}
            for left in reversed(range(len(next(iter(measured.values()))[names[0]])))
            for name in names
        ]
        write_atomically(self.logbook.output("layers.csv"), csv_text(rows))
        means = {kind: {name: float(table[name].nanmean()) for name in names} for kind, table in measured.items()}
        self.logbook.note(layers={kind: {name: mean for name, mean in table.items() if math.isfinite(mean)}
                                  for kind, table in means.items()})  # fmt: skip

    def ridge_statistics(self, row: Row) -> RidgeStatistics:
        """Return the sum of all clients' statistics, in partition order."""
        current = RoundSettings(row.get("round", 0), 0.0, str(self.logbook.client_states), "", self.frozen_name)
        shapes = RidgeStatistics.shapes(self.home.model.num_features, len(self.home.data.dataset.classes))
        layout = {name: (torch.float64, shape) for name, shape in shapes.items()}
        total: RidgeStatistics | None = None
        question = Question(current.number, layouts={"arrays": layout}, examples_of=self._shard_size)

        def check(client: int, tensors: Weights) -> None:
            RidgeStatistics(**tensors).check(self._shard_size(client))

        replies = self._ask(current, self.model.trained, "query.ridge", question, check, row)
        for _, tensors in tracked(replies, self.config.num_clients, "Head: sums of the clients"):
            statistics = RidgeStatistics(**tensors)
            total = statistics if total is None else total + statistics
            row["clients"] += row.get("round", 0) == 0
        if total is None:
            raise self.strategy.failures.of_all("The head")
        self._warn_of_missing_classes(total)
        return total

    def client_sums(self, head: Weights, row: Row) -> Sums:
        """Return the scores of all clients, in their tensors' shapes, added up in partition order."""

        def sums(calibration_round: int, alive: Mask) -> tuple[Weights, int]:
            total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in alive.tensors.items()}
            sent, current, examples = Frozen(head, alive).tensors(), RoundSettings(calibration_round), 0
            question = Question(
                calibration_round, layouts={"arrays": layout_of(total)}, examples_of=self._scored_examples
            )

            def check(client: int, scores: Weights) -> None:
                check_squares(scores, self._scored_examples(client))

            replies = self._ask(current, sent, "query.sensitivity", question, check, row)
            for client, scores in tracked(replies, self.config.num_clients, "Calibration: scores of the clients"):
                examples += self._scored_examples(client)
                for name, value in scores.items():
                    total[name] += value
            if not examples:
                raise self.strategy.failures.of_all(f"Calibration round {calibration_round}")
            return total, examples

        return sums

    def _ask(
        self,
        current: RoundSettings,
        tensors: Weights,
        message_type: str,
        question: Question,
        check: Check,
        row: Row,
    ) -> Iterator[tuple[int, Weights]]:
        """Yield the answers of all clients to a question; add its bytes and the clients' seconds to `row`."""
        content = RecordDict({"config": settings_record(self.config, current), "arrays": to_record(tensors)})
        failures, traffic = self.strategy.failures, Traffic()
        yield from ask_all(self.grid, failures, content, message_type, question, self.home.device, traffic, check)
        row["downlink_bytes"] += traffic.downlink
        row["uplink_bytes"] += traffic.uplink
        row["train_seconds"] += traffic.seconds

    def _shard_size(self, partition: int) -> int:
        return len(self.home.shards[partition])

    def _scored_examples(self, partition: int) -> int:
        """The number of examples on which a client scores sensitivities."""
        shard = self._shard_size(partition)
        return min(shard, self.config.calibration_per_client or shard)

    def distribute(self, row: Row) -> None:
        """The frozen head and the mask to every client, once; later messages only name them."""
        tensors = self.model.frozen.tensors()
        self.frozen_name = frozen_name(tensors) if tensors else ""
        if not tensors:
            return
        arrays = to_record(tensors)
        settings = RoundSettings(0, state_folder=str(self.logbook.client_states), frozen_name=self.frozen_name)
        content = RecordDict({"config": settings_record(self.config, settings), "arrays": arrays})
        partitions = self.grid.get_node_ids()
        sent = (Message(content, partition, "query.frozen") for partition in partitions)
        question, failures = Question(0, partitions, numbers={}), self.strategy.failures
        read = partial(question.read, device=self.home.device, most_seconds=math.inf)
        for _ in failures.read(self.grid.exchange(sent), read):
            pass  # a client that cannot keep them answers with an error
        for file in self.logbook.client_states.glob("frozen-*.safetensors"):
            if file.name != self.frozen_name:  # of before the head was solved anew
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
                "No client sent statistics of %d classes (%s): the head cannot predict them.", len(absent), named
            )

    def train_rounds(self, first_round: int, last_round: int) -> None:
        """The strategy's own loop."""
        self.strategy.start(
            self.grid,
            to_record(self.model.trained),
            last_round,
            context_of=self.context,
            first_round=first_round,
            after_round=self._after_round,
        )

    def state(self) -> Checkpoint:
        """The strategy's tensors and the names of the clients' states, which are in their files by now."""
        self.home.client_states.flush()
        return Checkpoint(0, {}, {}, self.strategy.state(), client_states=self.strategy.client_states)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Both back into the strategy."""
        self.strategy.load_state(checkpoint.strategy_state)
        self.strategy.client_states = dict(checkpoint.client_states)

    def _after_round(self, server_round: int, arrays: ArrayRecord, metrics: MetricRecord) -> bool:
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
        return self.finish_round(row, to_tensors(arrays, self.home.device))

    def _cluster_accuracy(self, metrics: MetricRecord) -> float:
        """Share of this round's honest clients that picked the cluster of their group; nan without any."""
        told = zip(metrics["partitions"], metrics["clusters"], strict=True)  # type: ignore[arg-type]
        honest = [(group_of(self.config, int(partition)), cluster) for partition, cluster in told
                  if not byzantine_clients(self.config)[int(partition)]]  # fmt: skip
        if not honest:
            return math.nan
        groups, clusters = (torch.tensor(each, dtype=torch.int64) for each in zip(*honest, strict=True))
        return cluster_accuracy(clusters, groups, max(self.config.num_clusters, len(VIEWS[self.config.client_groups])))
