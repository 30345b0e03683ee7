"""What the study of BR-IFCA computes: its grids, and one cell of them."""

import math
from dataclasses import dataclass
from itertools import product

import torch

from fl_taskarith.config.choices import CLUSTER_RULES
from fl_taskarith.mixtures.adversary import Adversary
from fl_taskarith.mixtures.clustering import client_reports
from fl_taskarith.mixtures.matching import cluster_accuracy, mean_matched_distance, mean_nearest_distance
from fl_taskarith.mixtures.regression import Mixture
from fl_taskarith.mixtures.robust_clustering import Server, br_ifca, two_stage
from fl_taskarith.mixtures.studies.cells import Rows
from fl_taskarith.seeding import random_generator

COLUMNS = {"runs": ("method", "beta", "start_distance", "nearest_distance", "matched_distance", "cluster_accuracy")}

# The published setting (arXiv 2306.00638).
CLIENTS_PER_CLUSTER, EXAMPLES, NOISE, STEP, ROUNDS = 40, 100, math.sqrt(0.2), 0.01, 300
CLUSTERS, DIMENSIONS, ALPHAS = (2, 5, 10, 15), (20, 50, 100, 200, 500), (0.05, 0.10)
RADIUS = 0.25  # of the ball around each θ*_k that estimates start in, in units of Δ_min
SCALE = 10.0  # of sign flip and inner product
TWO_STAGE = "two-stage"

ATTACK_ALPHAS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45)
ATTACKS = ("scaled-model", "sign-flip", "alie", "inner-product", "random-labels")
BETAS = (0.0, 0.025, 0.05, 0.075, 0.10, 0.125, 0.15, 0.20, 0.30, 0.40)
PER_CLUSTER, POINTS = (10, 20, 40, 80, 160), (25, 50, 100, 200, 400)  # around the published 40 and 100
LONG, STOPS = 1000, (50, 100, 200, 300, 500)  # rounds: θ has converged after LONG of them
SEEDS = {"attacks": 10, "betas": 20, "distance": 50, "random-start": 20, "rate": 10, "rounds": 10}
LARGE, LARGE_SEEDS = 200, 10  # from this dimension on, so many seeds
QUICK_SEEDS, QUICK_COST = {"attacks": 1, "betas": 2, "distance": 2, "random-start": 2, "rate": 1, "rounds": 1}, 5.0


@dataclass(frozen=True)
class BRIFCACell:
    """One draw of data and attackers, on which servers with different rules run side by side.

    servers: "rules" runs every rule with β = α and the two-stage baseline, "iterative" without the baseline, "betas"
    the trimmed mean with every β of `BETAS`. per_cluster: m/K. examples: n. rounds: T.
    """

    clusters: int
    dimension: int
    alpha: float
    attack: str = "scaled-model"
    placement: str = "spread"
    start: str = "ball"
    servers: str = "rules"
    seed: int = 0
    per_cluster: int = CLIENTS_PER_CLUSTER
    examples: int = EXAMPLES
    rounds: int = ROUNDS


def grids() -> dict[str, list[BRIFCACell]]:
    """Return the cells of every figure, for seed 0."""
    return {
        "attacks": [
            *(BRIFCACell(5, 20, alpha, attack) for alpha, attack in product(ATTACK_ALPHAS, ATTACKS)),
            *(BRIFCACell(5, 20, alpha, placement="one-cluster") for alpha in ATTACK_ALPHAS),
        ],
        "betas": [BRIFCACell(5, 20, 0.10, attack, servers="betas") for attack in ("scaled-model", "sign-flip", "alie")],
        "distance": [BRIFCACell(k, d, alpha) for d, k, alpha in product(DIMENSIONS, CLUSTERS, ALPHAS)],
        "random-start": [BRIFCACell(k, d, 0.10, start="random", servers="iterative")
                         for d, k in product((20, 50, 100), CLUSTERS)],
        "rate": [BRIFCACell(2, 20, 0.10, servers="iterative", per_cluster=clients, examples=n, rounds=LONG)
                 for clients, n in product(PER_CLUSTER, POINTS)],
        "rounds": [BRIFCACell(2, 20, 0.10, servers="iterative", examples=n, rounds=rounds)
                   for n in (25, 100, 400) for rounds in (*STOPS, LONG)],
    }  # fmt: skip


def seeds(quick: bool, figure: str, cell: BRIFCACell) -> int:
    """Return how many seeds a cell of a figure has, in the quick form (none if it is not cheap) or the whole."""
    if quick:
        return QUICK_SEEDS[figure] if cost(cell) <= QUICK_COST else 0
    return LARGE_SEEDS if cell.dimension >= LARGE else SEEDS[figure]


def cost(cell: BRIFCACell) -> float:
    """Return roughly the seconds that a cell takes on one core."""
    reports = cell.per_cluster * cell.clusters * (len(BETAS) if cell.servers == "betas" else 6)
    gradient = min(cell.dimension, 2 * cell.examples) * cell.dimension  # multiplications
    weiszfeld = 8 if cell.attack == "alie" and cell.servers == "rules" else 1  # its iteration is slow then
    choosing = 2 if cell.start == "random" else 1
    seconds: float = 3e-3 * weiszfeld + choosing * reports * (4e-10 * gradient + 2.5e-8 * cell.dimension)
    return cell.rounds * seconds


def compute(cell: BRIFCACell) -> Rows:
    """Run one cell: a row per method."""
    mixture = Mixture(
        clients=cell.per_cluster * cell.clusters, clusters=cell.clusters, dimension=cell.dimension,
        examples=cell.examples, noise=NOISE, centres="bernoulli", sizes="equal", seed=cell.seed,
    )  # fmt: skip
    adversary = Adversary(mixture, cell.alpha, cell.attack, cell.placement)
    points = adversary.points_of(range(mixture.clients))
    start = mixture.start(cell.start, RADIUS)
    if cell.servers == "betas":
        servers = [("trimmed-mean", Server("trimmed-mean", beta, start)) for beta in BETAS]
    else:
        servers = [(rule, Server(rule, cell.alpha, start)) for rule in CLUSTER_RULES]
    if cell.servers == "rules":
        generator = random_generator(cell.seed, "two-stage")
        servers.append((TWO_STAGE, two_stage(points, cell.clusters, cell.alpha, generator)))
    thetas = br_ifca(points, [server for _, server in servers], adversary, scale=SCALE, step=STEP, rounds=cell.rounds)
    honest = ~adversary.byzantine
    reports = client_reports(mixture.all_points(), thetas)
    rows = []
    for (method, server), theta, report in zip(servers, thetas, reports, strict=True):
        clusters = report.clusters if server.labels is None else server.labels
        start, end = (torch.nan_to_num(each, 1e150, 1e150, -1e150) for each in (server.start, theta))  # very far off
        rows.append({
            "method": method,
            "beta": server.share,
            "start_distance": mean_matched_distance(start, mixture.truth),
            "nearest_distance": mean_nearest_distance(end, mixture.truth),
            "matched_distance": mean_matched_distance(end, mixture.truth),
            "cluster_accuracy": cluster_accuracy(clusters[honest], mixture.assignment[honest], cell.clusters),
        })  # fmt: skip
    return {"runs": rows}
