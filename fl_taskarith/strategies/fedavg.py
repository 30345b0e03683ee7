"""FedAvg (McMahan et al., AISTATS 2017) over task vectors, and the round loop that all our strategies share."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from torch import Tensor

from fl_taskarith.client_state import StateNames
from fl_taskarith.config import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.records import metric, payload_bytes, to_record, to_tensors
from fl_taskarith.errors import ClientFailure, Divergence
from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector, task_vector_norm
from fl_taskarith.seeding import random_generator

RoundCallback = Callable[[int, ArrayRecord, MetricRecord], None]


@dataclass
class Traffic:
    """Bytes of arrays in the messages of one round, as Flower serialises them, summed over its clients."""

    downlink: int = 0
    uplink: int = 0


class FedAvg(FlowerFedAvg):
    """θ ← θ + η_s Σ_k (n_k / Σ n) τ_k, folded in as the replies come.

    Unlike Flower's: clients are sampled by our own seed over partition ids; replies carry task vectors; a failed client
    stops the run; rounds may start after the first, to resume. `learning_rate` gives the clients' step size in a round.
    What travels are the trained tensors, or under a mask their updated entries: an algorithm sees named tensors either
    way. A subclass changes `aggregate`, and `state` and `load_state` if it keeps tensors between rounds.
    """

    def __init__(self, config: Config, device: torch.device, learning_rate: Callable[[int], float]) -> None:
        super().__init__(fraction_train=config.participation)
        self.config = config
        self.device = device
        self.learning_rate = learning_rate
        self.traffic = Traffic()
        self.state_folder = ""  # where clients keep state between rounds
        self.frozen_name = ""  # the clients' file of what is fixed
        self.client_states: StateNames = {}  # what each of them told of it last, for the next message and checkpoints
        self._weights: dict[str, Tensor] = {}

    # What a new aggregation rule defines

    def aggregate(
        self, weights: dict[str, Tensor], replies: Iterable[tuple[dict[str, Tensor], float]]
    ) -> dict[str, Tensor]:
        """The task vector that the server follows by a step of `server-lr`.

        `weights` are the global ones, `replies` (task vector, number of examples) of each client, in order.
        """
        mean = WeightedMean()
        for task_vector, num_examples in replies:
            mean.add(task_vector, num_examples)
        return mean.result()

    def state(self) -> dict[str, Tensor]:
        """Tensors kept between rounds, for a checkpoint; FedAvg keeps none."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state` of a checkpoint."""

    # The round loop---------------------

    def start(  # type: ignore[override]
        self,
        grid: PartitionGrid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        *,
        first_round: int = 1,
        after_round: RoundCallback | None = None,
    ) -> Result:
        """Rounds `first_round`..`num_rounds` from `initial_arrays`; `after_round` gets each one's result.

        Raises:
            ClientFailure: a client raised, diverged or did not answer.
        """
        result = Result()
        result.arrays = initial_arrays
        for server_round in range(first_round, num_rounds + 1):
            started = time.perf_counter()
            messages = self.configure_train(server_round, result.arrays, ConfigRecord(), grid)
            arrays, metrics = self.aggregate_train(server_round, grid.exchange(messages))
            if arrays is None or metrics is None:
                raise ClientFailure(f"Round {server_round} got no reply from any client.")
            metrics["learning-rate"] = self.learning_rate(server_round)
            metrics["round-seconds"] = time.perf_counter() - started
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
            if after_round is not None:
                after_round(server_round, arrays, metrics)
        return result

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """One message with the global weights for each client sampled in this round, by ascending partition id.

        What it costs does not depend on K: numpy draws a small share of many without listing them all.
        """
        self._weights = to_tensors(arrays, self.device)
        partitions = grid.get_node_ids()
        generator = random_generator(self.config.seed, "participation", server_round)
        chosen = generator.choice(len(partitions), self.config.sampled_clients, replace=False)
        self.traffic = Traffic(downlink=len(chosen) * payload_bytes(arrays))
        messages = []
        for partition in sorted(partitions[index] for index in chosen):
            settings = RoundSettings(
                server_round,
                self.learning_rate(server_round),
                self.state_folder,
                self.client_states.get(partition, ""),
                self.frozen_name,
            )
            record = settings_record(self.config, settings)
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: record})
            messages.append(Message(content, partition, MessageType.TRAIN))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: the global model is evaluated on the server, which holds the validation and test splits."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new global weights, and metrics averaged by numbers of examples; (None, None) without replies.

        Raises:
            ClientFailure: a client's loss, or the aggregate, is NaN or infinite.
        """
        log: list[MetricRecord] = []

        def incoming() -> Iterable[tuple[dict[str, Tensor], float]]:
            for reply in replies:
                metrics = reply.content.metric_records["metrics"]
                self._check_loss(server_round, reply.metadata.src_node_id, metrics)
                log.append(metrics)
                if "state" in reply.content.config_records:
                    name = str(reply.content.config_records["state"]["name"])
                    self.client_states[reply.metadata.src_node_id] = name
                arrays = reply.content.array_records[self.arrayrecord_key]
                self.traffic.uplink += payload_bytes(arrays)
                yield to_tensors(arrays, self.device), metric(metrics, "num-examples")

        task_vector = self.aggregate(self._weights, incoming())
        if not log:
            return None, None
        norm = task_vector_norm(task_vector)
        if not math.isfinite(norm):
            raise Divergence(
                f"Round {server_round}: the aggregated task vector is not finite although every client's loss was. "
                "Lower learning-rate (or server-lr)."
            )
        metrics = self._summarise(log)
        metrics["update-norm"] = self.config.server_lr * norm
        return to_record(apply_task_vector(self._weights, task_vector, self.config.server_lr)), metrics

    def _check_loss(self, server_round: int, client: int, metrics: MetricRecord) -> None:
        loss = metric(metrics, "train-loss")
        if not math.isfinite(loss):
            raise Divergence(
                f"Client {client} diverged in round {server_round}: its training loss is {loss}. Lower learning-rate "
                f"(now {self.config.learning_rate:g}), or add warmup-rounds."
            )

    def _summarise(self, log: list[MetricRecord]) -> MetricRecord:
        examples = [metric(metrics, "num-examples") for metrics in log]

        def mean(name: str) -> float:
            values = (metric(metrics, name) for metrics in log)
            return sum(n * value for n, value in zip(examples, values, strict=True)) / sum(examples)

        return MetricRecord(
            {
                "train-loss": mean("train-loss"),
                "client-update-norm": mean("update-norm"),
                "clients": len(log),
                "train-seconds": sum(metric(metrics, "train-seconds") for metrics in log),
                "downlink-bytes": self.traffic.downlink,
                "uplink-bytes": self.traffic.uplink,
            }
        )
