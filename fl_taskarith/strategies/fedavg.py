"""FedAvg (McMahan et al., AISTATS 2017) over task vectors, and the round loop that all our strategies share."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.records import metric, payload_bytes, to_record, to_tensors
from fl_taskarith.engine.replies import (
    Failures,
    Layout,
    check_examples,
    check_finite,
    check_frozen,
    layout_of,
    number,
    positive,
    shapes_of,
    state_name,
    tensors_of,
    told,
)
from fl_taskarith.engine.round_reply import Reply, Traffic, held
from fl_taskarith.errors import AggregateDivergence, ClientFailure, Divergence
from fl_taskarith.masking.mask import Mask
from fl_taskarith.merging.aggregate import WeightedMean, apply_task_vector, mean_pairwise_cosine, task_vector_norm
from fl_taskarith.merging.attacks import DATA_ATTACKS, corrupted
from fl_taskarith.merging.task_vector_bank import TaskVectorBank
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import StateNames
from fl_taskarith.workspace.views import byzantine_clients

CPU = torch.device("cpu")
BANK = "bank/"  # in the state of a checkpoint

__all__ = ["FedAvg", "Reply", "held"]  # all that an algorithm needs

RoundCallback = Callable[[int, ArrayRecord, MetricRecord], None]


class FedAvg(FlowerFedAvg):
    """θ ← θ + η_s Σ_k (n_k / Σ n) τ_k, folded in as the replies come.

    Unlike Flower's: clients are sampled by our own seed over partition ids; replies carry task vectors and are checked;
    a failed client stops the run, or is counted (`on-client-failure`); rounds may start after the first, to resume.
    `learning_rate` gives the clients' step size in a round. What travels are the trained tensors, or under a mask their
    updated entries: an algorithm sees named tensors either way. A subclass changes `aggregate`; what it keeps between
    rounds it reads with `recalled` and writes with `keep`.
    """

    def __init__(self, config: Config, device: torch.device, learning_rate: Callable[[int], float]) -> None:
        super().__init__(fraction_train=config.participation)
        self.config = config
        self.device = device
        self.learning_rate = learning_rate
        self.traffic = Traffic()
        self.state_folder = ""  # where clients keep state between rounds
        self.logit_scale: Callable[[], float] = lambda: 1.0  # of the head that is frozen now
        self.frozen_name = ""  # the clients' file of what is fixed
        self.mask: Mask | None = None  # in it
        self.linear_shapes: dict[str, tuple[int, int]] = {}  # [out, in] of the trained linear layers' weights
        self.client_states: StateNames = {}  # what each of them told of it last, for the next message and checkpoints
        self.shard_size: Callable[[int], int] | None = None  # of a partition, if the server knows
        self.failures = Failures(config.on_client_failure)
        self.bank = TaskVectorBank(getattr(torch, config.task_vector_bank, torch.float32), config.bank_decay)
        # Whether a round is a sum over its task vectors alone; anything else has each checked before it is used.
        self._sum_only = (
            type(self).aggregate is FedAvg.aggregate
            and type(self).aggregate_train is FedAvg.aggregate_train
            and config.task_vector_bank == "off"
        )
        self._scrutinise = not self._sum_only  # every reply for NaN, before it is used
        self._weights: dict[str, Tensor] = {}
        self._own_masks = False  # each client trains under one of its own
        self._asked: dict[str, Layout] = {}  # of this round's answers: that of what is sent
        self._kept: dict[str, Tensor] = {}

    # What a new aggregation rule defines

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """The task vector that the server follows by a step of `server-lr`, from replies that come in order.

        `weights` are the global ones. A tensor that the result lacks stays as it is.
        """
        if self.config.task_vector_bank != "off":
            layout = self._asked[self.arrayrecord_key] if not self._own_masks else layout_of(weights)
            self.bank.begin_round({name: shape for name, (_, shape) in layout.items()})
            for reply in replies:
                self.bank.put(reply.client, reply.task_vector, reply.num_examples)
            waits = self.config.bank_start == "all-heard" and len(self.bank) < self.config.num_clients
            return {} if waits else self.bank.mean()
        mean = WeightedMean()
        for reply in replies:
            mean.add(reply.task_vector, reply.num_examples)
        return mean.result()

    @property
    def converged(self) -> bool:
        """Whether rounds may end early; FedAvg has no convergence test."""
        return False

    def message_arrays(self, arrays: ArrayRecord) -> dict[str, ArrayRecord]:
        """The array records of this round's messages, by key, from all that is trained."""
        return {self.arrayrecord_key: arrays}

    # What it may keep between rounds, in checkpoints too

    def keep(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors for the next round under a name for their kind, in place of the last ones of it."""
        others = {name: value for name, value in self._kept.items() if not name.startswith(f"{kind}/")}
        self._kept = others | {f"{kind}/{name}": value for name, value in tensors.items()}

    def recalled(self, kind: str, like: Mapping[str, Tensor], start: float = 0.0) -> dict[str, Tensor]:
        """What was kept under `kind` for the names of `like`; tensors full of `start` where nothing was."""
        kept = {name: self._kept.get(f"{kind}/{name}") for name in like}
        return {
            name: torch.full_like(like[name], start, dtype=torch.float32) if value is None else value
            for name, value in kept.items()
        }

    def state(self) -> dict[str, Tensor]:
        """All that is kept, for a checkpoint."""
        return self._kept | {BANK + name: value for name, value in self.bank.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state` of a checkpoint."""
        self._kept = {name: value for name, value in state.items() if not name.startswith(BANK)}
        self.bank.load({name.removeprefix(BANK): state[name] for name in state if name.startswith(BANK)})

    # The round loop

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
            ClientFailure: a client failed or sent what cannot be used, or under "skip" all of them did.
        """
        result = Result()
        result.arrays = initial_arrays
        for server_round in range(first_round, num_rounds + 1):
            if self.converged:
                break
            started = time.perf_counter()
            arrays, metrics = self._round(server_round, result.arrays, grid)
            if arrays is None or metrics is None:
                raise self.failures.of_all(f"Round {server_round}")
            metrics["learning-rate"] = self.learning_rate(server_round)
            metrics["round-seconds"] = time.perf_counter() - started
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
            if after_round is not None:
                after_round(server_round, arrays, metrics)
        return result

    def _round(
        self, server_round: int, arrays: ArrayRecord, grid: PartitionGrid
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One round; a second time if a sum turns out not to be finite, to learn whose task vector was not.

        To look at every entry of every task vector before it is added costs as much as to add it, and one look at
        their sum tells whether anybody's was bad.
        """
        messages = self.configure_train(server_round, arrays, ConfigRecord(), grid)
        states = dict(self.client_states)
        try:
            return self.aggregate_train(server_round, grid.exchange(messages))
        except AggregateDivergence:
            if self._scrutinise:
                raise
        self.client_states = states
        self._scrutinise = True
        try:
            messages = self.configure_train(server_round, arrays, ConfigRecord(), grid)
            return self.aggregate_train(server_round, grid.exchange(messages))
        finally:
            self._scrutinise = False

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """One message with the global weights for each client sampled in this round, by ascending partition id."""
        self._weights = to_tensors(arrays, self.device)
        self._own_masks = self.config.mask_source == "own" and server_round > self.config.head_rounds
        chosen = self.sample(server_round, grid)
        records = self.message_arrays(arrays)
        self._asked = {key: layout_of(to_tensors(record, self.device)) for key, record in records.items()}
        self.traffic = Traffic(downlink=len(chosen) * sum(map(payload_bytes, records.values())))
        messages = []
        told: dict[RoundSettings, ConfigRecord] = {}  # the same to all clients but those with a state of their own
        for partition in self._staying(server_round, chosen):
            settings = self.round_settings(server_round, partition)
            if settings not in told:
                told[settings] = settings_record(self.config, settings)
            content = RecordDict({**records, self.configrecord_key: told[settings]})
            messages.append(Message(content, partition, MessageType.TRAIN))
        return messages

    def _staying(self, server_round: int, sampled: list[int]) -> list[int]:
        """Those of the sampled clients that do not drop out of the round; all of them were sent the weights."""
        if not self.config.dropout:
            return sampled
        luck = {
            client: random_generator(self.config.seed, "dropout", server_round, client).random() for client in sampled
        }
        staying = [client for client in sampled if luck[client] >= self.config.dropout]
        return staying or [max(sampled, key=lambda client: luck[client])]

    def round_settings(self, server_round: int, partition: int) -> RoundSettings:
        """What a message of `server_round` to this client carries beside tensors."""
        return RoundSettings(
            server_round,
            self.learning_rate(server_round),
            self.state_folder,
            self.client_states.get(partition, ""),
            self.frozen_name,
            self.logit_scale(),
        )

    def sample(self, server_round: int, grid: PartitionGrid) -> list[int]:
        """The partitions of this round's clients, ascending: drawn anew, or the next of one random order (cyclic).

        What a draw costs does not depend on K: numpy draws a small share of many without listing them all.
        """
        partitions = grid.get_node_ids()
        if self.config.sampling == "cyclic":
            order = random_generator(self.config.seed, "cyclic order").permutation(len(partitions))
            first = (server_round - 1) * self.config.sampled_clients
            places = range(first, first + self.config.sampled_clients)
            return sorted(partitions[order[place % len(partitions)]] for place in places)
        generator = random_generator(self.config.seed, "participation", server_round)
        chosen = generator.choice(len(partitions), self.config.sampled_clients, replace=False)
        return sorted(partitions[index] for index in chosen)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to clients after the last round: none, for the server evaluates the global model itself."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new global weights, and metrics averaged by numbers of examples; (None, None) without replies.

        Raises:
            ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
            AggregateDivergence: the aggregate is NaN or infinite.
        """
        log: list[MetricRecord] = []

        def read(message: Message) -> Reply:
            self._check_loss(server_round, message)
            reply = self._read(message)
            log.append(told(message))
            return reply

        incoming = self.failures.read(replies, read)
        task_vector = self.aggregate(self._weights, self._attacked(incoming))
        if not log:
            return None, None
        norm = task_vector_norm(task_vector)
        if not math.isfinite(norm):
            raise AggregateDivergence(
                f"Round {server_round}: the aggregated task vector is not finite although every client's loss was. "
                "Lower learning-rate (or server-lr)."
            )
        metrics = self._summarise(log)
        metrics["update-norm"] = self.config.server_lr * norm
        # Under attack the norms that clients tell are not those of the task vectors that came.
        if self._sum_only and not self.config.byzantine_fraction:
            norms, weights = ([metric(each, name) for each in log] for name in ("update-norm", "num-examples"))
            if (cosine := mean_pairwise_cosine(norm, norms, weights)) is not None:
                metrics["client-cosine"] = cosine
        new = apply_task_vector(self._weights, task_vector, self.config.server_lr, overwrite=self._sum_only)
        return to_record(new), metrics

    def _attacked(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """The replies with those of Byzantine clients as the attack has them; omniscient attackers see all others.

        What a client says of itself beside its task vector stays honest.
        """
        config = self.config
        if not config.byzantine_fraction or config.attack in DATA_ATTACKS:
            return replies
        own = [
            replace(reply, task_vector={name: value.clone() for name, value in reply.task_vector.items()})
            for reply in replies
        ]
        byzantine = [bool(byzantine_clients(config)[reply.client]) for reply in own]
        sent = corrupted([reply.task_vector for reply in own], byzantine, config.attack, config.attack_scale)
        return [replace(reply, task_vector=dict(vector)) for reply, vector in zip(own, sent, strict=True)]

    def _read(self, message: Message) -> Reply:
        """The reply in `message`; counts its bytes and notes the name of the client's own state.

        Raises:
            ClientFailure: it is not what was asked for.
        """
        client = message.metadata.src_node_id
        check_frozen(message, self.frozen_name)
        if self.shard_size is not None:
            check_examples(message, self.shard_size(client))
        asked, mask = self._asked, self._mask_of(message) if self._own_masks else None
        if mask is not None:
            entries = {name: (torch.float32, (len(index),)) for name, index in mask.indices.items()}
            asked = {self.arrayrecord_key: entries}
        tensors = {key: tensors_of(message, key, self.device, shapes) for key, shapes in asked.items()}
        if self._scrutinise:
            for received in tensors.values():
                check_finite(message, received)
        reply = Reply(
            client,
            tensors.pop(self.arrayrecord_key),
            positive(message, "num-examples"),
            positive(message, "step-coefficient-sum"),
            tensors,
        )
        for name in ("train-loss", "update-norm", "train-seconds"):
            number(message, name)
        if mask is not None:
            self.keep(f"mask-{client}", mask.packed())
            full = {name: torch.zeros_like(value) for name, value in self._weights.items()}
            mask.scatter_(full, reply.task_vector)
            reply = replace(reply, task_vector=full)
        if (state := state_name(message)) is not None:
            self.client_states[client] = state
        self.traffic.uplink += sum(map(payload_bytes, message.content.array_records.values()))
        return reply

    def _mask_of(self, message: Message) -> Mask:
        """The mask that a client sent with its first reply.

        Raises:
            ClientFailure: it sent none, or none of these weights.
        """
        client = message.metadata.src_node_id
        sent = message.content.array_records.get("mask")
        packed = to_tensors(sent, CPU) if sent is not None else {}
        if sent is None:
            packed = {name: self._kept[f"mask-{client}/{name}"] for name in self._weights
                      if f"mask-{client}/{name}" in self._kept}  # fmt: skip
        try:
            return Mask.unpacked({name: packed[name] for name in self._weights}, shapes_of(self._weights)).to(
                self.device
            )
        except (KeyError, ValueError) as error:
            raise ClientFailure(f"Client {client} sent no mask of the weights that are trained: {error}.") from error

    def _check_loss(self, server_round: int, message: Message) -> None:
        loss = told(message).get("train-loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            raise Divergence(
                f"Client {message.metadata.src_node_id} diverged in round {server_round}: its training loss is {loss}. "
                f"Lower learning-rate (now {self.config.peak_rate:g}), or add warmup-rounds."
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
                "train-seconds": self.traffic.seconds + sum(metric(metrics, "train-seconds") for metrics in log),
                "downlink-bytes": self.traffic.downlink,
                "uplink-bytes": self.traffic.uplink,
            }
        )
