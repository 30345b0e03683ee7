"""Federated EM for a mixture of linear regressions (Tao, Chandak, Kulkarni, arXiv 2408.05819)."""

import math
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_taskarith.engine.cohort_messages import CohortReply, cohort_messages, cohort_numbers, cohorts, output_square
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.question import Question
from fl_taskarith.engine.records import payload_bytes, to_record
from fl_taskarith.engine.round_reply import Traffic
from fl_taskarith.mixtures.expectation_maximisation import Statistics, largest_move, maximisation
from fl_taskarith.strategies.fedavg import FedAvg


class FedEM(FedAvg):
    """Clients send {w_jk X_jᵀX_j, w_jk X_jᵀy_j}_k; the server adds them up and solves for every θ_k.

    Under partial participation the M-step is over the sampled clients. Rounds end when no θ_k moves by more than
    `tolerance`.
    """

    _move = math.inf

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Send θ, [K, d], to every sampled client, or to cohorts of `clients-at-once` of them."""
        staying, sampled = self.begin_round(server_round, arrays, grid)
        self.traffic = Traffic(downlink=sampled * payload_bytes(arrays))
        settings = settings_record(self.config, self.context.settings(server_round))
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: settings})
        self._cohorts = cohorts(staying, self.config.at_once)
        return cohort_messages(content, self._cohorts, "train.expectation")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do the M-step: return θ, [K, d], from sums added in the order of the clients.

        Raises:
            ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
        """
        theta = self._weights["theta"]
        total: Statistics | None = None
        reports: list[CohortReply] = []
        clusters, dimension = theta.shape
        layout = {
            "grams": (theta.dtype, (clusters, dimension, dimension)),
            "moments": (theta.dtype, (clusters, dimension)),
        }
        layouts = {self.arrayrecord_key: layout}

        def read(reply: Message) -> Statistics:
            cohort = self._cohorts.get(reply.metadata.src_node_id, [])
            question = Question(
                server_round, self._cohorts, cohort_numbers(self.config, len(cohort)), layouts,
                examples_of=self.context.shard_size,
            )  # fmt: skip
            answer = question.read(reply, self.device, self.failures.most_seconds)
            sums, report = Statistics(**answer.tensors[self.arrayrecord_key]), CohortReply.of(answer, cohort)
            sums.check(len(cohort) * int(report.examples[0]), math.sqrt(output_square(self.config)))
            reports.append(report)
            self.traffic.uplink += len(cohort) * answer.bytes  # each sends as much as the sum
            return sums

        for sums in self.failures.read(replies, read):
            total = sums if total is None else total + sums
        if total is None:
            return None, None
        after = maximisation(total, theta)
        self._move = largest_move(after, theta)
        metrics = CohortReply.joined(reports).metrics(math.nan, float((after - theta).norm()), self.traffic)
        return to_record({"theta": after}), metrics

    @property
    def converged(self) -> bool:
        """Whether the last M-step passed the convergence test."""
        return self._move <= self.config.tolerance

    def state(self) -> dict[str, Tensor]:
        """Return how far the last M-step moved θ, a scalar, for a checkpoint."""
        return {"move": torch.tensor(self._move, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the scalar that `state` returned."""
        self._move = float(state["move"])
