"""What a client's local steps need of a message, and what it answers, whether it trains alone or with others."""

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.engine.grid import RoundSettings
from fl_taskarith.engine.records import to_record
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import CONTROL, read_client_state, read_frozen, under, write_client_state
from fl_taskarith.training.corrections import control_change
from fl_taskarith.training.schedules import step_coefficient_sum
from fl_taskarith.workspace.global_model import Frozen, Weights
from fl_taskarith.workspace.views import as_trained_on
from fl_taskarith.workspace.workspace import Workspace

MetricValue = int | float | list[int] | list[float]


def read_frozen_of(home: Workspace, current: RoundSettings) -> Frozen:
    """What is fixed in this round, as its settings name it."""
    return _frozen(current.state_folder, current.frozen_name, tuple(home.shapes.items()), home.device)


@lru_cache(maxsize=1)
def _frozen(folder: str, name: str, shapes: tuple[tuple[str, torch.Size], ...], device: torch.device) -> Frozen:
    """What is fixed in this round, on the device: read once per process."""
    return Frozen.of_tensors(read_frozen(Path(folder), name), dict(shapes), device)


def read_kept(current: RoundSettings, partition: int, device: torch.device) -> Weights:
    """What this client keeps between rounds, as the message names it."""
    kept = read_client_state(Path(current.state_folder), partition, current.state_name)
    return {name: value.to(device) for name, value in kept.items()}


def keep(reply: RecordDict, current: RoundSettings, partition: int, tensors: Weights) -> None:
    """Write what this client keeps, if anything, and have `reply` name the file."""
    if tensors:
        written = write_client_state(Path(current.state_folder), partition, current.number, tensors)
        reply["state"] = ConfigRecord({"name": written})


def move_control(
    reply: RecordDict,
    config: Config,
    current: RoundSettings,
    control: Weights,
    kept: Weights,
    task_vector: Weights,
    local_steps: int,
) -> Weights:
    """Have `reply` carry c_k⁺ − c_k; the new c_k, as it is kept."""
    path = current.learning_rate * step_coefficient_sum(config, local_steps, current.learning_rate)
    change = control_change(control, task_vector, path)
    reply["control"] = to_record(change)
    own = under(CONTROL, kept)
    return {CONTROL + name: own[name] + value if name in own else value for name, value in change.items()}


def training_examples(home: Workspace, partition: int) -> tuple[ImageSet, Tensor]:
    """What a client trains on, and its shard's positions in it: its own view of images, or all of them as stored."""
    config, train, shard = home.config, home.data.train, home.shards[partition]
    if config.client_groups == "none" and not (config.byzantine_fraction and config.attack == "random-labels"):
        return train, shard
    own = as_trained_on(config, partition, train.take(shard), len(home.data.dataset.classes))
    return own, torch.arange(len(shard), device=shard.device)


def draw_local_steps(config: Config, server_round: int, partition: int) -> int:
    """J, or this client's own number of steps this round, uniform on local-steps-min..max where they are set."""
    if not config.local_steps_max:
        return config.local_steps
    generator = random_generator(config.seed, "local steps", server_round, partition)
    return int(generator.integers(config.local_steps_min, config.local_steps_max + 1))


def trained_reply(
    config: Config, current: RoundSettings, task_vector: Weights, examples: int, train_loss: float, local_steps: int
) -> RecordDict:
    """What a client says after its local steps, but for how long it took ("train-seconds")."""
    metrics: dict[str, MetricValue] = {
        "num-examples": examples,
        "train-loss": train_loss,
        "update-norm": task_vector_norm(task_vector),
        "local-steps": local_steps,
        "step-coefficient-sum": step_coefficient_sum(config, local_steps, current.learning_rate),
    }
    return RecordDict(
        {
            "arrays": to_record(task_vector),
            "frozen": ConfigRecord({"name": current.frozen_name}),
            "metrics": MetricRecord(metrics),
        }
    )
