"""What a client with regression data answers: sums for federated EM, or a cluster and a step along its gradient.

A message may be to many virtual clients at once (`engine.cohorts`); their data are made anew from the seed each time.
"""

import time

import torch
from flwr.app import Message, MetricRecord, RecordDict

from fl_taskarith.engine.cohort_messages import addressed
from fl_taskarith.engine.grid import read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.mixtures.clustering import client_reports
from fl_taskarith.mixtures.expectation_maximisation import expectation, statistics
from fl_taskarith.workspace.regression_data import adversary_of, mixture_of

CPU = torch.device("cpu")


def expectation_step(message: Message, partition: int) -> RecordDict:
    """Responsibilities of the addressed clients, and Σ_j w_jk X_jᵀX_j and Σ_j w_jk X_jᵀy_j over them."""
    started = time.perf_counter()
    config, _ = read_settings(message.content.config_records["config"])
    theta = to_tensors(message.content.array_records["arrays"], CPU)["theta"]
    clients = addressed(message, partition)
    points = mixture_of(config).points_of(clients)
    responsibilities, losses = expectation(points, theta, config.noise)
    sums = statistics(points, responsibilities)
    metrics = MetricRecord(
        {
            "partitions": clients,
            "clusters": responsibilities.argmax(1).tolist(),
            "losses": losses.tolist(),
            "num-examples": config.examples_per_client,
            "train-seconds": time.perf_counter() - started,
        }
    )
    return RecordDict({"arrays": to_record({"grams": sums.grams, "moments": sums.moments}), "metrics": metrics})


def cluster_step(message: Message, partition: int) -> RecordDict:
    """The clusters that the addressed clients pick, and the task vector −γ ∇F_j of each one's own model: [g, d]."""
    started = time.perf_counter()
    config, current = read_settings(message.content.config_records["config"])
    theta = to_tensors(message.content.array_records["arrays"], CPU)["theta"]
    clients = addressed(message, partition)
    adversary = adversary_of(config)
    places = torch.tensor(clients)
    magnified = None if adversary.magnified is None else adversary.magnified[places]
    points = adversary.points_of(clients)
    (told,) = client_reports(points, theta[None], adversary.reported[places][None], magnified)
    metrics = MetricRecord(
        {
            "partitions": clients,
            "clusters": told.clusters.tolist(),
            "losses": told.losses.tolist(),
            "num-examples": config.examples_per_client,
            "train-seconds": time.perf_counter() - started,
        }
    )
    return RecordDict({"arrays": to_record({"theta": told.gradients * -current.learning_rate}), "metrics": metrics})
