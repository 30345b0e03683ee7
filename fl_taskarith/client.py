"""A client's work on one message: local training, or sums for the head or the mask. `app` is the Flower ClientApp.

A client is stateless but for files that messages name: everything else it needs is in the message, the data set and its
partition id.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_taskarith.calibrate import shard_sums
from fl_taskarith.client_state import read_frozen, write_frozen
from fl_taskarith.config import Config
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.global_model import Frozen, GlobalModel
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.optim import sgdm
from fl_taskarith.resident import resident
from fl_taskarith.seeding import random_generator
from fl_taskarith.training import set_trained, train_locally

app = ClientApp()

MetricValue = int | float | list[int] | list[float]

CLIENT_ERROR = 100  # code of our error replies; Flower's own codes are below


def answer(work: Callable[[Message, int], RecordDict], message: Message, context: Context) -> Message:
    """Reply with what `work` returns for this client's partition, or with an error in the client's own words.

    Flower would turn an exception into a reply that its strategies skip over; ours stop the run on it.
    """
    try:
        return Message(work(message, int(context.node_config["partition-id"])), reply_to=message)
    except FlTaskarithError as error:
        reason = f"{type(error).__name__}: {error}"
    except Exception as error:  # a bug of ours, or out of memory: the server must hear of it with its origin
        import traceback

        reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)


def tell_partition(message: Message, partition: int) -> RecordDict:
    """Which partition this client holds."""
    return RecordDict({"metrics": MetricRecord({"partition-id": partition})})


def keep_frozen(message: Message, partition: int) -> RecordDict:
    """Keep the frozen head and the mask for the rounds to come."""
    _, current = read_settings(message.content.config_records["config"])
    tensors = to_tensors(message.content.array_records["arrays"], torch.device("cpu"))
    write_frozen(Path(current.state_folder), current.frozen_name, tensors)
    return RecordDict({"metrics": MetricRecord({"partition-id": partition})})


def train(message: Message, partition: int) -> RecordDict:
    """J local steps from the global model; replies with the task vector τ = θ_k − θ of what is trained."""
    started = time.perf_counter()
    config, current = read_settings(message.content.config_records["config"])
    home = resident(config)
    trained = to_tensors(message.content.array_records["arrays"], home.device)
    frozen = _frozen(current.state_folder, current.frozen_name, tuple(home.shapes.items()), home.device)
    home.place(GlobalModel(trained, frozen))
    names = list(trained)
    parameters = set_trained(home.model, names)
    shard = home.shards[partition]
    local_steps = draw_local_steps(config, current.number, partition)
    train_loss = train_locally(
        home.compiled_network,
        home.data.train,
        shard,
        sgdm(zip(names, parameters, strict=True), config, current.learning_rate, frozen.mask),
        home.preprocessing,
        local_steps=local_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        generator=random_generator(config.seed, "local training", current.number, partition),
    )
    with torch.no_grad():  # in the model's own storage: the next client loads its weights anew
        ends = dict(zip(names, parameters, strict=True)) if frozen.mask is None else frozen.mask.gather(home.parameters)
        task_vector = {name: end.detach().sub_(trained[name]) for name, end in ends.items()}
    metrics: dict[str, MetricValue] = {
        "num-examples": len(shard),
        "train-loss": train_loss,
        "update-norm": task_vector_norm(task_vector),
        "local-steps": local_steps,
        "train-seconds": time.perf_counter() - started,
    }
    return RecordDict({"arrays": to_record(task_vector), "metrics": MetricRecord(metrics)})


def score_sensitivity(message: Message, partition: int) -> RecordDict:
    """Summed squared per-example gradients on this shard, or on `calibration-per-client` of its examples."""
    started = time.perf_counter()
    config, current = read_settings(message.content.config_records["config"])
    home = resident(config)
    arrays = to_tensors(message.content.array_records["arrays"], torch.device("cpu"))
    asked = Frozen.of_tensors(arrays, home.shapes, home.device)
    assert asked.mask is not None
    sums, examples = shard_sums(home, asked.weights, partition)(current.number, asked.mask)
    metrics: dict[str, MetricValue] = {"num-examples": examples, "train-seconds": time.perf_counter() - started}
    return RecordDict({"arrays": to_record(sums), "metrics": MetricRecord(metrics)})


def ridge_statistics(message: Message, partition: int) -> RecordDict:
    """This shard's sums for the ridge head, from features of the pretrained backbone without augmentation."""
    started = time.perf_counter()
    config, _ = read_settings(message.content.config_records["config"])
    home = resident(config)
    home.load(home.pretrained)
    shard = home.data.train.take(home.shards[partition])
    statistics = RidgeStatistics.of(home.features(shard), shard.labels, len(home.data.dataset.classes))
    metrics: dict[str, MetricValue] = {"num-examples": len(shard), "train-seconds": time.perf_counter() - started}
    return RecordDict({"arrays": to_record(statistics.tensors()), "metrics": MetricRecord(metrics)})


@lru_cache(maxsize=1)
def _frozen(folder: str, name: str, shapes: tuple[tuple[str, torch.Size], ...], device: torch.device) -> Frozen:
    """What is fixed in this round, on the device: read once per process."""
    return Frozen.of_tensors(read_frozen(Path(folder), name), dict(shapes), device)


def draw_local_steps(config: Config, server_round: int, partition: int) -> int:
    """J, or this client's own number of steps this round, uniform on local-steps-min..max where they are set."""
    if not config.local_steps_max:
        return config.local_steps
    generator = random_generator(config.seed, "local steps", server_round, partition)
    return int(generator.integers(config.local_steps_min, config.local_steps_max + 1))


@app.query("partition")
def on_partition(message: Message, context: Context) -> Message:
    """Which partition this client holds."""
    return answer(tell_partition, message, context)


@app.query("ridge")
def on_ridge(message: Message, context: Context) -> Message:
    """The client's sums for the federated ridge head."""
    return answer(ridge_statistics, message, context)


@app.query("sensitivity")
def on_sensitivity(message: Message, context: Context) -> Message:
    """The client's scores for a mask that clients choose together."""
    return answer(score_sensitivity, message, context)


@app.query("frozen")
def on_frozen(message: Message, context: Context) -> Message:
    """What stays fixed in the rounds to come."""
    return answer(keep_frozen, message, context)


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """J local steps; the reply carries the task vector."""
    return answer(train, message, context)
