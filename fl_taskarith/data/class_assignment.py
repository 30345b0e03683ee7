"""Which client owns which class, so that each owns exactly Nc, every class has an owner and shard sizes are even.

Shard sizes are equal ±1 or differ as little as the best assignment found permits. In general the best one cannot be
found in reasonable time (with whole classes it is number partitioning), and `least_spread` is what no assignment goes
below; classes of equal size reached it within 1 in every case tried, and one class per client always does. McMahan et
al. (2017) deal shards of equal size; the exact rule here avoids two known faults of drawing classes independently:
classes without an owner, and examples given out twice.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack
from scipy.sparse.csgraph import maximum_flow

from fl_taskarith.data.splits import apportion
from fl_taskarith.errors import ConfigError

DEALS = 50  # assignments of classes to clients that are tried for equal shard sizes
LINES = 20  # arrangements in line that are tried after them


def assign_classes(
    counts: np.ndarray, num_clients: int, classes_per_client: int, generator: np.random.Generator,
    lines: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return how many examples of each class each client owns, int [K, classes], from those of each class, [classes].

    The owners are those of the first deal with equal sizes ±1 among up to `DEALS` drawn from `generator`; else those
    with the least spread among these deals and up to `LINES` arrangements of the classes in line (`_in_line`), drawn
    from `lines` until `least_spread` is reached.

    Raises:
        ConfigError: K clients cannot own exactly Nc classes each and all classes together.
    """
    _check_feasible(counts, num_clients, classes_per_client)
    slots = _slots(counts, num_clients, classes_per_client)
    bound = max(1, least_spread(counts, num_clients, classes_per_client))
    best, least = np.empty(0), np.inf
    for attempt in range(DEALS + LINES):
        if attempt < DEALS:
            owned: np.ndarray | None = deal_classes(slots, num_clients, classes_per_client, generator)
        else:
            owned = _in_line(counts, num_clients, classes_per_client, lines)
        if owned is None:
            continue
        smallest, largest = size_range(owned, counts)
        if largest - smallest < least:
            best, least = owned, largest - smallest
        if least <= bound or classes_per_client in (1, len(counts)):  # else every deal has the same sizes
            break
    return balance_sizes(best, counts)


def _slots(counts: np.ndarray, num_clients: int, classes_per_client: int) -> np.ndarray:
    """Return how many owners each class gets: in proportion to its examples or, for Nc = 1, for the least spread."""
    fewest, most = np.ones_like(counts), np.minimum(counts, num_clients)
    weights = counts.astype(float)
    slots = apportion(num_clients * classes_per_client, weights, fewest, most)
    if classes_per_client == 1:
        smallest, largest = _single_class_range(counts, num_clients)
        if int((-(-counts // slots)).max() - (counts // slots).min()) > largest - smallest:
            slots = apportion(num_clients, weights, -(-counts // largest), np.minimum(most, counts // smallest))
    return slots


def _single_class_range(counts: np.ndarray, num_clients: int) -> tuple[int, int]:
    """Return the smallest and the largest shard, differing as little as they can, where every client owns one class.

    Shards of a class of n examples lie within [y, x] if it has ⌈n / x⌉ to ⌊n / y⌋ owners; so a window [y, x] is
    possible if every class can have that many and K lies between the sums of the two bounds.
    """
    best, mean = (1, int(counts.max())), math.ceil(counts.sum() / num_clients)
    for smallest in range(min(int(counts.min()), int(counts.sum()) // num_clients), 0, -1):
        if mean - smallest >= best[1] - best[0]:
            break
        most = counts // smallest

        def wide_enough(size: int, most: np.ndarray = most) -> bool:
            fewest = -(counts // size)
            return bool((fewest <= most).all()) and int(fewest.sum()) <= num_clients

        if most.sum() >= num_clients and wide_enough(-best[1]):
            largest = -_bisect(wide_enough, -best[1], -smallest)
            best = min(best, (smallest, largest), key=lambda window: window[1] - window[0])
    return best


def least_spread(counts: np.ndarray, num_clients: int, classes_per_client: int) -> int:
    """Return a lower bound on the difference of the largest and the smallest shard over all assignments of classes.

    `counts`, int [classes], are the examples of each class, none of them 0, and the assignment is feasible. The true
    least difference may be larger, except for Nc = 1; with classes of almost equal size it rarely is by much.

    Clients and classes, joined where a client owns a class, form a graph of K Nc edges, m too few to connect it. A
    component of k clients has at most k (Nc − 1) + 1 classes, just so many where it is a tree, and m components at
    least are trees. So some trees have at most ⌊K / m⌋ clients, and the largest shard is at least the mean of theirs;
    and the smallest is at most that of all components but the trees of fewer than ⌈K / m⌉ clients. Both means are
    bounded over all numbers of clients and trees there can be, with the smallest and the largest classes.
    """
    if classes_per_client == 1:
        smallest, largest = _single_class_range(counts, num_clients)
        return largest - smallest
    uneven = int(counts.sum() % num_clients != 0)
    missing = num_clients + len(counts) - num_clients * classes_per_client
    if missing < 1:
        return uneven
    ascending = np.concatenate([[0], np.cumsum(np.sort(counts))])
    descending = ascending[-1] - ascending[::-1]
    clients = np.arange(1, num_clients + 1)
    few, many = num_clients // missing, -(-num_clients // missing)

    small_trees = max(1, -(-(missing * (few + 1) - num_clients) // few))
    classes = clients * (classes_per_client - 1) + np.maximum(small_trees, -(-clients // few))
    possible = (clients >= small_trees) & (classes <= len(counts))
    largest = math.ceil((ascending[classes[possible]] / clients[possible]).min())

    trees = clients // many
    if many > 1:
        trees = np.minimum(trees, missing + (clients - num_clients) // (many - 1))
    classes = clients * (classes_per_client - 1) + trees
    possible = (classes >= 1) & ((clients == num_clients) | (many > 1))
    smallest = math.floor((descending[np.minimum(classes, len(counts))[possible]] / clients[possible]).max())
    return int(max(uneven, largest - smallest))


def describe_spread(spread: int, least: int) -> str:
    """Say whether shard sizes that differ by `spread` under "classes" could be closer, from their `least_spread`."""
    if spread == least:
        return "no assignment of classes makes the sizes differ less"
    return f"they differ by {spread}; every assignment of classes has {least} at least, and the least is not known"


def _in_line(
    counts: np.ndarray, num_clients: int, classes_per_client: int, generator: np.random.Generator
) -> np.ndarray | None:
    """Lay classes end to end in as few lines as possible, each cut into equal shards; return owners, bool [K, classes].

    There are several lines where the pairs of client and class are too few to connect all, as `least_spread` explains:
    of about equal means, with neighbours that share one class. Otherwise there is one line, in which a client covers
    few classes and gets others as well. Clients are in random order. None: a client would cover more than Nc classes.
    """
    missing = num_clients + len(counts) - num_clients * classes_per_client
    if missing < 1:
        owned = _one_line(counts, num_clients, classes_per_client, generator)
        return None if owned is None else owned[generator.permutation(num_clients)]
    clients = np.array([len(part) for part in np.array_split(np.arange(num_clients), missing)])
    owned = np.zeros((num_clients, len(counts)), dtype=bool)
    row = 0
    for number, line in zip(clients, _even_lines(counts, clients, classes_per_client, generator), strict=True):
        for client in range(number):
            start = client * (classes_per_client - 1)
            owned[row + client, line[start : start + classes_per_client]] = True
        row += number
    return owned[generator.permutation(num_clients)]


def _even_lines(
    counts: np.ndarray, clients: np.ndarray, classes_per_client: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Return the classes of each line, k (Nc − 1) + 1 for k `clients`, with means per client made equal by exchanges.

    From a random start two lines exchange the two classes that lower the sum of squares of all shard sizes most, for as
    long as any do.
    """
    line_of = generator.permutation(np.repeat(np.arange(len(clients)), clients * (classes_per_client - 1) + 1))
    gained = counts[None, :] - counts[:, None]  # by the line of the row's class, in exchange for the column's
    while True:
        means = (np.bincount(line_of, weights=counts) / clients)[line_of]
        weights = 1 / clients[line_of]
        change = 2 * gained * (means[:, None] - means) + gained**2 * (weights[:, None] + weights)
        change[line_of[:, None] == line_of] = 0.0
        one, other = np.unravel_index(change.argmin(), change.shape)
        if change[one, other] > -1e-9:
            return [np.flatnonzero(line_of == line) for line in range(len(clients))]
        line_of[one], line_of[other] = line_of[other], line_of[one]


def _one_line(
    counts: np.ndarray, num_clients: int, classes_per_client: int, generator: np.random.Generator
) -> np.ndarray | None:
    """Cut classes in random order into K equal parts; then give each client below Nc classes an example of others.

    They come from the clients that gave least so far, so that gains and losses cancel. None: a client covers more than
    Nc classes already, or finds no other with an example to spare.
    """
    order = generator.permutation(len(counts))
    cuts = np.arange(num_clients + 1) * counts.sum() // num_clients
    ends = np.cumsum(counts[order])
    covered = np.zeros((num_clients, len(counts)), dtype=bool)
    covered[:, order] = (cuts[:-1, None] < ends) & (cuts[1:, None] > ends - counts[order])
    owned, given = covered.copy(), np.zeros(num_clients)
    for client in np.repeat(np.arange(num_clients), np.maximum(0, classes_per_client - covered.sum(1))):
        free = ~owned[client] & (owned.sum(0) < counts)
        if not free.any():
            return None
        gave = (given @ covered) / covered.sum(0)
        chosen = np.lexsort((-counts / (owned.sum(0) + 1), gave, ~free))[0]
        owned[client, chosen] = True
        given += covered[:, chosen] / covered[:, chosen].sum()
    return owned if (owned.sum(1) == classes_per_client).all() else None


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

    Each client takes the classes that lack most owners, ties broken at random. Taking the largest keeps the
    rest feasible (Gale-Ryser); with equal slots this deals the classes like decks of cards.
    """
    owned = np.zeros((num_clients, len(slots)), dtype=bool)
    left = slots.copy()
    for client in generator.permutation(num_clients):
        chosen = np.lexsort((generator.random(len(left)), -left))[:classes_per_client]
        owned[client, chosen] = True
        left[chosen] -= 1
    return owned


def size_range(owned: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
    """Return the largest minimum and the smallest maximum of the shard sizes that `owned`, bool [K, classes], permits.

    Every client has at least one example of each class it owns. The possible sizes form an integral base polytope, so
    both bounds hold together (Frank & Murota 2022, decreasing minimization). Each is found by maximum flows from
    classes to clients.
    """
    clients, classes = np.nonzero(owned)
    num_clients, num_classes = owned.shape
    left, total = counts - owned.sum(0), int(counts.sum())
    source, sink = num_clients + num_classes, num_clients + num_classes + 1
    tails = np.concatenate([np.full(num_classes, source), num_clients + classes, np.arange(num_clients)])
    heads = np.concatenate([num_clients + np.arange(num_classes), clients, np.full(num_clients, sink)])

    def flow(size: int) -> int:
        """Return how many examples fit if no shard gets more than `size`, beyond one of each class it owns."""
        room = np.maximum(0, size - owned.sum(1))
        capacities = np.concatenate([left, left[classes], room]).astype(np.int32)
        graph = coo_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1)).tocsr()
        return int(maximum_flow(graph, source, sink).flow_value)

    def filled(size: int) -> bool:
        return flow(size) == int(np.maximum(0, size - owned.sum(1)).sum())

    smallest = _bisect(filled, 1, total // num_clients)
    most = int(owned.sum(1).max())  # a shard has that many at least
    largest = -_bisect(
        lambda size: -size >= most and flow(-size) == left.sum(), -total, -math.ceil(total / num_clients)
    )
    return smallest, largest


def balance_sizes(owned: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how many examples of each class each client gets: int [K, classes], at least one wherever `owned`.

    Columns add up to `counts`. Row sums (the shard sizes) are as equal as `owned` permits; within that, the parts of a
    class are as close to an equal division among its owners as possible. This is a transportation problem, whose
    constraint matrix is totally unimodular, so the simplex vertex that HiGHS returns is integral.
    """
    clients, classes = np.nonzero(owned)
    num_clients, num_classes = owned.shape
    edges = np.arange(len(clients))
    ones = np.ones(len(edges))
    rows = coo_array((ones, (clients, edges)), shape=(num_clients, len(edges))).tocsr()
    columns = coo_array((ones, (classes, edges)), shape=(num_classes, len(edges))).tocsr()
    fair = (counts / owned.sum(0))[classes]
    smallest, largest = size_range(owned, counts)

    def flow(slack: int) -> np.ndarray | None:
        """Return sizes per edge with shard sizes in [smallest, largest] and parts within `slack` of fair, if any."""
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

    slack = 0
    while (sizes := flow(slack)) is None:
        slack = max(1, 2 * slack)
    result = np.zeros_like(owned, dtype=int)
    result[clients, classes] = sizes
    assert (result.sum(0) == counts).all(), "total unimodularity makes the flow integral"
    return result


def _bisect(feasible: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in [low, high] that is `feasible`, where `low` is and feasibility ends once."""
    if feasible(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low
