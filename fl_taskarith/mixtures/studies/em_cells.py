"""What the study of federated EM computes: its grids, and one cell of them."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch.nn.functional import one_hot

from fl_taskarith.mixtures.expectation_maximisation import federated_em, maximisation, pooled_em, statistics
from fl_taskarith.mixtures.matching import largest_matched_distance
from fl_taskarith.mixtures.regression import Mixture, Points
from fl_taskarith.mixtures.studies.cells import Rows

COLUMNS = {
    "runs": ("iterations", "converged", "iterations_to_accuracy", "error", "known_clusters_error"),
    "trajectories": ("iteration", "error"),
}
TOLERANCE = 1e-6  # of the convergence test, in units of Δ_min
MAX_ITERATIONS = 300
ACCURACY = 1.1  # an error of at most this many times the final one counts as final accuracy
SUCCESS = 2.0  # at most this many times the error of least squares with known clusters, and below Δ_min / 2

CLIENTS = (50, 100, 200, 500, 1000, 2000, 5000)
EXAMPLES = (5, 6, 7, 8, 10, 20, 50, 100)
CLUSTERS = (2, 3, 5, 10)
SNRS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)
NOISES = (1.0, 2.0, 4.0)  # SNRs of the final error: σ = 1/SNR varies
LOGARITHMIC = {"ln m": 1.0, "2 ln m": 2.0}  # points per client, rounded, at which m is exponential in n
MORE_CLIENTS = (*CLIENTS, 10000, 20000)
SEEDS, NOISY_SEEDS, QUICK_SEEDS = 50, 20, 3


@dataclass(frozen=True)
class EMCell:
    """One run of EM. Δ_min is 1, so σ = 1/snr; farthest is Δ_max, radius in units of Δ_min; trace keeps each error."""

    clients: int
    examples: int
    dimension: int
    clusters: int
    snr: float
    farthest: float = 1.0
    radius: float = 0.25
    method: str = "federated"
    trace: bool = False
    seed: int = 0


def grids() -> dict[str, list[EMCell]]:
    """Return the cells of every figure, for seed 0."""
    base = EMCell(clients=1000, examples=8, dimension=10, clusters=3, snr=2.0)
    change = partial(dataclasses.replace, base)
    return {
        "trajectories": [change(clients=m, examples=n, snr=snr, trace=True) for snr in (1.0, 2.0)
                         for m, n in ((100, 100), (500, 20), (1250, 8), (2000, 5))],
        "iterations": [change(clients=m, examples=n, snr=snr)
                       for clients, examples in ((CLIENTS, (5, 6, 7, 8)), ((100, 1000), EXAMPLES))
                       for snr, m, n in product((1.0, 2.0), clients, examples)],
        "rate": [change(clients=m, examples=n, dimension=d, clusters=k, snr=snr)
                 for snr in NOISES for d, k in product((10, 20, 50) if snr == NOISES[-1] else (10, 20), CLUSTERS)
                 for m, n in
                 ((200, 20), (200, 100), (1000, 10), (1000, 20), (1000, 100), (5000, 10), (5000, 20))],
        "logarithmic": [change(clients=m, examples=points_of(m, factor), snr=snr)
                        for snr in (1.0, 2.0) for factor in LOGARITHMIC.values() for m in MORE_CLIENTS],
        "snr": [change(examples=10, clusters=k, snr=snr) for k, snr in product(CLUSTERS, SNRS)],
        "separation": [change(clients=m, clusters=k, snr=1.0, farthest=farthest)
                       for m, k in ((200, 3), (1000, 3), (1000, 5)) for farthest in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)],
        "pooled": [change(clients=m, snr=snr, method=method)
                   for snr, m, method in product((1.0, 2.0, 4.0), CLIENTS, ("federated", "pooled"))],
        "radius": [change(clusters=k, radius=radius)
                   for k, radius in product(CLUSTERS, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0))],
    }  # fmt: skip


def points_of(clients: int, factor: float) -> int:
    """Return n = factor · ln m, rounded."""
    return round(factor * math.log(clients))


def seeds(quick: bool, figure: str, cell: EMCell) -> int:
    """Return how many seeds a cell has in the quick form or the whole."""
    if quick:
        return QUICK_SEEDS
    return NOISY_SEEDS if figure == "rate" and cell.snr < NOISES[-1] else SEEDS


def cost(cell: EMCell) -> float:
    """Return roughly the seconds that a cell takes on one core."""
    points = cell.clients * cell.examples
    iterations = 5 + 40 / cell.snr**2
    drawing = 3e-5 * cell.clients + points * cell.dimension * (3e-8 + 2e-10 * cell.dimension)
    each = 1e-9 * points * cell.clusters * (cell.dimension + 5)
    each += cell.clients * cell.clusters * cell.dimension**2 * 2e-10
    if cell.method == "pooled":
        each += 1e-9 * points * cell.clusters * cell.dimension * (2 + cell.dimension / 4)
    return drawing + iterations * (each + 3e-4)


def compute(cell: EMCell) -> Rows:
    """Run one cell: a row of results, and one per iteration where the cell keeps each error."""
    mixture = Mixture(
        clients=cell.clients, clusters=cell.clusters, dimension=cell.dimension, examples=cell.examples,
        noise=1 / cell.snr, farthest=cell.farthest, seed=cell.seed,
    )  # fmt: skip
    points = mixture.all_points()
    iterate = pooled_em if cell.method == "pooled" else federated_em
    path = iterate(points, mixture.start("ball", cell.radius), mixture.noise, TOLERANCE, MAX_ITERATIONS)
    errors = [largest_matched_distance(theta, mixture.truth) for theta in path.thetas]
    run = {
        "iterations": path.iterations,
        "converged": path.converged,
        "iterations_to_accuracy": next(t for t, error in enumerate(errors) if error <= ACCURACY * errors[-1]),
        "error": errors[-1],
        "known_clusters_error": known_clusters_error(mixture, points),
    }
    trace = [{"iteration": number, "error": error} for number, error in enumerate(errors)] if cell.trace else []
    return {"runs": [run], "trajectories": trace}


def known_clusters_error(mixture: Mixture, points: Points) -> float:
    """Return max_k ‖θ_k − θ*_k‖ of least squares per cluster by an oracle that knows z_j."""
    known = one_hot(mixture.assignment, mixture.clusters).double()
    theta = maximisation(statistics(points, known), mixture.truth)
    return float((theta - mixture.truth).norm(dim=1).max())
