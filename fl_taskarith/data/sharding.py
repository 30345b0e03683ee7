"""Which client owns which training example. Every example is owned by exactly one client.

Under `classes` each client owns exactly Nc classes, every class has an owner, and shard sizes are equal +-1 or, where
no assignment tried allows that, differ as little as the best of them permits. McMahan et al. (2017) deal shards of
equal size; the exact rule here avoids two known faults of drawing classes independently: classes without an owner, and
examples given out twice.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from fl_taskarith.data.splits import apportion
from fl_taskarith.errors import ConfigError
from fl_taskarith.seeding import random_generator

Shards = list[np.ndarray]

LEAST_ALPHA = 1e-200  # a smaller α counts as this one, under which logarithms of shares stay finite
VANISHING = 1e-290  # chances that add up to less have lost digits to underflow
DEALS = 50  # assignments of classes to clients that are tried for equal shard sizes


def make_shards(
    labels: np.ndarray,
    num_clients: int,
    sharding: str,
    classes_per_client: int,
    seed: int,
    dirichlet_alpha: float = 1.0,
) -> Shards:
    """Positions into `labels` [N] of each client's examples: `num_clients` sorted int64 arrays.

    Args:
        labels: class of every training example, int64 [N].
        num_clients: K.
        sharding: "iid", "classes" or "dirichlet".
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
    """Shards of equal size ±1, client k's classes drawn by its own shares q_k ~ Dir(α p) (Hsu et al. 2019).

    p are the class shares of all examples: α → ∞ is iid; as α → 0 a client has one class, and another only where that
    one is used up, so that K clients and C classes make at most K + C − 1 pairs. Dir(a, ..., a), as others write it, is
    α = a times the number of classes. Examples are drawn one by one without replacement, a class with a chance in
    proportion to q_k times the share of it that is left. Without that last factor, clients that come last, in random
    order, would get odd leftovers at any α; with it they still get what is left, but α → ∞ is iid for them too.
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
    """Logarithms of one draw of Dir(concentrations) [n], but for a constant, so that no share underflows.

    They are those of its Gamma variables: Gamma(a) ~ Gamma(a + 1) U^(1/a).
    """
    uniform_logs = -generator.standard_exponential(len(concentrations))
    logs: np.ndarray = np.log(generator.gamma(concentrations + 1)) + uniform_logs / concentrations
    return logs


def _normalised(logs: np.ndarray) -> np.ndarray:
    """The shares [n], adding up to 1, of which `logs` are the logarithms but for a constant."""
    weights = np.exp(logs - logs.max())
    shares: np.ndarray = weights / weights.sum()
    return shares


def _draw_classes(
    logs: np.ndarray, counts: np.ndarray, left: np.ndarray, size: int, generator: np.random.Generator
) -> np.ndarray:
    """How many examples of each class: `size` in all, one by one with chances in proportion to shares · left / counts.

    `logs` are the logarithms of the shares. Once the classes with all but a vanishing part of them are used up, the
    client's shares among the classes left count. `left` is reduced in place.
    """
    taken = np.zeros_like(left)
    shares = _normalised(logs) / counts
    for draw in generator.random(size):
        chances = np.cumsum(shares * left)
        if chances[-1] < VANISHING:
            shares = _normalised(np.where(left > 0, logs, -np.inf)) / counts
            chances = np.cumsum(shares * left)
        label = int(np.searchsorted(chances, draw * chances[-1], side="right"))
        taken[label] += 1
        left[label] -= 1
    return taken


def _class_shards(labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int) -> Shards:
    classes, counts = np.unique(labels, return_counts=True)
    _check_feasible(counts, num_clients, classes_per_client)
    generator = random_generator(seed, "sharding classes")
    slots = apportion(
        num_clients * classes_per_client,
        counts.astype(float),
        np.ones_like(counts),
        np.minimum(counts, num_clients),
    )
    owned, sizes = _best_deal(slots, counts, num_clients, classes_per_client, generator)

    shards: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for column, label in enumerate(classes):
        examples = generator.permutation(np.flatnonzero(labels == label))
        owners = np.flatnonzero(owned[:, column])
        for client, part in zip(owners, np.split(examples, np.cumsum(sizes[owners, column])[:-1]), strict=True):
            shards[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in shards]


def _best_deal(
    slots: np.ndarray, counts: np.ndarray, num_clients: int, classes_per_client: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The deal, of up to `DEALS` drawn, whose shard sizes differ least; the first with equal sizes +-1."""
    best: tuple[np.ndarray, np.ndarray] | None = None
    least = len(counts) * int(counts.max())
    for _ in range(DEALS):
        owned = deal_classes(slots, num_clients, classes_per_client, generator)
        sizes = balance_sizes(owned, counts, slots)
        spread = int(np.ptp(sizes.sum(1)))
        if best is None or spread < least:
            best, least = (owned, sizes), spread
        if spread <= 1 or classes_per_client in (1, len(counts)):  # else every deal has the same sizes
            break
    assert best is not None
    return best


def _check_feasible(counts: np.ndarray, num_clients: int, classes_per_client: int) -> None:
    """Raise ConfigError unless K clients can own exactly Nc classes each and all classes together."""
    number, slots = len(counts), num_clients * classes_per_client
    problem = ""
    if classes_per_client > number:
        problem = f"the data set has only {number} classes"
    elif slots < number:
        problem = f"K x Nc = {num_clients} x {classes_per_client} = {slots} < {number} classes, so some have no owner"
    elif np.minimum(counts, num_clients).sum() < slots:
        problem = (
            f"K x Nc = {slots} pairs of client and class need an example each, and a class of n examples has at most "
            f"min(n, K) owners: {np.minimum(counts, num_clients).sum()} in all"
        )
    if problem:
        raise ConfigError(
            f"classes-per-client = {classes_per_client} with num-clients = {num_clients} is impossible: {problem}."
        )


def deal_classes(
    slots: np.ndarray, num_clients: int, classes_per_client: int, generator: np.random.Generator
) -> np.ndarray:
    """Give each client Nc distinct classes so that class c gets `slots[c]` owners: bool [K, classes].

    Each client takes the classes with most owners still to find, ties broken at random. Taking the largest keeps the
    rest feasible (Gale-Ryser); with equal slots this deals the classes like decks of cards.
    """
    owned = np.zeros((num_clients, len(slots)), dtype=bool)
    left = slots.copy()
    for client in generator.permutation(num_clients):
        chosen = np.lexsort((generator.random(len(left)), -left))[:classes_per_client]
        owned[client, chosen] = True
        left[chosen] -= 1
    return owned


def balance_sizes(owned: np.ndarray, counts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """How many examples of each class each client gets: int [K, classes], at least one wherever `owned`.

    Columns add up to `counts`. Row sums (the shard sizes) are as equal as `owned` permits; within that, the parts of a
    class stay as close to an equal division among its owners as they can. Each step is a transportation problem, whose
    constraint matrix is totally unimodular, so the simplex vertex that HiGHS returns is whole.
    """
    clients, classes = np.nonzero(owned)
    num_clients, num_classes = owned.shape
    edges = np.arange(len(clients))
    ones = np.ones(len(edges))
    rows = coo_array((ones, (clients, edges)), shape=(num_clients, len(edges))).tocsr()
    columns = coo_array((ones, (classes, edges)), shape=(num_classes, len(edges))).tocsr()
    fair = counts[classes] / slots[classes]
    total = counts.sum()

    def flow(smallest: int, largest: int, slack: int) -> np.ndarray | None:
        """Sizes per edge with all shard sizes in [smallest, largest] and parts within `slack` of fair, if any."""
        low = np.maximum(1, np.floor(fair) - slack)
        high = np.minimum(counts[classes], np.ceil(fair) + slack)
        result = linprog(
            np.zeros(len(edges)),
            A_ub=vstack([rows, -rows]),
            b_ub=np.concatenate([np.full(num_clients, largest), np.full(num_clients, -smallest)]),
            A_eq=columns,
            b_eq=counts,
            bounds=np.column_stack([low, high]),
            method="highs-ds",
        )
        return np.rint(result.x).astype(int) if result.status == 0 else None

    # The sizes that can be reached form an integral base polytope: the largest feasible minimum and the smallest
    # feasible maximum hold together (Frank & Murota 2022, decreasing minimization), so they are sought one by one.
    widest = int(counts.max())
    smallest = _bisect(lambda size: flow(size, total, widest) is not None, 1, total // num_clients)
    largest = -_bisect(lambda size: flow(1, -size, widest) is not None, -total, -math.ceil(total / num_clients))
    slack = 0
    while (sizes := flow(smallest, largest, slack)) is None:
        slack = max(1, 2 * slack)
    result = np.zeros_like(owned, dtype=int)
    result[clients, classes] = sizes
    if (result.sum(0) != counts).any():
        raise AssertionError("the sharding flow is not whole")  # cannot happen by total unimodularity
    return result


def _bisect(feasible: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that is `feasible`, where `low` is and feasibility ends once."""
    if feasible(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low
