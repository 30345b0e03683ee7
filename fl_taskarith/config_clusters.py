"""What settings of clusters, groups and attackers may hold, and where they contradict one another."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fl_taskarith.config import Config

REGRESSION = "linear-regression"  # a data set of numbers in place of images, made by each client from the seed
CLUSTER_RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")
ATTACKS = ("sign-flip", "alie", "inner-product", "scaled-model", "random-labels")


def cluster_contradictions(config: "Config") -> list[tuple[bool, str]]:
    """Whether each contradiction holds, and what to say then."""
    return [
        (config.dataset == REGRESSION and config.strategy not in ("fed-em", "br-ifca"),
         f'dataset = "{REGRESSION}" needs strategy = "fed-em" or "br-ifca", not "{config.strategy}".'),
        (config.strategy == "fed-em" and config.dataset != REGRESSION,
         f'strategy = "fed-em" needs dataset = "{REGRESSION}", not "{config.dataset}".'),
        (config.strategy == "br-ifca" and config.dataset != REGRESSION
         and (config.head_rounds > 0 or config.validation_size == 0),
         'strategy = "br-ifca" on images trains K models from the first round and picks among them on validation: set '
         "head-rounds = 0 and validation-size above 0."),
        (config.client_groups != "none" and (config.strategy == "centralized" or config.prefix_cache != "off"
                                             or config.dataset == REGRESSION),
         f'client-groups = "{config.client_groups}" changes the images of clients: it needs clients, images, and '
         'prefix-cache = "off".'),
        (config.dataset == REGRESSION and config.cluster_centres == "equidistant"
         and config.num_clusters > config.dimension,
         f"num-clusters = {config.num_clusters} true parameters at equal distances need dimension at least as large, "
         f"not {config.dimension}."),
        (0 < config.farthest_separation < config.separation,
         f"farthest-separation = {config.farthest_separation:g} is below separation = {config.separation:g}: set it to "
         "0 or above."),
        (config.start == "random" and config.cluster_centres != "bernoulli",
         'start = "random" draws first estimates like the true parameters, and equidistant ones are not drawn: set '
         'cluster-centres = "bernoulli".'),
        (config.clients_at_once != 1 and config.engine == "flower",
         f"clients-at-once = {config.clients_at_once} computes clients together in one process: it needs "
         'engine = "sequential", or set it to 1.'),
        (config.clients_at_once != 1 and config.client_timeout > 0,
         f"client-timeout = {config.client_timeout:g} is a limit for one client's work, and clients-at-once = "
         f"{config.clients_at_once} has them work together: set the one to 0, or the other to 1."),
        (config.clients_at_once != 1 and config.on_client_failure == "skip",
         f"clients-at-once = {config.clients_at_once} fails as a whole where one of them does: set it to 1, or "
         'on-client-failure = "stop".'),
        (config.byzantine_fraction > 0 and config.strategy in ("fed-em", "centralized"),
         f'byzantine-fraction needs a strategy that takes task vectors from clients, not "{config.strategy}".'),
        (config.byzantine_fraction > 0 and config.dataset != REGRESSION
         and (config.attack == "scaled-model" or config.attack_placement != "spread"),
         f'attack = "{config.attack}" with attack-placement = "{config.attack_placement}": the scaled model and the '
         f'attack on one cluster are for dataset = "{REGRESSION}".'),
    ]  # fmt: skip
