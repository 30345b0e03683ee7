"""A client's work on one message: local training, or the sums for the ridge head. `app` is the Flower ClientApp.

A client is stateless: everything it needs is in the message, the data set and its partition id.
"""

import time
from collections.abc import Callable

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_taskarith.config import Config
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.errors import FlTaskarithError
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


def train(message: Message, partition: int) -> RecordDict:
    """J local steps from the global weights in the message; replies with the task vector τ = θ_k − θ."""
    started = time.perf_counter()
    config, current = read_settings(message.content.config_records["config"])
    home = resident(config)
    weights = to_tensors(message.content.array_records["arrays"], home.device)
    home.load(weights)
    names = home.trained_names(current.number)
    parameters = set_trained(home.model, names)
    shard = home.shards[partition]
    local_steps = draw_local_steps(config, current.number, partition)
    train_loss = train_locally(
        home.model,
        home.data.train,
        shard,
        sgdm(parameters, config, current.learning_rate),
        home.preprocessing,
        local_steps=local_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        generator=random_generator(config.seed, "local training", current.number, partition),
    )
    with torch.no_grad():  # in the model's own storage: the next client loads its weights anew
        task_vector = {name: parameter.sub_(weights[name]) for name, parameter in zip(names, parameters, strict=True)}
    metrics: dict[str, MetricValue] = {
        "num-examples": len(shard),
        "train-loss": train_loss,
        "local-steps": local_steps,
        "train-seconds": time.perf_counter() - started,
    }
    return RecordDict({"arrays": to_record(task_vector), "metrics": MetricRecord(metrics)})


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


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """J local steps; the reply carries the task vector."""
    return answer(train, message, context)
