"""What a client answers beside training: sums for the head, the mask and Grams, and the accuracy of its own model."""

import time
from pathlib import Path

import torch
from flwr.app import Message, MetricRecord, RecordDict

from fl_taskarith.client.local_training import all_trained
from fl_taskarith.client.local_work import MetricValue, Work
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_tensors
from fl_taskarith.models.backbone import linear_shapes
from fl_taskarith.models.heads import RidgeStatistics
from fl_taskarith.storage.client_files import write_frozen
from fl_taskarith.training.local import input_square_sums
from fl_taskarith.workspace.global_model import Frozen, GlobalModel
from fl_taskarith.workspace.make_mask import shard_sums
from fl_taskarith.workspace.views import as_seen_by


def tell_partition(message: Message, partition: int) -> RecordDict:
    """Reply with the partition that this client holds."""
    return RecordDict({"metrics": MetricRecord({"partition-id": partition})})


def keep_frozen(message: Message, partition: int) -> RecordDict:
    """Keep the frozen head and the mask for the rounds to come."""
    _, current = read_settings(message.content.config_records["config"])
    tensors = to_tensors(message.content.array_records["arrays"], torch.device("cpu"))
    write_frozen(Path(current.state_folder), current.frozen_name, tensors)
    return RecordDict({"metrics": MetricRecord({"partition-id": partition, "round": current.number})})


def score_sensitivity(message: Message, partition: int) -> RecordDict:
    """Reply with summed squared per-example gradients on this shard, or on `calibration-per-client` of its examples."""
    work = Work(message.content, partition)
    alive = Frozen.of_tensors(work.received["arrays"], work.home.shapes, work.home.device)
    assert alive.mask is not None
    sums, examples = shard_sums(work.home, alive.weights, partition)(work.current.number, alive.mask)
    return work.reply(dict(sums), examples)


def ridge_statistics(message: Message, partition: int) -> RecordDict:
    """Reply with this shard's sums for the ridge head, without augmentation.

    The features are those of the backbone in the message, or of the pretrained one where it has none.
    """
    work = _placed(message, partition)
    features, classes = work.home.features(work.shard), work.home.data.dataset.classes
    return work.reply(RidgeStatistics.of(features, work.shard.labels, len(classes)).tensors(), len(work.shard))


def gram_diagonals(message: Message, partition: int) -> RecordDict:
    """Reply with Σ x_j² of the inputs to each trained linear layer over this shard, under the model in the message."""
    work = _placed(message, partition)
    home, names = work.home, list(linear_shapes(work.home.model, work.received["arrays"]))
    sums = input_square_sums(home.model, names, home.network, work.shard, home.preprocessing, home.evaluation_batch)
    return work.reply(sums, len(work.shard))


def evaluate_own(message: Message, partition: int) -> RecordDict:
    """Reply with the accuracy of this client's own model, and of the global one, on the images of its classes."""
    work = Work(message.content, partition)
    home, data = work.home, work.home.data
    shard = home.shards[partition]
    classes = data.train.labels[shard].unique()
    metrics: dict[str, MetricValue] = {"num-examples": len(shard), "num-classes": len(classes), **work.origin}
    for model, state in (("own", work.state), ("global", {})):
        home.place(GlobalModel(all_trained(work, work.received["arrays"], state), work.frozen))
        for split, images in (("val", data.validation), ("test", data.test)):
            own_images = images.take(torch.isin(images.labels, classes).nonzero().flatten())
            measured = home.evaluate(as_seen_by(work.config, partition, own_images))
            metrics[f"{split}-examples"] = measured.examples
            metrics[f"{model}-{split}-accuracy"] = measured.accuracy
    metrics["evaluate-seconds"] = time.perf_counter() - work.started
    return RecordDict({"metrics": MetricRecord(metrics)})


def _placed(message: Message, partition: int) -> Work:
    """Return the work of a message whose model has been loaded."""
    work = Work(message.content, partition)
    work.home.place(GlobalModel(work.received["arrays"], work.frozen))
    return work
