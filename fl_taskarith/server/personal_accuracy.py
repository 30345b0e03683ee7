"""Accuracy of clients that keep some of their parameters to themselves: each client's own model, on its own classes."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from flwr.app import Message

from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.question import EXAMPLES, SECONDS, SHARE, Question, Range
from fl_taskarith.engine.replies import Failures, complaint
from fl_taskarith.storage.files import write_atomically
from fl_taskarith.workspace.workspace import Data

CPU = torch.device("cpu")
MODELS = ("own", "global")
SPLITS = ("val", "test")
COLUMNS = (
    *("client", "num_examples", "num_classes", "val_examples", "test_examples"),
    *(f"{model}_{split}_accuracy" for split in SPLITS for model in MODELS),
)


def own_accuracies(data: Data) -> dict[str, Range]:
    """Return where the numbers of a client's reply must lie, by metric."""
    return {
        "num-examples": EXAMPLES,
        "num-classes": Range(1, len(data.dataset.classes), whole=True),
        "val-examples": Range(0, len(data.validation), whole=True),
        "test-examples": Range(0, len(data.test), whole=True),
        **{name.replace("_", "-"): SHARE for name in COLUMNS if name.endswith("accuracy")},
        "evaluate-seconds": SECONDS,
    }


def evaluate_clients(
    grid: PartitionGrid, messages: Iterable[Message], path: Path, failures: Failures, question: Question
) -> dict[str, float]:
    """Ask the clients that `messages` are for, write `path` with a row per client, and return means over clients.

    Every client counts alike. Test images are those of the client's classes; the answer may still be any class. "own"
    is the client's model, "global" the one that all share, with the parameters that none shares as pretrained. Nothing
    is written, and the result is empty, without messages.

    Args:
        question: what every client was asked; its numbers are `own_accuracies`.

    Raises:
        ClientFailure: a client raised, or did not answer (by `on-client-failure`).
        CheckpointError: the file cannot be written.
    """

    def read(reply: Message) -> dict[str, float]:
        numbers = question.read(reply, CPU, failures.most_seconds).numbers
        values = {name: numbers[name.replace("_", "-")] for name in COLUMNS[1:]}
        for name in COLUMNS:
            if name.endswith("accuracy") and math.isnan(values[name]) != (not values[f"{name.split('_')[1]}_examples"]):
                raise complaint(reply, f"whose {name} is {values[name]:g}: it is NaN without images, and only then")
        return {"client": reply.metadata.src_node_id, **values}

    rows = list(failures.read(grid.exchange(messages), read))
    if not rows:
        return {}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: value if name.endswith("accuracy") else int(value) for name, value in row.items()})
    write_atomically(path, text.getvalue())
    return {name: fmean(measured) for name in COLUMNS if name.endswith("accuracy")
            if (measured := [row[name] for row in rows if not math.isnan(row[name])])}  # fmt: skip
