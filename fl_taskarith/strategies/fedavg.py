"""FedAvg (McMahan et al., AISTATS 2017) over task vectors, and the round loop that all our strategies share."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.grid import PartitionGrid, RoundSettings, settings_record
from fl_taskarith.engine.participation import sample_clients, with_attackers, without_dropouts
from fl_taskarith.engine.question import (
    LOSS,
    WORKED,
    Answer,
    Layout,
    Numbers,
    Question,
    Range,
    layout_of,
    shapes_of,
    tensors_of,
)
from fl_taskarith.engine.records import payload_bytes, to_record, to_tensors
from fl_taskarith.engine.replies import Failures, complaint
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.round_reply import OnePass, Reply, Traffic, all_task_vectors
from fl_taskarith.errors import AggregateDivergence, ConfigError, own_code
from fl_taskarith.masking.mask import Mask
from fl_taskarith.merging.aggregate import (
    WeightedMean,
    apply_task_vector,
    checked_direction,
    mean_pairwise_cosine,
    task_vector_norm,
)
from fl_taskarith.merging.task_vector_bank import TaskVectorBank
from fl_taskarith.storage.client_files import StateNames
from fl_taskarith.training.schedules import draw_local_steps, step_coefficient_sum

MOST_TIMES = 100.0  # that of the weights which were sent: see `FedAvg.largest_norm`
MASK = "mask"  # key of the array record of a client's own mask
BANK = "bank/"  # in the state of a checkpoint

__all__ = ["FedAvg", "Reply", "all_task_vectors"]  # all that an algorithm needs

RoundCallback = Callable[[int, ArrayRecord, MetricRecord], bool | None]


class FedAvg(FlowerFedAvg):
    """θ ← θ + η_s Σ_k (n_k / Σ n) τ_k, added up as the replies come.

    Unlike in Flower's class, our own seed samples clients over partition ids, replies carry task vectors and are
    checked, a failed client stops the run or is counted (`on-client-failure`), and a run may resume after any round.
    What travels are the trained tensors, or under a mask their updated entries: an algorithm sees named tensors either
    way. A subclass changes `aggregate`; what it keeps between rounds it reads with `recalled` and writes with `keep`.
    """

    streams: ClassVar[bool] = True
    """Whether the aggregate is a plain weighted sum of the task vectors, so that none of them needs a check of its own.

    Not inherited: a subclass whose aggregate is such a sum says so itself.
    """

    one_way: ClassVar[frozenset[str]] = frozenset()
    """The keys of records that clients are sent beside the weights and do not answer with one of their own."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(fraction_train=config.participation)
        self.config = config
        self.device = device
        self.context = RoundContext()
        self.traffic = Traffic()
        self.client_states: StateNames = {}  # each client's newest file, for the next message and for checkpoints
        self.failures = Failures(config.on_client_failure)
        self.bank = TaskVectorBank(getattr(torch, config.task_vector_bank, torch.float32), config.bank_decay)
        self._streams = vars(type(self)).get("streams", False) and config.task_vector_bank == "off"
        self._weights: dict[str, Tensor] = {}
        self._own_masks = False  # each client trains under its own mask
        self._layouts: dict[str, Layout] = {}  # of the array records that this round's replies must have
        self._sent: dict[str, dict[str, Tensor]] = {}  # in this round, by the key of their record
        self._sent_norms: dict[str, float] = {}
        self._asked: list[int] = []  # the clients of this round
        self._kept: dict[str, Tensor] = {}

    # What a new aggregation rule defines

    def aggregate(self, weights: dict[str, Tensor], replies: Iterable[Reply]) -> dict[str, Tensor]:
        """Return the task vector that the server follows by a step of `server-lr`.

        Args:
            weights: the global tensors, of any shape; under a mask [n] of its updated entries.
            replies: of this round's clients, by ascending partition, at least one; they can be iterated over once.

        Returns:
            Tensors of the names and shapes of `weights`; a tensor that is absent stays as it is.
        """
        if self.config.task_vector_bank != "off":
            layout = self._layouts[self.arrayrecord_key] if not self._own_masks else layout_of(weights)
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
        """Return the array records of this round's messages, by key, from all that is trained."""
        return {self.arrayrecord_key: arrays}

    # What it may keep between rounds, in checkpoints too

    def keep(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of any shape for the next round under `kind`, in place of the last ones of that kind.

        Raises:
            ConfigError: something else is to be kept.
        """
        if other := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
            raise ConfigError(
                f'keep("{kind}", ...) has {", ".join(map(str, other))}, no tensors: make tensors of them.'
            )
        others = {name: value for name, value in self._kept.items() if not name.startswith(f"{kind}/")}
        self._kept = others | {f"{kind}/{name}": value for name, value in tensors.items()}

    def recalled(self, kind: str, like: Mapping[str, Tensor], start: float = 0.0) -> dict[str, Tensor]:
        """Return what was kept under `kind` for the names of `like`.

        Where nothing was kept: float32 tensors of the shapes of `like`, full of `start`.
        """
        kept = {name: self._kept.get(f"{kind}/{name}") for name in like}
        return {
            name: torch.full_like(like[name], start, dtype=torch.float32) if value is None else value
            for name, value in kept.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return all that is kept, for a checkpoint: by "KIND/name", in the shapes in which it was kept."""
        return self._kept | {BANK + name: value for name, value in self.bank.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned, by name in the same shapes."""
        self._kept = {name: value for name, value in state.items() if not name.startswith(BANK)}
        self.bank.load({name.removeprefix(BANK): state[name] for name in state if name.startswith(BANK)})

    def measured(self) -> dict[str, dict[str, Tensor]]:
        """Return what was measured of single tensors in every round, [rounds], by kind and tensor; FedAvg: nothing."""
        return {}

    # The round loop

    def start(  # type: ignore[override]
        self,
        grid: PartitionGrid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        *,
        context_of: Callable[[int], RoundContext],
        first_round: int = 1,
        after_round: RoundCallback | None = None,
    ) -> Result:
        """Train rounds `first_round`..`num_rounds` from `initial_arrays`.

        Args:
            context_of: is asked for the context of each round when it begins.
            after_round: is called with the number, arrays and metrics of each round; True ends the rounds.

        Raises:
            ClientFailure: a client failed or sent what cannot be used, or under "skip" all of them did.
        """
        result = Result()
        result.arrays = initial_arrays
        for server_round in range(first_round, num_rounds + 1):
            if self.converged:
                break
            started = time.perf_counter()
            self.context = context_of(server_round)
            messages = self.configure_train(server_round, result.arrays, ConfigRecord(), grid)
            arrays, metrics = self.aggregate_train(server_round, grid.exchange(messages))
            if arrays is None or metrics is None:
                raise self.failures.of_all(f"Round {server_round}")
            metrics["learning-rate"] = self.context.learning_rate
            metrics["round-seconds"] = time.perf_counter() - started
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
            if after_round is not None and after_round(server_round, arrays, metrics):
                break
        return result

    def begin_round(self, server_round: int, arrays: ArrayRecord, grid: PartitionGrid) -> tuple[list[int], int]:
        """Take the global tensors; return the clients that stay in the round, ascending, and how many were sampled."""
        self._weights = to_tensors(arrays, self.device)
        self._sent, self._sent_norms = {self.arrayrecord_key: self._weights}, {}
        sampled = sample_clients(self.config, server_round, grid.get_node_ids())
        self._asked = without_dropouts(self.config, server_round, sampled)
        return self._asked, len(sampled)

    def configure_train(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Return one message with the global weights for each client of this round, by ascending partition."""
        staying, sampled = self.begin_round(server_round, arrays, grid)
        self._own_masks = self.config.mask_source == "own" and server_round > self.config.head_rounds
        records = self.message_arrays(arrays)
        self._sent = {key: to_tensors(record, self.device) for key, record in records.items()}
        self._layouts = {key: layout_of(tensors) for key, tensors in self._sent.items() if key not in self.one_way}
        self.traffic = Traffic(downlink=sampled * sum(map(payload_bytes, records.values())))
        messages = []
        shared: dict[RoundSettings, ConfigRecord] = {}  # one record for all clients that have no state of their own
        for partition in staying:
            settings = self.round_settings(server_round, partition)
            if settings not in shared:
                shared[settings] = settings_record(self.config, settings)
            content = RecordDict({**records, self.configrecord_key: shared[settings]})
            messages.append(Message(content, partition, MessageType.TRAIN))
        return messages

    def round_settings(self, server_round: int, partition: int) -> RoundSettings:
        """Return what a message of `server_round` to this client says beside tensors."""
        return self.context.settings(server_round, self.client_states.get(partition, ""))

    def configure_evaluate(  # type: ignore[override]
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: PartitionGrid
    ) -> Iterable[Message]:
        """Return messages to clients after the last round: none, for the server evaluates the global model itself."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global weights, and metrics averaged by numbers of examples; (None, None) without replies.

        Raises:
            ClientFailure: a client failed, or sent what cannot be used (by `on-client-failure`).
            AggregateDivergence: the aggregate is NaN or infinite.
        """
        log: list[tuple[Numbers, float]] = []  # and no tensors: memory must not grow with the number of clients

        def read(message: Message) -> Reply:
            answer, reply = self._read(server_round, message)
            log.append((answer.numbers, answer.norms[self.arrayrecord_key]))
            return reply

        incoming = iter(with_attackers(self.config, self.failures.read(replies, read)))
        first = next(incoming, None)
        if first is None:
            return None, None
        task_vector = self._aggregated(itertools.chain([first], incoming))
        norm = task_vector_norm(task_vector)
        if not math.isfinite(norm):
            own = f' under strategy = "{self.config.strategy}"' if ":" in self.config.strategy else ""
            raise AggregateDivergence(
                f"Round {server_round}: the aggregated task vector{own} is not finite although every client's loss "
                "was. Lower learning-rate (or server-lr)."
            )
        new = apply_task_vector(self._weights, task_vector, self.config.server_lr, overwrite=self._streams)
        return to_record(new), self._metrics(log, norm)

    def _aggregated(self, replies: Iterator[Reply]) -> dict[str, Tensor]:
        """Return the task vector that `aggregate` makes of the replies, after a check of what one's own returned."""
        name = self.config.strategy
        if ":" not in name:
            return self.aggregate(self._weights, replies)
        source, once = f'strategy = "{name}"', OnePass(replies)
        with own_code("strategy", name):
            task_vector = self.aggregate({key: value.clone() for key, value in self._weights.items()}, once)
        if next(replies, None) is not None:
            raise ConfigError(f"{source} returned before it had read every reply: expected one pass over all of them.")
        return checked_direction(task_vector, self._weights, source)

    def training_numbers(self, server_round: int, client: int) -> dict[str, Range]:
        """Return where the numbers of a client's reply after local steps must lie, by metric."""
        steps = draw_local_steps(self.config, server_round, client)
        expected = step_coefficient_sum(self.config, steps, self.context.learning_rate)
        taken = Range(0.999999 * expected, 1.000001 * expected, words=f"above 0, here {expected:g}")
        return {"train-loss": LOSS, "step-coefficient-sum": taken, **WORKED}

    def largest_norm(self, key: str, numbers: Numbers, norms: Numbers) -> float:
        """Return the largest norm of a reply's tensors under `key`: 100 (1 + ‖θ‖) (1 + η‖a‖₁), θ what was sent.

        Local training that works stays below a hundredth of it, and training that collapses, at rates a thousand times
        too large, below a quarter. A model with weights as large still has a loss that is a number. It is no defence
        against clients that lie within it: robust strategies are.
        """
        most = MOST_TIMES * (1 + self.context.learning_rate * numbers["step-coefficient-sum"])
        return most if norms[key] <= most else most * (1 + self.sent_norm(key))  # which takes a pass over θ

    def sent_norm(self, key: str) -> float:
        """Return the 2-norm of all tensors that were sent in this round's record `key`."""
        if key not in self._sent_norms:
            self._sent_norms[key] = task_vector_norm(self._sent.get(key, {}))
        return self._sent_norms[key]

    def _read(self, server_round: int, message: Message) -> tuple[Answer, Reply]:
        """Check and return the reply in `message`; count its bytes and note the name of the client's newest file.

        Raises:
            ClientFailure: the reply is not what was asked for.
        """
        client, context, layouts = message.metadata.src_node_id, self.context, self._layouts
        mask = self._mask_of(message) if self._own_masks else None
        if mask is not None:
            entries = {name: (torch.float32, (len(index),)) for name, index in mask.indices.items()}
            packed = {MASK: layout_of(mask.packed())} if MASK in message.content.array_records else {}
            layouts = {self.arrayrecord_key: entries, **packed}
        question = Question(
            server_round, self._asked, self.training_numbers(server_round, client), layouts, self.largest_norm,
            context.shard_size, context.frozen_name,
        )  # fmt: skip
        answer = question.read(message, self.device, self.failures.most_seconds)
        others = {key: value for key, value in answer.tensors.items() if key not in (self.arrayrecord_key, MASK)}
        task_vector = answer.tensors[self.arrayrecord_key]
        if mask is not None:
            self.keep(f"mask-{client}", mask.packed())
            full = {name: torch.zeros_like(value) for name, value in self._weights.items()}
            mask.scatter_(full, task_vector)
            task_vector = full
        if answer.state is not None:
            self.client_states[client] = answer.state
        self.traffic.uplink += answer.bytes
        numbers = answer.numbers
        return answer, Reply(client, task_vector, numbers["num-examples"], numbers["step-coefficient-sum"], others)

    def _mask_of(self, message: Message) -> Mask:
        """Return the mask that a client sent with its first reply.

        Raises:
            ClientFailure: the client sent no mask of the trained weights, or one of another density.
        """
        client, shapes = message.metadata.src_node_id, shapes_of(self._weights)
        sent = message.content.array_records.get(MASK)
        if sent is None:
            packed = {name: self._kept.get(f"mask-{client}/{name}") for name in shapes}
            if any(bits is None for bits in packed.values()):
                raise complaint(message, "without a mask of the weights that are trained")
        else:
            layout = {name: (torch.uint8, (-(-math.prod(shape) // 8),)) for name, shape in shapes.items()}
            packed = dict(tensors_of(message, sent, MASK, torch.device("cpu"), layout))
        mask = Mask.unpacked({name: bits for name, bits in packed.items() if bits is not None}, shapes)
        wanted = round(self.config.density * mask.size)
        if not self.config.sensitivity_threshold and mask.updated != wanted:
            raise complaint(message, f"whose mask updates {mask.updated} of {mask.size} weights, not {wanted}")
        return mask.to(self.device)

    def _metrics(self, log: list[tuple[Numbers, float]], norm: float) -> MetricRecord:
        """Return the metrics of a round whose aggregate has this norm, from its clients' numbers and norms."""
        examples, losses, seconds = ([numbers[name] for numbers, _ in log] for name in
                                     ("num-examples", "train-loss", "train-seconds"))  # fmt: skip
        norms = [own for _, own in log]

        def mean(values: list[float]) -> float:
            return sum(n * value for n, value in zip(examples, values, strict=True)) / sum(examples)

        metrics = MetricRecord(
            {
                "train-loss": mean(losses),
                "client-update-norm": mean(norms),
                "update-norm": self.config.server_lr * norm,
                "clients": len(log),
                "train-seconds": self.traffic.seconds + sum(seconds),
                "downlink-bytes": self.traffic.downlink,
                "uplink-bytes": self.traffic.uplink,
            }
        )
        # Under attack these norms are not those of the task vectors that are aggregated.
        if self._streams and not self.config.byzantine_fraction:
            cosine = mean_pairwise_cosine(norm, norms, examples)
            if cosine is not None:
                metrics["client-cosine"] = cosine
        return metrics
