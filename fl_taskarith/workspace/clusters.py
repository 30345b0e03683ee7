"""K models of the same image network in one: every trained tensor has a first dimension of clusters, [K, ...]."""

import torch

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.seeding import random_generator
from fl_taskarith.workspace.global_model import GlobalModel, Weights


def start_clusters(config: Config, trained: Weights) -> Weights:
    """Return K copies of `trained`, [K, ...] each, with Gaussian noise added; `trained` itself without clusters.

    Equal models would stay equal, for all clients would pick the first. The noise has standard deviation
    `cluster-start-noise` times the root mean square of each tensor.
    """
    if not clustered(config):
        return trained
    copies: list[Weights] = []
    for cluster in range(config.num_clusters):
        generator = random_generator(config.seed, "cluster start", client=cluster)
        moved = {}
        for name, value in trained.items():
            drawn = torch.from_numpy(generator.standard_normal(tuple(value.shape))).to(value)
            moved[name] = value + config.cluster_start_noise * value.square().mean().sqrt() * drawn
        copies.append(moved)
    return {name: torch.stack([copy[name] for copy in copies]) for name in trained}


def split_clusters(config: Config, model: GlobalModel) -> list[GlobalModel]:
    """Return the K models of a global one, [K, ...] per tensor, as views; the model itself without clusters."""
    if not clustered(config):
        return [model]
    return [
        GlobalModel({name: value[cluster] for name, value in model.trained.items()}, model.frozen)
        for cluster in range(config.num_clusters)
    ]


def clustered(config: Config) -> bool:
    """Whether the global model of images is K models."""
    return config.strategy == "br-ifca" and config.dataset != REGRESSION
