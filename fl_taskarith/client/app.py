"""A client's work on one message: local training, or sums for the head or the mask. `app` is the Flower ClientApp.

A client is stateless but for files that messages name: everything else it needs is in the message, the data set and its
partition id. It knows no strategy: a message with a record "control" is answered as SCAFFOLD asks, and what is trained
but not in the message is the client's own.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_taskarith.client.local_work import (
    MetricValue,
    draw_local_steps,
    keep,
    move_control,
    read_frozen_of,
    read_kept,
    trained_reply,
    training_examples,
)
from fl_taskarith.client.regression_client import cluster_step, expectation_step
from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.engine.grid import RoundSettings, read_settings
from fl_taskarith.engine.node_config import partition_of, use_own_places
from fl_taskarith.engine.records import metric, to_record, to_tensors
from fl_taskarith.engine.replies import CLIENT_ERROR, DIVERGED, LACKS_FROZEN
from fl_taskarith.engine.time_limit import limited
from fl_taskarith.errors import Divergence, FlTaskarithError, FrozenMissing
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS, linear_shapes
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.client_files import CONTROL, MASK, OWN, under, write_frozen
from fl_taskarith.training.corrections import control_shift, correct_gradients
from fl_taskarith.training.local import evaluate, input_square_sums, set_trained, train_locally
from fl_taskarith.training.sparse_sgdm import sgdm
from fl_taskarith.workspace.global_model import Frozen, GlobalModel, Weights
from fl_taskarith.workspace.make_mask import make_mask, shard_sums
from fl_taskarith.workspace.regression_data import mixture_of
from fl_taskarith.workspace.views import as_seen_by
from fl_taskarith.workspace.workspace import Workspace, workspace

app = ClientApp()


def answer(work: Callable[[Message, int], RecordDict], message: Message, context: Context) -> Message:
    """Reply with what `work` returns for this client's partition, or with an error in the client's own words.

    Flower would turn an exception into a reply that its strategies skip over without a word; ours say so or stop.
    """
    try:
        use_own_places(message.content.config_records["config"], context)
        partition, timeout = partition_of(context), _client_timeout(message)
        if timeout:
            load(message)
        return Message(limited(lambda: work(message, partition), timeout), reply_to=message)
    except Divergence as error:
        return Message(Error(DIVERGED, str(error)), reply_to=message)
    except FrozenMissing as error:
        return Message(Error(LACKS_FROZEN, str(error)), reply_to=message)
    except FlTaskarithError as error:
        reason = f"{type(error).__name__}: {error}"
    except Exception as error:  # a bug of ours, or out of memory: the server must hear of it with its origin
        import traceback

        reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)


def load(message: Message) -> None:
    """Have what all messages need: a limit on the client's work does not count it, and must not interrupt it."""
    config, _ = read_settings(message.content.config_records["config"])
    if config.dataset == REGRESSION:
        mixture_of(config)
    else:
        workspace(config)


def _client_timeout(message: Message) -> float:
    return float(message.content.config_records["config"].get("client-timeout", 0.0))  # type: ignore[arg-type]


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
    """J local steps from the global model; replies with the task vector τ = θ_k − θ of what was sent."""
    return _train_locally(message.content, partition)


def train_in_cluster(message: Message, partition: int) -> RecordDict:
    """J local steps from the one of K models, stacked in the message, that has the least loss on this client's shard.

    Replies with the cluster and the task vector of its model, [1, ...] per tensor.
    """
    started = time.perf_counter()
    _, home, stacked, frozen = _received(message)
    config = home.config
    examples, positions = training_examples(home, partition)
    own = examples.take(positions)
    losses = []
    for cluster in range(config.num_clusters):
        home.place(GlobalModel({name: value[cluster] for name, value in stacked.items()}, frozen))
        measured = evaluate(
            home.network, own, home.preprocessing, batch_size=home.evaluation_batch, precision=config.precision
        )
        losses.append(measured.loss)
    chosen = losses.index(min(losses))
    model = {name: value[chosen] for name, value in stacked.items()}
    choosing_seconds = time.perf_counter() - started
    reply = _train_locally(RecordDict({**message.content, "arrays": to_record(model)}), partition)
    task_vector = to_tensors(reply.array_records["arrays"], home.device)
    metrics = reply.metric_records["metrics"]
    told: dict[str, MetricValue] = {
        "partitions": [partition],
        "clusters": [chosen],
        "losses": [metric(metrics, "train-loss")],
    }
    metrics.update(told)
    metrics["train-seconds"] = metric(metrics, "train-seconds") + choosing_seconds
    reply["arrays"] = to_record({name: value[None] for name, value in task_vector.items()})
    return reply


def _train_locally(content: RecordDict, partition: int) -> RecordDict:
    started = time.perf_counter()
    config, current = read_settings(content.config_records["config"])
    home = workspace(config)
    received = {key: to_tensors(record, home.device) for key, record in content.array_records.items()}
    shared, control = received["arrays"], received.get("control")
    frozen = read_frozen_of(home, current)
    kept = read_kept(current, partition, home.device)
    trained = _with_own(home, shared, kept, frozen, current.number)
    mask, new_mask = frozen.mask, Weights()
    if config.mask_source == "own" and current.number > config.head_rounds:
        mask, new_mask = _own_mask(home, frozen, kept, partition)
    home.place(GlobalModel(trained, frozen))
    if mask is not frozen.mask:
        assert mask is not None
        trained = shared = mask.gather(trained)
    names = list(trained)
    parameters = dict(zip(names, set_trained(home.model, names), strict=True))
    examples, shard = training_examples(home, partition)
    local_steps = draw_local_steps(config, current.number, partition)
    optimizer = sgdm(parameters.items(), config, current.learning_rate, mask)
    if config.proximal_mu or control is not None:
        correct_gradients(
            optimizer,
            parameters,
            None if mask is None else mask.indices,
            start=trained,
            proximal_mu=config.proximal_mu,
            shift=None if control is None else control_shift(control, under(CONTROL, kept)),
        )
    train_loss = train_locally(
        home.compiled_network,
        examples,
        shard,
        optimizer,
        home.preprocessing,
        local_steps=local_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        generator=random_generator(config.seed, "local training", current.number, partition),
        loss_name=config.local_loss,
        logit_scale=current.logit_scale,
    )
    with torch.no_grad():  # in the model's own storage: the next client loads its weights anew
        ends = parameters if mask is None else mask.gather(home.parameters)
        keeps = {OWN + name: ends[name].detach().clone() for name in names if name not in shared}
        task_vector = {name: ends[name].detach().sub_(start) for name, start in shared.items()}
    reply = trained_reply(config, current, task_vector, len(shard), train_loss, local_steps)
    if new_mask:
        reply["mask"] = to_record(new_mask)
        keeps |= {MASK + name: value for name, value in new_mask.items()}
    if control is not None:
        keeps |= move_control(reply, config, current, control, kept, task_vector, local_steps)
    keep(reply, current, partition, keeps)
    reply.metric_records["metrics"]["train-seconds"] = time.perf_counter() - started
    return reply


def score_sensitivity(message: Message, partition: int) -> RecordDict:
    """Summed squared per-example gradients on this shard, or on `calibration-per-client` of its examples."""
    started = time.perf_counter()
    config, current = read_settings(message.content.config_records["config"])
    home = workspace(config)
    arrays = to_tensors(message.content.array_records["arrays"], torch.device("cpu"))
    asked = Frozen.of_tensors(arrays, home.shapes, home.device)
    assert asked.mask is not None
    sums, examples = shard_sums(home, asked.weights, partition)(current.number, asked.mask)
    metrics: dict[str, MetricValue] = {"num-examples": examples, "train-seconds": time.perf_counter() - started}
    return RecordDict({"arrays": to_record(sums), "metrics": MetricRecord(metrics)})


def ridge_statistics(message: Message, partition: int) -> RecordDict:
    """This shard's sums for the ridge head, without augmentation.

    The features are those of the backbone in the message, or of the pretrained one where it has none.
    """
    started = time.perf_counter()
    _, home, trained, frozen = _received(message)
    config = home.config
    home.place(GlobalModel(trained, frozen))
    shard = as_seen_by(config, partition, home.data.train.take(home.shards[partition]))
    statistics = RidgeStatistics.of(home.features(shard), shard.labels, len(home.data.dataset.classes))
    metrics: dict[str, MetricValue] = {"num-examples": len(shard), "train-seconds": time.perf_counter() - started}
    return RecordDict({"arrays": to_record(statistics.tensors()), "metrics": MetricRecord(metrics)})


def gram_diagonals(message: Message, partition: int) -> RecordDict:
    """Σ x_j² of the inputs to each trained linear layer over this shard, under the model in the message."""
    started = time.perf_counter()
    _, home, trained, frozen = _received(message)
    config = home.config
    home.place(GlobalModel(trained, frozen))
    shard = as_seen_by(config, partition, home.data.train.take(home.shards[partition]))
    layers = linear_shapes(home.model, trained)
    sums = input_square_sums(home.model, list(layers), home.network, shard, home.preprocessing, home.evaluation_batch)
    metrics: dict[str, MetricValue] = {"num-examples": len(shard), "train-seconds": time.perf_counter() - started}
    return RecordDict({"arrays": to_record(sums), "metrics": MetricRecord(metrics)})


def evaluate_own(message: Message, partition: int) -> RecordDict:
    """Accuracy of this client's own model, and of the global one, on the images of its shard's classes."""
    started = time.perf_counter()
    current, home, shared, frozen = _received(message)
    config = home.config
    kept = read_kept(current, partition, home.device)
    classes = home.data.train.labels[home.shards[partition]].unique()
    metrics: dict[str, MetricValue] = {"num-examples": len(home.shards[partition]), "num-classes": len(classes)}
    for model, state in (("own", kept), ("global", {})):
        home.place(GlobalModel(_with_own(home, shared, state, frozen, current.number), frozen))
        for split, images in (("val", home.data.validation), ("test", home.data.test)):
            own_images = images.take(torch.isin(images.labels, classes).nonzero().flatten())
            own_images = as_seen_by(config, partition, own_images)
            measured = evaluate(
                home.network,
                own_images,
                home.preprocessing,
                batch_size=home.evaluation_batch,
                precision=config.precision,
            )
            metrics[f"{split}-examples"] = measured.examples
            metrics[f"{model}-{split}-accuracy"] = measured.accuracy
    metrics["evaluate-seconds"] = time.perf_counter() - started
    return RecordDict({"metrics": MetricRecord(metrics)})


def _received(message: Message) -> tuple[RoundSettings, Workspace, Weights, Frozen]:
    """What a message says and brings: the round's settings, the resident of its run, its tensors, and what is fixed."""
    config, current = read_settings(message.content.config_records["config"])
    home = workspace(config)
    arrays = to_tensors(message.content.array_records["arrays"], home.device)
    return current, home, arrays, read_frozen_of(home, current)


def _with_own(home: Workspace, shared: Weights, kept: Weights, frozen: Frozen, server_round: int) -> Weights:
    """All that is trained, in the model's order: what was sent, else the client's own of its last round, else θ₀."""
    names = list(home.trained_names(server_round) if frozen.mask is None else frozen.mask.indices)
    if shared.keys() >= set(names):
        return shared
    start = home.pretrained if frozen.mask is None else frozen.mask.gather(home.pretrained)
    own = start | under(OWN, kept)
    return {name: shared[name] if name in shared else own[name] for name in names}


def _own_mask(home: Workspace, frozen: Frozen, kept: Weights, partition: int) -> tuple[Mask, Weights]:
    """This client's mask, by the scores of its own shard, and its bits if it was made only now."""
    if kept_bits := under(MASK, kept):
        # In the model's order, not the file's: norms over tensors are to have the same bits whenever it is read.
        packed = {name: kept_bits[name] for name in home.shapes if name in kept_bits}
        return Mask.unpacked(packed, home.shapes).to(home.device), {}
    head = {name: (home.pretrained | frozen.weights)[name] for name in HEAD_PARAMETERS}
    mask = make_mask(home, shard_sums(home, head, partition)).mask
    return mask, mask.packed()


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


@app.query("gram")
def on_gram(message: Message, context: Context) -> Message:
    """The client's diagonal Grams of the linear layers."""
    return answer(gram_diagonals, message, context)


@app.query("frozen")
def on_frozen(message: Message, context: Context) -> Message:
    """What stays fixed in the rounds to come."""
    return answer(keep_frozen, message, context)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    """Accuracy of the client's own model."""
    return answer(evaluate_own, message, context)


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """J local steps; the reply carries the task vector."""
    return answer(train, message, context)


@app.train("cluster")
def on_train_in_cluster(message: Message, context: Context) -> Message:
    """J local steps from the cluster model that fits best."""
    return answer(train_in_cluster, message, context)


@app.train("expectation")
def on_expectation(message: Message, context: Context) -> Message:
    """The E-step on regression data; the reply carries additive sums."""
    return answer(expectation_step, message, context)


@app.train("cluster_step")
def on_cluster_step(message: Message, context: Context) -> Message:
    """A step along the gradient of the cluster model that fits best; the reply carries the cluster too."""
    return answer(cluster_step, message, context)
