"""What a client has for one message, and how it answers: the same whether it trains alone or with others."""

import time
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import ANCHOR, CONTROL, read_frozen, under
from fl_taskarith.training.corrections import control_change, control_shift, momentum_of_visits, momentum_shift
from fl_taskarith.training.schedules import draw_local_steps, step_coefficient_sum
from fl_taskarith.training.stacked import ClientData
from fl_taskarith.workspace.global_model import Frozen, Weights
from fl_taskarith.workspace.views import as_seen_by, as_trained_on
from fl_taskarith.workspace.workspace import Workspace, workspace

ANCHORS = {"local-ghbm": "start", "fedhbm": "end"}  # the weights of a visit that a client's momentum is measured from
MetricValue = int | float | list[int] | list[float]


class Work:
    """One message to one client.

    Attributes:
        home: the workspace of the run.
        current: what the message says about the round.
        received: the message's tensors on the device, by the key of their record; "arrays" are the global ones.
    """

    def __init__(self, content: RecordDict, partition: int) -> None:
        self.started = time.perf_counter()
        self.partition = partition
        config, self.current = read_settings(content.config_records["config"])
        self.home: Workspace = workspace(config)
        self.config: Config = self.home.config
        self.received = {key: to_tensors(record, self.home.device) for key, record in content.array_records.items()}

    @cached_property
    def frozen(self) -> Frozen:
        """The frozen tensors, in their shapes, and the mask of this round, as its settings name them."""
        current, home = self.current, self.home
        return _frozen(current.state_folder, current.frozen_name, tuple(home.shapes.items()), home.device)

    @cached_property
    def state(self) -> Weights:
        """What this client keeps between rounds, in the shapes in which it was written, as the message names it."""
        folder = Path(self.current.state_folder)
        return self.home.client_states.read(folder, self.partition, self.current.state_name)

    @cached_property
    def shard(self) -> ImageSet:
        """The images [n, C, H, W] of this client's shard as it sees them."""
        data, positions = self.home.data, self.home.shards[self.partition]
        return as_seen_by(self.config, self.partition, data.train.take(positions))

    @cached_property
    def local_steps(self) -> int:
        """The number of local steps."""
        return draw_local_steps(self.config, self.current.number, self.partition)

    def training_data(self) -> ClientData:
        """Return what the client trains on: its own view of images, or positions in all images as they are stored."""
        config, train, shard = self.config, self.home.data.train, self.home.shards[self.partition]
        generator = random_generator(config.seed, "local training", self.current.number, self.partition)
        if config.client_groups == "none" and not (config.byzantine_fraction and config.attack == "random-labels"):
            return ClientData(train, shard, generator)
        own = as_trained_on(config, self.partition, train.take(shard), len(self.home.data.dataset.classes))
        return ClientData(own, torch.arange(len(shard), device=shard.device), generator)

    @cached_property
    def step_coefficient_sum(self) -> float:
        """‖a‖₁, the number of plain SGD steps that this round's steps amount to."""
        return step_coefficient_sum(self.config, self.local_steps, self.current.learning_rate)

    @property
    def path(self) -> float:
        """η‖a‖₁, the length of this round's way in units of the gradient."""
        return self.current.learning_rate * self.step_coefficient_sum

    def gradient_shift(self, shared: Weights) -> Weights | None:
        """Return what is added to the gradient in every local step, in the shapes of `shared`; None for nothing."""
        if (control := self.received.get("control")) is not None:
            return control_shift(control, under(CONTROL, self.state))
        momentum = self.received.get("momentum")
        if self.config.strategy in ANCHORS:
            share = self.config.sampled_clients / self.config.num_clients
            momentum = momentum_of_visits(under(ANCHOR, self.state), shared, share)
        if momentum is None or not self.path:
            return None
        return momentum_shift(momentum, self.config.server_momentum, self.path)

    @property
    def origin(self) -> dict[str, MetricValue]:
        """Whose reply it is, and to which round: the server compares both with what it asked for."""
        return {"partition-id": self.partition, "round": self.current.number}

    def reply(self, arrays: Weights | None, examples: int, **metrics: MetricValue) -> RecordDict:
        """Return a reply with these tensors, of any shape, and metrics; it states the seconds since the start."""
        values: dict[str, MetricValue] = {name.replace("_", "-"): value for name, value in metrics.items()}
        values |= {"num-examples": examples, "train-seconds": time.perf_counter() - self.started, **self.origin}
        records = {} if arrays is None else {"arrays": to_record(arrays)}
        return RecordDict({**records, "metrics": MetricRecord(values)})

    @torch.no_grad()
    def trained_reply(self, shared: Weights, ends: Weights, keeps: Weights, train_loss: float) -> RecordDict:
        """Return the reply after local steps, and write what the client keeps.

        Args:
            shared: the tensors that were sent, in the shapes of the task vector.
            ends: the trained tensors, detached, in the same shapes; the task vector overwrites those of `shared`.
            keeps: what else the client keeps, of any shape.
        """
        if anchor := ANCHORS.get(self.config.strategy):
            kept = {"start": shared, "end": ends}[anchor]
            keeps |= {ANCHOR + name: kept[name].clone() for name in shared}
        task_vector = {name: ends[name].sub_(start) for name, start in shared.items()}
        reply = self.reply(
            task_vector,
            len(self.home.shards[self.partition]),
            train_loss=train_loss,
            step_coefficient_sum=self.step_coefficient_sum,
        )
        reply["frozen"] = ConfigRecord({"name": self.current.frozen_name})
        if (control := self.received.get("control")) is not None:
            change = control_change(control, task_vector, self.path)
            reply["control"] = to_record(change)
            own = under(CONTROL, self.state)
            keeps |= {CONTROL + name: own[name] + value if name in own else value for name, value in change.items()}
        if keeps:
            folder = Path(self.current.state_folder)
            written = self.home.client_states.write(folder, self.partition, self.current.number, keeps)
            reply["state"] = ConfigRecord({"name": written})
        return reply


@lru_cache(maxsize=1)
def _frozen(folder: str, name: str, shapes: tuple[tuple[str, torch.Size], ...], device: torch.device) -> Frozen:
    """Read what is frozen, on the device; once per process."""
    return Frozen.of_tensors(read_frozen(Path(folder), name), dict(shapes), device)
