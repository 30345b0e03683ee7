"""Federated EM for a mixture of linear regressions (Tao, Chandak, Kulkarni, arXiv 2408.05819)."""

import math
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_taskarith.engine.cohort_messages import CohortReply, cohort_messages
from fl_taskarith.engine.grid import PartitionGrid, settings_record
from fl_taskarith.engine.records import payload_bytes, to_record
from fl_taskarith.engine.replies import check_finite, tensors_of
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
        return cohort_messages(content, staying, self.config.clients_at_once, "train.expectation")

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

        def read(reply: Message) -> Statistics:
            sums = tensors_of(reply, self.arrayrecord_key, self.device, layout)
            check_finite(reply, sums)
            reports.append(CohortReply.read(reply, self.config, self.context.shard_size))
            arrays = reply.content.array_records[self.arrayrecord_key]
            self.traffic.uplink += len(reports[-1].partitions) * payload_bytes(arrays)  # each sends as much as the sum
            return Statistics(**sums)

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
