"""Byzantine-robust iterative federated clustering (Tao, Yang, Kulkarni, arXiv 2306.00638).

IFCA (Ghosh et al., NeurIPS 2020) with a robust rule in place of the mean; `cluster-rule = "mean"` is IFCA itself.
"""

import math
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.engine.cohort_messages import (
    CohortReply,
    cohort_messages,
    cohort_numbers,
    cohort_size,
    cohorts,
    output_square,
)
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.question import Question
from fl_taskarith.engine.records import payload_bytes, tensor_bytes, to_record
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.errors import AggregateDivergence
from fl_taskarith.merging.aggregate import apply_task_vector, task_vector_norm
from fl_taskarith.merging.attacks import corrupted
from fl_taskarith.merging.robust import aggregate_by
from fl_taskarith.strategies.fedavg import MOST_TIMES, FedAvg
from fl_taskarith.workspace.views import byzantine_clients


class BRIFCA(FedAvg):
    """θ_k ← θ_k + η_s · rule{τ_j : client j picked cluster k}; a cluster that nobody picked stays.

    The global tensors hold the K cluster models along their first dimension; a client picks the one of least loss on
    its own data and sends the cluster and its task vector. A robust rule needs all task vectors at once.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.byzantine = byzantine_clients(config)

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Send all K models, [K, ...] each, to every sampled client, or to cohorts of them with regression data."""
        staying, sampled = self.begin_round(server_round, arrays, grid)
        self.traffic = Traffic(downlink=sampled * payload_bytes(arrays))
        settings = settings_record(self.config, self.context.settings(server_round))
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: settings})
        kind = "train.cluster_step" if self.config.dataset == REGRESSION else "train.cluster"
        self._cohorts = cohorts(staying, cohort_size(self.config))
        return cohort_messages(content, self._cohorts, kind)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new models, [K, ...] each, every one from the replies of the clients that picked it.

        Raises:
            ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
            AggregateDivergence: an aggregate is NaN or infinite.
        """
        reports: list[CohortReply] = []
        sent: list[dict[str, Tensor]] = []

        def read(reply: Message) -> tuple[CohortReply, dict[str, Tensor]]:
            cohort = self._cohorts.get(reply.metadata.src_node_id, [])
            answer = self._question(server_round, reply.metadata.src_node_id, len(cohort)).read(
                reply, self.device, self.failures.most_seconds
            )
            return CohortReply.of(answer, cohort), answer.tensors[self.arrayrecord_key]

        for report, tensors in self.failures.read(replies, read):
            members = len(report.partitions)
            one = tensor_bytes({name: value[:1] for name, value in tensors.items()})
            self.traffic.uplink += members * one  # the same for a cohort as for its members
            sent += [{name: value[place].clone() for name, value in tensors.items()} for place in range(members)]
            reports.append(report)
        if not sent:
            return None, None
        clients = CohortReply.joined(reports)
        update = self._per_cluster(clients, sent)
        norm = task_vector_norm(update)
        if not math.isfinite(norm):
            raise AggregateDivergence(
                f"Round {server_round}: an aggregated task vector is not finite. Lower learning-rate."
            )
        mean_norm = sum(task_vector_norm(task_vector) for task_vector in sent) / len(sent)
        metrics = clients.metrics(mean_norm, self.config.server_lr * norm, self.traffic)
        return to_record(apply_task_vector(self._weights, update, self.config.server_lr)), metrics

    def _question(self, server_round: int, client: int, members: int) -> Question:
        """Return what was asked of a cohort of so many, of which `client` answers."""
        images, config = self.config.dataset != REGRESSION, self.config
        numbers = cohort_numbers(config, members)
        if images:
            numbers = {**self.training_numbers(server_round, client), **numbers}
        layout = {name: (value.dtype, (members, *value.shape[1:])) for name, value in self._weights.items()}
        return Question(
            server_round,
            self._cohorts,
            numbers,
            {self.arrayrecord_key: layout},
            self.largest_norm if images else lambda *_: self._largest_step(members),
            self.context.shard_size,
            self.context.frozen_name if images else None,
        )

    def _largest_step(self, members: int) -> float:
        """Return the largest norm of task vectors −γ ∇F_j of so many clients with regression data."""
        config, theta = self.config, self.sent_norm(self.arrayrecord_key)
        away = theta + math.sqrt(output_square(config))
        return members * MOST_TIMES * (1 + away) * (1 + self.context.learning_rate * config.dimension)

    def _per_cluster(self, clients: CohortReply, sent: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the aggregate of every cluster, stacked along the first dimension; zero where nobody reported."""
        config = self.config
        update = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        for cluster in range(config.num_clusters):
            members = [place for place, picked in enumerate(clients.clusters) if picked == cluster]
            if not members:
                continue
            byzantine = [bool(self.byzantine[clients.partitions[place]]) for place in members]
            reports = corrupted([sent[place] for place in members], byzantine, config.attack, config.attack_scale)
            aggregate = aggregate_by(
                config.cluster_rule, reports, [clients.examples[place] for place in members], config.trimmed_share
            )
            for name, value in aggregate.items():
                update[name][cluster] = value
        return update
