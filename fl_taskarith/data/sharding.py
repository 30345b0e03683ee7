"""Which client owns which training example. Every example is owned by exactly one client."""

import numpy as np
from scipy.special import softmax

from fl_taskarith.data.class_assignment import assign_classes
from fl_taskarith.errors import ConfigError
from fl_taskarith.seeding import random_generator

Shards = list[np.ndarray]

LEAST_ALPHA = 1e-200  # a smaller α counts as this one, under which logarithms of shares stay finite
VANISHING = 1e-290  # chances that add up to less have lost digits to underflow


def make_shards(
    labels: np.ndarray, num_clients: int, sharding: str, classes_per_client: int, seed: int,
    dirichlet_alpha: float = 1.0,
) -> Shards:  # fmt: skip
    """Return the positions into `labels` [N] of each client's examples: `num_clients` sorted int64 arrays.

    Args:
        classes_per_client: Nc; used by "classes" only.
        seed: the shard seed.
        dirichlet_alpha: α; used by "dirichlet" only.

    Raises:
        ConfigError: the request is arithmetically impossible; says which inequality fails.
    """
    if num_clients > len(labels):
        raise ConfigError(
            f"num-clients = {num_clients} exceeds the {len(labels)} training examples: "
            "every client needs at least one. Lower num-clients or raise train-subset."
        )
    if sharding == "iid":
        order = random_generator(seed, "sharding iid").permutation(len(labels))
        return [np.sort(shard) for shard in np.array_split(order, num_clients)]
    if sharding == "dirichlet":
        return _dirichlet_shards(labels, num_clients, dirichlet_alpha, seed)
    return _class_shards(labels, num_clients, classes_per_client, seed)


def _dirichlet_shards(labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> Shards:
    """Return shards of equal size ±1, client k's classes drawn by its own shares q_k ~ Dir(α p) (Hsu et al. 2019).

    p are the class shares of all examples: α → ∞ is iid; as α → 0 a client has one class, and another only where that
    one is used up, so that K clients and C classes make at most K + C − 1 pairs. Dir(a, ..., a), as others write it, is
    α = a times the number of classes. Examples are drawn one by one without replacement, a class with a chance in
    proportion to q_k times the share of it that is left. Without that last factor the clients that come last, in random
    order, would get odd leftovers at any α; with it, α → ∞ is iid for them too.
    """
    generator = random_generator(seed, "sharding dirichlet")
    classes, counts = np.unique(labels, return_counts=True)
    sizes = [len(part) for part in np.array_split(labels, num_clients)]
    examples = [list(generator.permutation(np.flatnonzero(labels == label))) for label in classes]
    shards: Shards = [np.empty(0, dtype=np.int64)] * num_clients
    for client in generator.permutation(num_clients):
        left = np.array([len(each) for each in examples])
        logs = dirichlet_logs(max(alpha, LEAST_ALPHA) * counts / counts.sum(), generator)
        taken = _draw_classes(logs, counts, left, sizes[client], generator)
        drawn = [each.pop() for each, number in zip(examples, taken, strict=True) for _ in range(number)]
        shards[client] = np.sort(np.array(drawn, dtype=np.int64))
    return shards


def dirichlet_logs(concentrations: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw from Dir(concentrations) [n]; return logarithms [n], up to a constant, so that no share underflows.

    They are those of its Gamma variables: Gamma(a) ~ Gamma(a + 1) U^(1/a).
    """
    uniform_logs = -generator.standard_exponential(len(concentrations))
    logs: np.ndarray = np.log(generator.gamma(concentrations + 1)) + uniform_logs / concentrations
    return logs


def _draw_classes(
    logs: np.ndarray, counts: np.ndarray, left: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw `size` examples one by one with chances in proportion to shares · left / counts; return how many per class.

    `logs` are the logarithms of the shares. Once classes with all but a vanishing part of them are used up, the shares
    are normalised over those left. `left` is reduced in place.
    """
    taken = np.zeros_like(left)
    shares = softmax(logs) / counts
    for draw in generator.random(size):
        chances = np.cumsum(shares * left)
        if chances[-1] < VANISHING:
            shares = softmax(np.where(left > 0, logs, -np.inf)) / counts
            chances = np.cumsum(shares * left)
        label = int(np.searchsorted(chances, draw * chances[-1], side="right"))
        taken[label] += 1
        left[label] -= 1
    return taken


def _class_shards(labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int) -> Shards:
    """Return shards in which every client owns exactly Nc classes (see `class_assignment`)."""
    classes, counts = np.unique(labels, return_counts=True)
    generator = random_generator(seed, "sharding classes")
    lines = random_generator(seed, "sharding lines")
    sizes = assign_classes(counts, num_clients, classes_per_client, generator, lines)
    shards: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for column, label in enumerate(classes):
        examples = generator.permutation(np.flatnonzero(labels == label))
        owners = np.flatnonzero(sizes[:, column])
        for client, part in zip(owners, np.split(examples, np.cumsum(sizes[owners, column])[:-1]), strict=True):
            shards[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in shards]
