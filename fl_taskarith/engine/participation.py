"""Which clients are in a round, which of them drop out, and what simulated attackers among them send."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fl_taskarith.config.settings import Config
from fl_taskarith.engine.round_reply import Reply
from fl_taskarith.merging.attacks import DATA_ATTACKS, corrupted
from fl_taskarith.seeding import random_generator
from fl_taskarith.workspace.views import byzantine_clients


def sample_clients(config: Config, server_round: int, partitions: Sequence[int]) -> list[int]:
    """Return the partitions of a round's clients, ascending: drawn for the round, or the next of one random order.

    The cost of a draw does not depend on K: numpy draws a small share of many without listing them all.
    """
    if config.sampling == "cyclic":
        order = random_generator(config.seed, "cyclic order").permutation(len(partitions))
        first = (server_round - 1) * config.sampled_clients
        places = range(first, first + config.sampled_clients)
        return sorted(partitions[order[place % len(partitions)]] for place in places)
    generator = random_generator(config.seed, "participation", server_round)
    chosen = generator.choice(len(partitions), config.sampled_clients, replace=False)
    return sorted(partitions[index] for index in chosen)


def without_dropouts(config: Config, server_round: int, sampled: list[int]) -> list[int]:
    """Return the sampled clients that do not drop out of the round, at least one; all were sent the weights."""
    if not config.dropout:
        return sampled
    luck = {client: random_generator(config.seed, "dropout", server_round, client).random() for client in sampled}
    staying = [client for client in sampled if luck[client] >= config.dropout]
    return staying or [max(sampled, key=lambda client: luck[client])]


def with_attackers(config: Config, replies: Iterable[Reply]) -> Iterable[Reply]:
    """Replace the task vectors of Byzantine clients by what `attack` sends; attackers see all honest task vectors.

    Metrics of attackers stay honest. Without an attack on task vectors, the replies pass through one by one.
    """
    if not config.byzantine_fraction or config.attack in DATA_ATTACKS:
        return replies
    honest = [
        replace(reply, task_vector={name: value.clone() for name, value in reply.task_vector.items()})
        for reply in replies
    ]
    byzantine = [bool(byzantine_clients(config)[reply.client]) for reply in honest]
    sent = corrupted([reply.task_vector for reply in honest], byzantine, config.attack, config.attack_scale)
    return [replace(reply, task_vector=dict(vector)) for reply, vector in zip(honest, sent, strict=True)]
