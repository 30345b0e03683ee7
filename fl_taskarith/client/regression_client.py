"""What a client with regression data answers: sums for federated EM, or a cluster and a step along its gradient.

A message may be to many virtual clients at once (`engine.cohort_messages`); their data are drawn from the seed.
"""

import time

import torch
from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.cohort_messages import addressed
from fl_taskarith.engine.grid import RoundSettings, read_settings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.mixtures.clustering import client_reports
from fl_taskarith.mixtures.expectation_maximisation import expectation, statistics
from fl_taskarith.workspace.regression_data import adversary_of, mixture_of

CPU = torch.device("cpu")


def expectation_step(message: Message, partition: int) -> RecordDict:
    """Answer with each client's likeliest cluster, and Σ_j w_jk X_jᵀX_j, [K, d, d], and Σ_j w_jk X_jᵀy_j, [K, d]."""
    started = time.perf_counter()
    config, current, theta, clients = _read(message, partition)
    points = mixture_of(config).points_of(clients)
    responsibilities, losses = expectation(points, theta, config.noise)
    sums = statistics(points, responsibilities)
    arrays = {"grams": sums.grams, "moments": sums.moments}
    return _reply(arrays, config, current.number, clients, responsibilities.argmax(1), losses, started)


def cluster_step(message: Message, partition: int) -> RecordDict:
    """Answer with the clusters that the g addressed clients pick, and each one's task vector −γ ∇F_j there: [g, d]."""
    started = time.perf_counter()
    config, current, theta, clients = _read(message, partition)
    adversary = adversary_of(config)
    places = torch.tensor(clients)
    magnified = None if adversary.magnified is None else adversary.magnified[places]
    points = adversary.points_of(clients)
    (reports,) = client_reports(points, theta[None], adversary.reported[places][None], magnified)
    arrays = {"theta": reports.gradients * -current.learning_rate}
    return _reply(arrays, config, current.number, clients, reports.clusters, reports.losses, started)


def _read(message: Message, partition: int) -> tuple[Config, RoundSettings, Tensor, list[int]]:
    """Return the settings of the run and the round, θ [K, d], and the addressed clients."""
    config, current = read_settings(message.content.config_records["config"])
    theta = to_tensors(message.content.array_records["arrays"], CPU)["theta"]
    return config, current, theta, addressed(message, partition)


def _reply(
    arrays: dict[str, Tensor],
    config: Config,
    number: int,
    clients: list[int],
    clusters: Tensor,
    losses: Tensor,
    started: float,
) -> RecordDict:
    metrics = MetricRecord(
        {
            "round": number,
            "partitions": clients,
            "clusters": clusters.tolist(),
            "losses": losses.tolist(),
            "num-examples": config.examples_per_client,
            "train-seconds": time.perf_counter() - started,
        }
    )
    return RecordDict({"arrays": to_record(arrays), "metrics": metrics})
